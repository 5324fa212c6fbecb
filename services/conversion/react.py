r"""The ms_agent ReAct grammar: tools out of a system prompt, calls out of an assistant's turn.

A system prompt lists APIs as "N. NAME: Call this tool … API. What is the HUMAN API useful for? DESC. Parameters: JSON", a turn
is one text "[Thought: …\n]Action: …\nAction Input: …\nObservation: …\nThought: …\nFinal Answer: …". Everything is found by
`str.find` from left to right, so time is linear in the length; nothing is guessed: what does not fit is refused by name.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from services.conversion.refusals import (
    INCOMPLETE_TURN,
    INVALID_ACTION_INPUT,
    INVALID_PARAMETERS,
    MISSING_PARAMETERS,
    NOT_REACT_PROMPT,
    UNKNOWN_TOOL,
    Refused,
)
from services.conversion.rows import Call, Tool, Turn, make_call, make_tool, unique_tools
from services.conversion.schemas import make_schema

MARKER = "You have access to the following APIs:"
FORMAT_BLOCK = "\nUse the following format:"
CALL = ": Call this tool"
USEFUL = "useful for?"
PARAMETERS = "Parameters:"
LAST_THOUGHT = "I now know the final answer"
_NUMBER = re.compile(r"(?:^|\n)[ \t]*(\d{1,4})\.[ \t]*(?=[^\n]*?: Call this tool)")
_TOKEN = re.compile(r"(?:^|\n)[ \t]*(Thought|Action Input|Action|Observation|Final Answer):[ \t]?")
_DECODER = json.JSONDecoder()


@lru_cache(maxsize=4096)
def parse_system_prompt(text: str) -> tuple[Tool, ...]:
    """The tools of an ms_agent system prompt, in order. Raises Refused. Cached: data sets repeat their prompts."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    start = text.find(MARKER)
    if start < 0:
        raise Refused(NOT_REACT_PROMPT, f"no {MARKER!r}")
    end = text.rfind(FORMAT_BLOCK)
    if end < start:
        raise Refused(NOT_REACT_PROMPT, f"no {FORMAT_BLOCK.strip()!r} after the APIs")
    return unique_tools([_parse_api(block, number) for number, block in _split_apis(text[start + len(MARKER) : end])])


def parse_turn(text: str, tools: Sequence[Tool]) -> Turn:
    """An assistant's turn. Text outside of the grammar is kept as part of the answer. Raises Refused."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    names = {tool.name for tool in tools}
    marks = list(_TOKEN.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)][: len(marks)]
    parts = [(mark[1], text[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)]
    lead = text[: marks[0].start()] if marks else text
    calls: list[Call] = []
    answer: list[str] = []
    position = 0
    while position < len(parts):
        kind, value = parts[position]
        position += 1
        if kind == "Action":
            call, position = _parse_call(value.strip(), parts, position, names)
            calls.append(call)
        elif kind == "Final Answer":
            # All that follows is the answer, whatever it looks like.
            answer.append(text[marks[position - 1].end() :].strip())
            break
        elif kind != "Thought":
            raise Refused(INCOMPLETE_TURN, f"{kind}: without an Action before it")
        elif LAST_THOUGHT not in value and position == len(parts) and not calls:
            answer.append(value.strip())  # a turn that is nothing but a thought
    said = lead.strip()
    if calls and said:
        calls[0] = calls[0]._replace(lead=said)
    turn = Turn(tuple(calls), "\n".join(filter(None, answer if calls else [said, *answer])))
    if any(c.observation is None for c in calls[:-1]) or (calls and calls[-1].observation is None and turn.answer):
        raise Refused(INCOMPLETE_TURN, "an Action Input without an Observation")
    return turn


def _parse_call(name: str, parts: Sequence[tuple[str, str]], position: int, names: set[str]) -> tuple[Call, int]:
    if name not in names:
        raise Refused(UNKNOWN_TOOL, f"{name[:80]!r}")
    if position >= len(parts) or parts[position][0] != "Action Input":
        raise Refused(INCOMPLETE_TURN, f"Action: {name} without an Action Input")
    arguments = parse_arguments(parts[position][1])
    position += 1
    observation = None
    if position < len(parts) and parts[position][0] == "Observation":
        observation = parts[position][1].strip()
        position += 1
    return make_call(name, arguments, observation), position


def parse_arguments(text: str) -> dict[str, Any]:
    """Action Input as an object: JSON or a Python literal; [] and nothing mean no arguments. Raises Refused."""
    text = text.strip()
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        value = _literal(text, INVALID_ACTION_INPUT)
    if value in ([], None):
        value = {}
    if not isinstance(value, dict):
        raise Refused(INVALID_ACTION_INPUT, f"{text[:80]!r} is no object")
    return value


def _split_apis(text: str) -> Iterator[tuple[int, str]]:
    """(number, text) of each API: numbers count up from 1, so a numbered list in a description starts none."""
    starts: list[tuple[int, int, int]] = []
    for match in _NUMBER.finditer(text):
        if int(match[1]) == len(starts) + 1:
            starts.append((int(match[1]), match.start(), match.end()))
    for index, (number, _, begin) in enumerate(starts):
        yield number, text[begin : starts[index + 1][1] if index + 1 < len(starts) else len(text)]


def _parse_api(block: str, number: int) -> Tool:
    name, _, rest = block.partition(CALL)
    name = name.strip()
    raw, before = _find_parameters(rest, name or f"API {number}")
    useful = before.find(USEFUL)
    if useful >= 0:
        description = before[useful + len(USEFUL) :]
    else:
        # "… to interact with the HUMAN API. DESC" without the question
        _, found, after = before.partition("API.")
        description = after if found else before
    description = description.strip().removesuffix(".").strip()
    return make_tool(name, description, make_schema(raw, name))


def _find_parameters(text: str, name: str) -> tuple[Any, str]:
    """(decoded parameters, text before them): the last "Parameters:" whose value decodes and ends the block."""
    position, seen = text.rfind(PARAMETERS), False
    while position >= 0:
        seen = True
        value = _decode(text[position + len(PARAMETERS) :])
        if value is not None:
            return value, text[:position]
        position = text.rfind(PARAMETERS, 0, position)
    raise Refused(INVALID_PARAMETERS if seen else MISSING_PARAMETERS, f"tool {name!r}")


def _decode(text: str) -> Any | None:
    """A JSON or Python list or object at the start of a text; what stands after it, on lines of its own, is prose."""
    text = text.lstrip()
    if text[:1] not in ("[", "{"):
        return None
    try:
        value, end = _DECODER.raw_decode(text)
        rest = text[end:].strip(" \t.")
        return value if not rest or rest.startswith("\n") else None
    except ValueError:
        pass
    body = text.split("\n\n")[0].strip()
    try:
        return ast.literal_eval(body)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _literal(text: str, code: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise Refused(code, f"{text[:80]!r} is neither JSON nor a Python literal") from None
