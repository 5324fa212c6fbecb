"""Rows in OpenAI's form: `tools`, and `messages` in which the assistant has `tool_calls` and each result names its call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from services.common.errors import enumerated
from services.common.fabric import Call, Round, Tool, Turn
from services.conversion.react import parse_arguments
from services.conversion.readers.turns import check_turns, list_turns, row_id
from services.conversion.refusals import (
    EMPTY_CONVERSATIONS,
    INCOMPLETE_TURN,
    INVALID_ACTION_INPUT,
    INVALID_TOOLS,
    ROLE_ORDER,
    UNKNOWN_TOOL,
    Refused,
)
from services.conversion.rows import Conversation, make_call, make_tool, unique_tools
from services.conversion.schemas import make_schema

SYSTEM = ("system", "developer")
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


def read(row: Mapping[str, Any]) -> Conversation:
    """A row in OpenAI's form; the system's text becomes the instruction. Raises Refused."""
    tools = read_tools(row.get("tools"))
    messages = [_check_message(message) for message in list_turns(row)]
    instruction = ""
    if messages[0]["role"] in SYSTEM:
        instruction, messages = _read_text(messages[0]), messages[1:]
    names = {tool.name for tool in tools}
    rounds = tuple(_read_round(part, names) for part in _split_rounds(messages))
    check_turns([each.turn for each in rounds])
    return Conversation(row_id(row), tools, rounds, instruction=instruction)


def read_tools(raw: Any) -> tuple[Tool, ...]:
    """`tools`: a list or its JSON, of objects or their JSON, in {type, function} or bare. Raises Refused."""
    listed = _read_json(raw) if isinstance(raw, str) else raw
    if listed is None:
        return ()
    if not isinstance(listed, list):
        raise Refused(INVALID_TOOLS, f"{str(raw)[:80]!r} is no list")
    return unique_tools([_read_tool(_read_json(item) if isinstance(item, str) else item) for item in listed])


def _read_json(text: str) -> Any:
    try:
        return orjson.loads(text) if text.strip() else None
    except orjson.JSONDecodeError:
        raise Refused(INVALID_TOOLS, f"{text[:80]!r} is no JSON") from None


def _read_tool(item: Any) -> Tool:
    told = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(told, dict) or item.get("type", "function") not in ("function", None):
        raise Refused(INVALID_TOOLS, f"{str(item)[:80]!r} is no function")
    name, description = told.get("name"), told.get("description") or ""
    if not isinstance(name, str) or not isinstance(description, str):
        raise Refused(INVALID_TOOLS, f"{str(item)[:80]!r} has a name or a description that is no text")
    return make_tool(name, description, make_schema(told.get("parameters") or NO_PARAMETERS, name))


def _check_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refused(EMPTY_CONVERSATIONS, "a message that is no object with a role")
    return message


def _read_text(message: Mapping[str, Any]) -> str:
    """Text, or a list of text parts; null is no text."""
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        return ""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    known = [text for text in texts if isinstance(text, str)]
    if len(known) < len(texts):
        raise Refused(EMPTY_CONVERSATIONS, f"content of the {message['role']} that is no text: {str(content)[:80]!r}")
    return "".join(known)


def _split_rounds(messages: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Mapping[str, Any]]]:
    """Each question with what follows it."""
    roles = [message["role"] for message in messages]
    unknown = sorted({role for role in roles if role not in ("user", "assistant", "tool")})
    if unknown or not roles or roles[0] != "user" or roles[-1] != "assistant":
        raise Refused(ROLE_ORDER, enumerated(roles, 8) or "no messages after the system's")
    starts = [index for index, role in enumerate(roles) if role == "user"]
    for start, end in zip(starts, [*starts[1:], len(messages)], strict=True):
        yield messages[start:end]


def _read_round(messages: Sequence[Mapping[str, Any]], names: set[str]) -> Round:
    """A user's message and what the assistant and its tools made of it."""
    asked: list[tuple[Mapping[str, Any], str]] = []  # a function to call, and what was said before it
    results: dict[int, str] = {}
    waiting: dict[Any, int] = {}
    answer: str | None = None
    for message in messages[1:]:
        if message["role"] == "tool":
            results[_take_call(waiting, message)] = _read_text(message)
            continue
        if waiting or answer is not None:
            why = "before the results of its calls" if waiting else "after its answer"
            raise Refused(ROLE_ORDER, f"the assistant goes on {why}")
        said, calls = _read_text(message).strip(), _list_calls(message)
        for number, call in enumerate(calls):
            if call.get("id") in waiting:
                raise Refused(INCOMPLETE_TURN, f"two calls with the id {call.get('id')!r}")
            waiting[call.get("id")] = len(asked)
            asked.append((call["function"], "" if number else said))
        answer = None if calls else said
    made = [_make_call(function, names, results.get(n), lead) for n, (function, lead) in enumerate(asked)]
    return Round(_read_text(messages[0]), Turn(tuple(made), answer or ""))


def _list_calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    calls = message.get("tool_calls") or []
    if message.get("function_call"):
        raise Refused(INCOMPLETE_TURN, "a `function_call`, which came before `tool_calls` and has no id")
    if not isinstance(calls, list):
        raise Refused(INCOMPLETE_TURN, "`tool_calls` is no list")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(call.get("id"), str | None):
            raise Refused(INCOMPLETE_TURN, f"{str(call)[:80]!r} is no call of a function with an id")
    return calls


def _make_call(function: Mapping[str, Any], names: set[str], observation: str | None, lead: str) -> Call:
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or name not in names:
        raise Refused(UNKNOWN_TOOL, f"{str(name)[:80]!r}")
    if isinstance(arguments, str | None):
        arguments = parse_arguments(arguments or "")
    if not isinstance(arguments, dict):
        raise Refused(INVALID_ACTION_INPUT, f"{str(arguments)[:80]!r} is no object")
    return make_call(name, arguments, observation)._replace(lead=lead)


def _take_call(waiting: dict[Any, int], message: Mapping[str, Any]) -> int:
    """The place of the call that a result belongs to; without an id there is but one way when one call waits."""
    identity = message.get("tool_call_id")
    if identity is None and len(waiting) == 1:
        return waiting.popitem()[1]
    if not isinstance(identity, str) or identity not in waiting:
        raise Refused(INCOMPLETE_TURN, f"a result of {identity!r}, which no call before it has as its id")
    return waiting.pop(identity)
