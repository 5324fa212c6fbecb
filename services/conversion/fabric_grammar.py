r"""AgentFabric's prompt and turns, read back: what fabric.py prints, in the wording of modelscope-agent 0.4.0 to 0.7.2.

A prompt is [knowledge] [tools] instructions; a tool's line ends where the next name of the list `[a,b]` begins a line, so a
description may hold anything but that. A turn is "[prose\n]Action: …\nAction Input: …\n\nObservation: <result>…</result>\n
Answer: …", repeated. Everything is found from left to right in bounded steps; what does not fit is refused, never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from itertools import islice, takewhile
from typing import Any, NamedTuple

from services.common.fabric import ANSWER_TAIL, INSTRUCTIONS, PREFIX, TOOL_LINE, TOOLS, Call, Tool, Turn
from services.conversion.literals import unify_line_ends
from services.conversion.react import parse_arguments
from services.conversion.refusals import (
    INCOMPLETE_TURN,
    INVALID_PARAMETERS,
    NOT_FABRIC_PROMPT,
    RESULT_TAG_IN_RESULT,
    UNKNOWN_TOOL,
    Refused,
)
from services.conversion.rows import make_call, make_tool, unique_tools
from services.conversion.schemas import make_schema

LANGUAGES = ("zh", "en")
# Source: modelscope-agent 0.7.1, agents/role_play.py.
KNOWLEDGE: Mapping[str, str] = {"zh": "# 知识库\n\n", "en": "# Knowledge Base\n\n"}
PLAYS: Mapping[str, str] = {"zh": "你正在扮演", "en": "You are playing as "}
WILL_PLAY: Mapping[str, str] = {"zh": "\n下面你将开始扮演", "en": "\nNow you will start playing as"}
READ_KNOWLEDGE: Mapping[str, str] = {
    "zh": "。请查看前面的知识库",
    "en": ". Please read the knowledge base at the beginning",
}
FILES: Mapping[str, str] = {"zh": r'\[上传文件 "[^\n]{0,4000}?"\]', "en": r'\[Upload file "[^\n]{0,4000}?"\]'}
CALL = re.compile(r"Action:([^\n]{0,500})\nAction Input:")
"""How RolePlay finds a call: not only at the beginning of a line."""
RESULT_END = "</result>"
_RESULT = re.compile(r"\n(?:Observation:[ \t]*\n)?Observation:[ \t]*<result>")
_ANSWER = re.compile(r"[ \t]*\n+Answer:")
_STRAY = re.compile(r"^(?:Action Input:|Observation:[ \t]*<result>)", re.MULTILINE)
_ACTION = re.compile(r"^Action:([^\n]{0,500})$", re.MULTILINE)
_LINE_END = TOOL_LINE["zh"].rpartition("{parameters}")[2]
TRIES = 16
"""So many places are tried where the grammar can begin in more than one."""


class Prompt(NamedTuple):
    """What a system prompt of AgentFabric says."""

    language: str
    tools: tuple[Tool, ...]
    names: str | None
    """The tools' names as the prompt lists them, between brackets; None: it has no tool section."""
    plays: str
    """Who is played, where the instructions tell a name; else ""."""


@lru_cache(maxsize=4096)
def parse_prompt(text: str) -> Prompt:
    """A system prompt of AgentFabric. Raises Refused. Cached: data sets repeat their prompts."""
    # Only a text that has no other line ends has Windows' own: a description may hold "\r".
    text = (unify_line_ends(text) if text.count("\r\n") == text.count("\n") else text).strip()
    for language in LANGUAGES:
        before, after = (part.strip() for part in INSTRUCTIONS[language].split("{role}"))
        if not text.endswith(after):
            continue
        body, role = text.removesuffix(after), f"{before}\n\n"
        plays = body.rstrip("\n").rpartition(WILL_PLAY[language])
        found = Prompt(language, (), None, plays[2] if plays[1] and "\n" not in plays[2] else "")
        tools = TOOLS[language].partition("{descs}")[0].lstrip("\n")
        start = _find_section(body, language, tools)
        if start >= 0:
            names, listed = _parse_section(body, start + len(tools), language, role)
            return found._replace(names=names, tools=listed)
        if _find_section(body, language, role) >= 0:
            return found
    raise Refused(NOT_FABRIC_PROMPT, f"{text[:80]!r}")


def split_prefix(text: str, prompt: Prompt) -> tuple[str, str, str]:
    """(the parenthesis, the mark of uploaded files, the question) of a user's text; "" for what is not there.

    Raises Refused when there is a parenthesis that does not go with the prompt.
    """
    language = prompt.language
    tools = re.escape(PREFIX[language][1:-1].replace("{names}", prompt.names)) if prompt.names is not None else ""
    plays = f"(?:{re.escape(PLAYS[language] + prompt.plays)})?"
    match = re.match(rf"(\((?!\)){plays}{tools}(?:{READ_KNOWLEDGE[language]})?\))?({FILES[language]})?", text)
    parenthesis, files = (match[1] or "", match[2] or "") if match else ("", "")
    if not parenthesis and text.startswith(_PREFIX_STARTS):
        raise Refused(NOT_FABRIC_PROMPT, f"the prefix {text[:60]!r} does not go with the system prompt")
    return parenthesis, files, text[len(parenthesis) + len(files) :]


def parse_transcript(text: str, names: Collection[str]) -> Turn:
    """An assistant's turn with its results inside. names: of the tools that it may call. Raises Refused."""
    text = unify_line_ends(text)
    calls: list[Call] = []
    position, match = 0, CALL.search(text)
    while match:
        lead = _check_said(text[position : match.start()].strip(), names)
        call, position = _parse_call(text, match, names)
        calls.append(call._replace(lead=lead))
        match = CALL.search(text, position)
    return Turn(tuple(calls), _check_said(text[position:].strip(), names))


def _find_section(text: str, language: str, head: str) -> int:
    """Where a section begins: first of all, or after the knowledge; -1 where it does not."""
    if text.startswith(head):
        return 0
    if text.startswith(KNOWLEDGE[language]):
        at = text.find(f"\n\n\n{head}")
        return at + 3 if at >= 0 else -1
    return -1


def _parse_section(text: str, start: int, language: str, role: str) -> tuple[str, tuple[Tool, ...]]:
    """(names as listed, tools). start: where the tools' lines begin; role: what the instructions begin with."""
    _, middle, rest = re.split(r"\{descs\}|\{names\}", TOOLS[language].replace("{tail}\n\n", ""))
    ends = tuple(f"{rest}{tail}\n\n\n{role}" for (_, spoken), tail in ANSWER_TAIL.items() if spoken == language)
    refused = Refused(NOT_FABRIC_PROMPT, "a tool section without its end, the list of names or the instructions")
    for number, at in enumerate(islice(_find_all(text, middle, start), TRIES)):
        begin = at + len(middle)
        end = text.find(rest, begin)
        names = text[begin:end]
        if end < 0 or "\n" in names or not text.startswith(ends, end):
            continue
        try:
            return names, _parse_tools(text[start:at], names)
        except Refused as error:
            # Perhaps this end is part of a description, and the section's own comes later.
            refused = error if not number else refused
    raise refused


def _parse_tools(text: str, names: str) -> tuple[Tool, ...]:
    tools: list[Tool] = []
    position = place = 0
    while place < len(names):
        name = _read_name(text, position, names, place)
        if name is None:
            raise Refused(NOT_FABRIC_PROMPT, f"the tool section has no line for {names[place : place + 80]!r}")
        position, place = position + len(f"{name}: {name} API"), place + len(name) + 1
        end = _find_end(text, position, names, place) if place < len(names) else len(text)
        tools.append(_parse_tool(name, text[position:end]))
        position = end + 2
    if place != len(names) + 1 if names else text:
        raise Refused(NOT_FABRIC_PROMPT, f"the tools' lines do not agree with the list [{names[-80:]}]")
    return unique_tools(tools)


def _read_name(text: str, position: int, names: str, place: int) -> str | None:
    """The name in "NAME: NAME API" at a position, where it is the next in the list.

    A name may hold commas and colons: it goes as far as line and list agree, for then one has ":" and the other ",".
    """
    end = text.find("\n", position)
    line = text[position : end if end >= 0 else len(text)]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(line, names[place : place + len(line)], strict=False))
    name = "".join(letter for letter, _ in same)
    if not name or names[place + len(name) : place + len(name) + 1] not in ("", ","):
        return None
    return name if text.startswith((f"{name}: {name} API。", f"{name}: {name} API. "), position) else None


def _find_end(text: str, position: int, names: str, place: int) -> int:
    for at in _find_all(text, f"{_LINE_END}\n\n", position):
        end = at + len(_LINE_END)
        if _read_name(text, end + 2, names, place) is not None:
            return end
    raise Refused(NOT_FABRIC_PROMPT, f"the tool section has no line for {names[place : place + 80]!r}")


def _parse_tool(name: str, text: str) -> Tool:
    """text: what follows "NAME: NAME API"."""
    language = "zh" if text.startswith("。") else "en"
    before, after = TOOL_LINE[language].split("{description}")
    start, marker = len(before.rpartition("API")[2]), after.partition("{parameters}")[0]
    body = text.removesuffix(_LINE_END)
    at = len(body) if body != text else -1
    for _ in range(TRIES):
        # From the right: no text inside of the parameters' strings can be read as JSON up to the very end.
        at = body.rfind(marker, start, max(at, 0))
        if at < 0:
            break
        value = _decode(body, at + len(marker))
        if isinstance(value, dict) and isinstance(value.get("required"), list):
            return make_tool(name, body[start:at], value)
        if value is not None:
            return make_tool(name, body[start:at], make_schema(value, name))
    raise Refused(INVALID_PARAMETERS, f"tool {name[:80]!r}")


def _decode(text: str, start: int) -> Any | None:
    """The JSON from a position to the end, None where there is none."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return value if end == len(text) else None


def _parse_call(text: str, match: re.Match[str], names: Collection[str]) -> tuple[Call, int]:
    """(call, where the text after "Answer:" begins)."""
    name = match[1].strip()
    if name not in names:
        raise Refused(UNKNOWN_TOOL, f"{name[:80]!r}")
    result, other = _RESULT.search(text, match.end()), CALL.search(text, match.end())
    if result is None and other is None:
        return make_call(name, parse_arguments(text[match.end() :])), len(text)
    if result is None or (other is not None and other.start() < result.start()):
        raise Refused(INCOMPLETE_TURN, f"Action: {name} without a result before the next call")
    arguments = parse_arguments(text[match.end() : result.start()])
    close = text.find(RESULT_END, result.end())
    if close < 0:
        raise Refused(INCOMPLETE_TURN, f"the result of {name} does not end in {RESULT_END}")
    answer = _ANSWER.match(text, close + len(RESULT_END))
    if answer is None:
        again = text.find(RESULT_END, close + 1) >= 0
        code = RESULT_TAG_IN_RESULT if again else INCOMPLETE_TURN
        raise Refused(code, f"no 'Answer:' after the first {RESULT_END} of {name}")
    return make_call(name, arguments, text[result.end() : close]), answer.end()


def _check_said(said: str, names: Collection[str]) -> str:
    """Prose, unless parts of a call are left in it."""
    if RESULT_END in said:
        raise Refused(RESULT_TAG_IN_RESULT, f"{RESULT_END} outside of a result: {said[:80]!r}")
    if stray := _STRAY.search(said):
        raise Refused(INCOMPLETE_TURN, f"{stray[0]!r} without an Action before it")
    for action in _ACTION.finditer(said):
        if action[1].strip() in names:
            raise Refused(INCOMPLETE_TURN, f"{action[0][:80]!r} without an Action Input")
    return said


def _find_all(text: str, part: str, start: int) -> Iterator[int]:
    at = text.find(part, start)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_PREFIX_STARTS = tuple(
    f"({start}" for language in LANGUAGES for start in (PLAYS[language], PREFIX[language][1:].partition("{")[0])
)
