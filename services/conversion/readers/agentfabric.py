"""Rows that are AgentFabric's conversations already: captured transcripts, and what RolePlay sends to an OpenAI server.

A captured turn has its results inside. On RolePlay's wire the last user turn holds the question, the calls made so far and
their results, and the assistant goes on after "Answer:": both parts are put together into one turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.common.fabric import Round, render_prefix
from services.conversion.fabric_grammar import (
    CALL,
    RESULT_END,
    Prompt,
    parse_prompt,
    parse_transcript,
    split_prefix,
)
from services.conversion.literals import unify_line_ends
from services.conversion.readers.turns import check_turns, list_turns, row_id, split_rounds
from services.conversion.refusals import INCOMPLETE_TURN, Refused
from services.conversion.rows import Conversation


def read(row: Mapping[str, Any]) -> Conversation:
    """A row in AgentFabric's form; its system prompt is kept word for word. Raises Refused."""
    system, told = split_rounds(list_turns(row))
    prompt = parse_prompt(system or "")
    names = {tool.name for tool in prompt.tools}
    asked = [split_prefix(unify_line_ends(user), prompt) for user, _ in told]
    # RolePlay puts the parenthesis before the newest question only. An earlier one had the same when it was the newest.
    newest = asked[-1][0] or _usual_prefix(prompt)
    rounds: list[Round] = []
    for number, ((parenthesis, files, query), (_, text)) in enumerate(zip(asked, told, strict=True), 1):
        if query.rstrip().endswith(f"{RESULT_END}\nAnswer:"):
            if number < len(told):
                raise Refused(INCOMPLETE_TURN, f"a result in user turn {number}, which is not the last")
            query, done = _split_wire(query)
            text = done + text
        rounds.append(Round(query, parse_transcript(text, names), (parenthesis or newest) + files))
    check_turns([each.turn for each in rounds])
    return Conversation(row_id(row), prompt.tools, tuple(rounds), system)


def _usual_prefix(prompt: Prompt) -> str:
    return "" if prompt.names is None else render_prefix(prompt.tools, prompt.language)


def _split_wire(text: str) -> tuple[str, str]:
    """(question, what the assistant has done so far). RolePlay writes nothing in between."""
    call = CALL.search(text)
    if call is None:
        raise Refused(INCOMPLETE_TURN, "a result without a call in the user turn")
    query = text[: call.start()]
    if not query or query.endswith("\n"):
        raise Refused(INCOMPLETE_TURN, "what is said before the first call cannot be told from the question")
    return query, text[call.start() :]
