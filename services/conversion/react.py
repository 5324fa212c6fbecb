r"""The ms_agent ReAct grammar: tools out of a system prompt, calls out of an assistant's turn.

A system prompt lists APIs as "N. NAME: Call this tool … API. What is the HUMAN API useful for? DESC. Parameters: JSON", a turn
is one text "[Thought: …\n]Action: …\nAction Input: …\nObservation: …\nThought: …\nFinal Answer: …". Both are read once from left
to right, so time is linear in the length. Nothing is guessed: a line that begins like a part of the grammar is that part,
even within a description or a result, and what then does not fit is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from services.common.fabric import Call, Tool, Turn
from services.conversion.literals import decode_literal, decode_prefix, plain_object, unify_line_ends
from services.conversion.refusals import (
    INCOMPLETE_TURN,
    INVALID_ACTION_INPUT,
    INVALID_APIS,
    INVALID_PARAMETERS,
    MISSING_PARAMETERS,
    NOT_REACT_PROMPT,
    UNKNOWN_TOOL,
    Refused,
)
from services.conversion.rows import make_call, make_tool, unique_tools
from services.conversion.schemas import make_schema

MARKER = "You have access to the following APIs:"
FORMAT_BLOCK = "\nUse the following format:"
CALL = ": Call this tool"
PARAMETERS = "Parameters:"
LAST_THOUGHT = "I now know the final answer"
ONE_CALL = ["Action", "Action Input", "Observation", "Thought", "Final Answer"]
KNOWN_LINES, KNOWN_APIS, LONGEST_KNOWN_API = 8192, 512, 2048
"""Data sets repeat their APIs, in ever other combinations: APIs of one line, and those of several, that are remembered.

Characters are bounded too: at worst 100 MB are kept.
"""
LONGEST_KNOWN_SECTION = 16384

# A name ends before ": Call this tool"; the words may also stand in the parameters of a tool, after a numbered list.
_HEAD = re.compile(r"\n[ \t]*+([0-9]{1,4})\.[ \t]*+(?=(?:(?!Parameters:)[^\n])*?: Call this tool)")
_BLANKS = re.compile(r"\s*+")
# What may follow parameters: nothing, or prose on lines of its own. [1]: prose; [2]: it begins like another API.
_AFTER = re.compile(r"[ \t.]*+(?:\s*+\Z|(\n)\s*+([0-9]{1,4}\.(?![0-9]))?)")
_QUESTION = re.compile(r"\s*+What is the [^\n]*? API useful for\?")
_KEYWORD = re.compile(r"\n[ \t]*+(Thought|Action Input|Action|Observation|Final Answer)[:：][ \t]?")


def parse_system_prompt(text: str) -> tuple[Tool, ...]:
    """The tools of an ms_agent system prompt, in order. Raises Refused."""
    text = unify_line_ends(text)
    start = text.find(MARKER)
    if start < 0:
        raise Refused(NOT_REACT_PROMPT, f"no {MARKER!r}")
    end, other = -1, text.find(FORMAT_BLOCK, start)
    while other >= 0:  # the last one; looking for it from behind takes four times as long
        end, other = other, text.find(FORMAT_BLOCK, other + 1)
    if end < 0:
        raise Refused(NOT_REACT_PROMPT, f"no {FORMAT_BLOCK.strip()!r} after the APIs")
    section = text[start + len(MARKER) : end]
    return unique_tools(_recall_apis(section) or _parse_apis(section))


def parse_turn(text: str, tools: Sequence[Tool]) -> Turn:
    """An assistant's turn. Thoughts are left out; what is said before the first of them is kept. Raises Refused."""
    lead, kinds, values = _split_turn(unify_line_ends(text))
    if kinds == ONE_CALL:  # most turns
        call, _ = _parse_call(values[0], kinds, values, 1, tools)
        return Turn((call if not lead else call._replace(lead=lead),), values[4])
    calls: list[Call] = []
    answer = ""
    position = 0
    while position < len(kinds):
        kind, value = kinds[position], values[position]
        position += 1
        if kind == "Action":
            call, position = _parse_call(value, kinds, values, position, tools)
            calls.append(call)
        elif kind == "Final Answer":
            answer = value
        elif kind != "Thought":
            raise Refused(INCOMPLETE_TURN, f"{kind}: without an Action before it")
        elif LAST_THOUGHT not in value and position == len(kinds) and not calls:
            answer = value  # a turn that is nothing but a thought
    if not calls:
        answer = "\n".join(filter(None, (lead, answer)))
    elif lead:
        calls[0] = calls[0]._replace(lead=lead)
    return Turn(tuple(calls), answer)


def parse_arguments(text: str) -> dict[str, Any]:
    """Action Input as an object: JSON or a Python literal; [] and nothing mean no arguments. Raises Refused."""
    text = text.strip()
    try:
        value = decode_literal(text) if text else {}
    except ValueError:
        raise Refused(INVALID_ACTION_INPUT, f"{text[:80]!r} is neither JSON nor a Python literal") from None
    if value is None or value == []:
        value = {}
    if not isinstance(value, dict):
        raise Refused(INVALID_ACTION_INPUT, f"{text[:80]!r} is no object")
    return value


def _recall_apis(section: str) -> list[Tool] | None:
    """The tools of APIs that are lines of their own, as they mostly are; None: `_parse_apis` is to read the section.

    A line that begins an API begins one wherever its number comes next, and nothing within a line begins another.
    """
    if not section.startswith("\n1. ") or len(section) > LONGEST_KNOWN_SECTION:
        return None
    tools: list[Tool] = []
    for number, line in enumerate(section[1:].rstrip().split("\n\n"), 1):
        start = f"{number}. "
        if not line.startswith(start) or len(line) > LONGEST_KNOWN_API:
            return None
        tool = _parse_line(line[len(start) :])
        if tool is None:
            return None
        tools.append(tool)
    return tools


def _parse_apis(section: str) -> list[Tool]:
    return [
        _recall_api(api) if len(api) <= LONGEST_KNOWN_API else _parse_api(api) for api in _split_apis("\n" + section)
    ]


def _recall_api(api: str) -> Tool:
    return ("\n" not in api and _parse_line(api)) or _parse_known_api(api)


def _split_apis(section: str) -> Iterator[str]:
    """The text of each API, from its name on. Numbers count up from 1: a numbered list in a description starts none."""
    heads: list[re.Match[str]] = []
    for head in _HEAD.finditer(section):
        if int(head[1]) == len(heads) + 1:
            heads.append(head)
    before = section[: heads[0].start()] if heads else section
    if before := before.strip():
        raise Refused(INVALID_APIS, f"{before[:80]!r} where API 1 should be")
    for number, head in enumerate(heads, 1):
        yield section[head.end() : heads[number].start() if number < len(heads) else len(section)].rstrip()


def _parse_api(api: str) -> Tool:
    name, _, told = api.partition(CALL)
    name = name.strip()
    raw, position = _find_parameters(told, name)
    description = _cut_description(told[:position], name).strip().removesuffix(".").strip()
    return make_tool(name, description, make_schema(raw, name))


_parse_known_api = lru_cache(maxsize=KNOWN_APIS)(_parse_api)


@lru_cache(maxsize=KNOWN_LINES)
def _parse_line(line: str) -> Tool | None:
    """The tool of a line after its number; None where `_split_apis` would see something else in it, or refuses it."""
    if "\n" in line or line != line.strip() or not _HEAD.match(f"\n1. {line}"):
        return None
    try:
        return _parse_api(line)
    except Refused:
        return None


def _cut_description(told: str, name: str) -> str:
    """What comes after "… to interact with the HUMAN API. What is the HUMAN API useful for?"; the question may be missing."""
    for human in (name, name.replace("_", " "), name.replace("_", "")):
        start = f" to interact with the {human} API."
        if told.startswith(start):
            return told[len(start) :].removeprefix(f" What is the {human} API useful for?")
    if not told.startswith(" to interact with the "):
        return told
    _, found, after = told.partition(" API.")
    question = _QUESTION.match(after)
    return after[question.end() :] if question else after if found else told


def _find_parameters(told: str, name: str) -> tuple[Any, int]:
    """(decoded parameters, where they begin): the value after "Parameters:" that ends the API, others being prose.

    Where none ends it, prose follows on lines of its own; then only one value may be there. An API that is not the next
    one would be lost as such prose, so prose must not begin with a number.
    """
    last: tuple[Any, int] | None = None
    before_prose: list[tuple[Any, int]] = []
    position = told.find(PARAMETERS)
    if position < 0:
        raise Refused(MISSING_PARAMETERS, f"tool {name!r}")
    while position >= 0:
        begin = end = _end_of_blanks(told, position + len(PARAMETERS))
        found = decode_prefix(told, begin) if told.startswith(("[", "{"), begin) else None
        after = _AFTER.match(told, found[1]) if found else None
        if found and after:
            end = found[1]
            if after[2]:
                line = told[after.start(2) :].partition("\n")[0]
                raise Refused(INVALID_APIS, f"{line[:80]!r} after tool {name!r} is not the next API")
            if after[1]:
                before_prose.append((found[0], position))
            else:
                last = found[0], position
        position = told.find(PARAMETERS, end)
    if last is None and len(before_prose) == 1:
        last = before_prose[0]
    if last is None:
        raise Refused(INVALID_PARAMETERS, f"tool {name!r}{', which has more than one list' if before_prose else ''}")
    return last


def _split_turn(text: str) -> tuple[str, list[str], list[str]]:
    """(what is said first, keywords, the text of each). All that follows a Final Answer is the answer, but no call may."""
    text = "\n" + text
    lead, *parts = _KEYWORD.split(text)
    kinds = parts[::2]
    values = [value.strip() for value in parts[1::2]]
    if "Final Answer" in kinds and (last := kinds.index("Final Answer")) < len(kinds) - 1:
        if "Action Input" in kinds[last:]:
            raise Refused(INCOMPLETE_TURN, "a call after the Final Answer")
        mark = next(islice(_KEYWORD.finditer(text), last, None))
        kinds, values = kinds[: last + 1], [*values[:last], text[mark.end() :].strip()]
    return lead.strip(), kinds, values


def _parse_call(
    name: str, kinds: Sequence[str], values: Sequence[str], position: int, tools: Sequence[Tool]
) -> tuple[Call, int]:
    """(the call, the place of the part after it)."""
    if name not in [tool.name for tool in tools]:
        raise Refused(UNKNOWN_TOOL, f"{name[:80]!r}")
    if position >= len(kinds) or kinds[position] != "Action Input":
        raise Refused(INCOMPLETE_TURN, f"Action: {name} without an Action Input")
    text = values[position]
    arguments = plain_object(text) or parse_arguments(text)
    position += 1
    if position < len(kinds) and kinds[position] == "Observation":
        return make_call(name, arguments, values[position]), position + 1
    return make_call(name, arguments), position


def _end_of_blanks(text: str, position: int) -> int:
    found = _BLANKS.match(text, position)
    return found.end() if found else position
