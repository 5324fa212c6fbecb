"""A chat request with `tools` becomes AgentFabric's prompt, as conversion trains it: the chat template of tools.

The messages leave here rendered, with calls and results where RolePlay puts them; the model's own template only wraps the
turns, as it does for a request without tools. The tools go along for the engine's `tool_parser`, which constrains the answer and
reads the calls out of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from services.common.errors import InvalidSpec, Violation
from services.common.fabric import (
    FORBIDDEN_IN_NAMES,
    ROLES,
    Call,
    Round,
    Tool,
    Turn,
    language_of,
    render_request,
    render_system,
)
from services.common.tool_schemas import BadSchema, make_schema
from services.inference.tool_schema import check_schema

STOP = "Observation:"
"""Where RolePlay stops an answer: what follows is the tool's to say."""
CONSTRAIN = "constrain_tools"
"""Our own field of a request: false lets the model write calls freely. The engine is told in `vllm_xargs`."""
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}
CHOICES = ("none", "auto", "required")
NO_CALL = {"type": "structural_tag", "format": {"type": "any_text", "excludes": ["Action:"]}}
"""A grammar of text that is no call. Source: xgrammar 0.2.8, structural_tag.py."""


def render_tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """The request for the engine out of an OpenAI chat request with `tools`. Raises InvalidSpec naming all that is wrong."""
    bad: list[Violation] = []
    tools = _read_tools(body["tools"], bad)
    names = [tool.name for tool in tools]
    choice = _read_choice(body.get("tool_choice"), names, bad)
    _check_switches(body, bad)
    instruction, rounds = _read_messages(body.get("messages"), bad)
    if bad:
        raise InvalidSpec("the request's tools cannot be used", violations=bad)
    language = language_of(rounds[-1].query)
    system = render_system(tools, instruction or ROLES[language], language)
    stop = body.get("stop") or []
    sent = {
        **body,
        "messages": render_request(system, tools, rounds, language),
        "tools": [_engine_tool(tool) for tool in body["tools"]],
        "tool_choice": choice,
        "stop": [*([stop] if isinstance(stop, str) else stop), STOP],
        # Rendered already: the model's own template is not to print them a second time.
        "chat_template_kwargs": {**(body.get("chat_template_kwargs") or {}), "tools": []},
    }
    constrained = sent.pop(CONSTRAIN, None)
    if constrained is not None:
        sent["vllm_xargs"] = {**(body.get("vllm_xargs") or {}), CONSTRAIN: int(constrained)}
    if choice == "none" and constrained is not False and not _asks_for_format(body):
        sent["structured_outputs"] = {"structural_tag": json.dumps(NO_CALL)}
    return sent


def _asks_for_format(body: Mapping[str, Any]) -> bool:
    """Whether the answer's words have a grammar already."""
    format_ = body.get("response_format")
    return bool(body.get("structured_outputs")) or (format_ is not None and format_ != {"type": "text"})


def _read_tools(told: Any, bad: list[Violation]) -> list[Tool]:
    if not isinstance(told, list):
        bad.append(Violation("tools", "must be a list of {type: function, function: {name, description, parameters}}"))
        return []
    tools: list[Tool] = []
    for number, item in enumerate(told):
        field = f"tools[{number}]"
        function = item.get("function") if isinstance(item, dict) else None
        if not isinstance(function, dict) or item.get("type", "function") != "function":
            bad.append(Violation(field, "must be {type: function, function: {name, description, parameters}}"))
            continue
        name = function.get("name")
        if problem := _name_problem(name, [tool.name for tool in tools]):
            bad.append(Violation(f"{field}.function.name", problem))
        if not isinstance(function.get("description"), str | None):
            bad.append(Violation(f"{field}.function.description", "must be text"))
        if not isinstance(function.get("strict"), bool | None):
            bad.append(Violation(f"{field}.function.strict", "must be true or false"))
        parameters = _read_parameters(function.get("parameters"), f"{field}.function.parameters", name, bad)
        tools.append(Tool(str(name), str(function.get("description") or ""), parameters))
    return tools


def _name_problem(name: Any, taken: Sequence[str]) -> str:
    if not isinstance(name, str) or not name.strip():
        return "must be text that is not empty"
    if FORBIDDEN_IN_NAMES & set(name):
        return f"{name[:60]!r} has a line break; the prompt names a tool in one line"
    if name != name.strip():
        return f"{name[:60]!r} has blanks at its ends; take them away"
    if name in taken:
        return f"{name[:60]!r} is defined twice; give one of them another name"
    return ""


def _read_parameters(told: Any, field: str, name: Any, bad: list[Violation]) -> str:
    """The schema as the prompt prints it; "" when something is wrong with it."""
    schema = NO_PARAMETERS if told is None or told == {} else told
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        bad.append(Violation(field, f"must be a JSON schema of an object, not {str(told)[:60]!r}"))
        return ""
    if problems := list(check_schema(schema, field)):
        bad.extend(problems)
        return ""
    try:
        return json.dumps(make_schema(schema, str(name)), ensure_ascii=False)
    except BadSchema as error:
        bad.append(Violation(field, str(error)))
        return ""


def _engine_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """As the client wrote it: the arguments must fit its own schema, not the one that the prompt prints."""
    function = tool["function"]
    return {"type": "function", "function": {**function, "parameters": function.get("parameters") or NO_PARAMETERS}}


def _read_choice(told: Any, names: Sequence[str], bad: list[Violation]) -> Any:
    if told is None:
        return "auto"
    if isinstance(told, str) and told in CHOICES:
        return told
    function = told.get("function") if isinstance(told, dict) and told.get("type") == "function" else None
    if not isinstance(function, dict):
        must = f"must be one of {', '.join(CHOICES)}, or {{type: function, function: {{name}}}}"
        bad.append(Violation("tool_choice", f"{must}, not {str(told)[:60]!r}"))
    elif function.get("name") not in names:
        known = ", ".join(names)
        bad.append(Violation("tool_choice.function.name", f"{str(function.get('name'))[:60]!r} is none of: {known}"))
    return told


def _check_switches(body: Mapping[str, Any], bad: list[Violation]) -> None:
    for switch in (CONSTRAIN, "parallel_tool_calls"):
        if not isinstance(body.get(switch), bool | None):
            bad.append(Violation(switch, f"must be true or false, not {str(body[switch])[:60]!r}"))
    stop = body.get("stop") or []
    if not isinstance(stop, str) and not (isinstance(stop, list) and all(isinstance(word, str) for word in stop)):
        bad.append(Violation("stop", "must be text or a list of texts"))
    for field in ("chat_template_kwargs", "vllm_xargs"):
        if not isinstance(body.get(field), dict | None):
            bad.append(Violation(field, "must be an object"))


def _read_messages(told: Any, bad: list[Violation]) -> tuple[str, list[Round]]:
    """(the system's text, the rounds). All system messages are one instruction, wherever they stand."""
    if not isinstance(told, list) or not told:
        bad.append(Violation("messages", "must be a list with one message or more"))
        return "", []
    instructions: list[str] = []
    rounds: list[_Round] = []
    for number, message in enumerate(told):
        field = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("system", "developer"):
            instructions.append(_read_text(message, field, bad))
        elif role == "user":
            rounds.append(_Round(_read_text(message, field, bad)))
        elif role not in ("assistant", "tool"):
            bad.append(Violation(f"{field}.role", f"must be system, user, assistant or tool, not {str(role)[:60]!r}"))
        elif not rounds:
            bad.append(Violation(field, f"is the {role}'s, before any of the user's"))
        elif role == "tool":
            rounds[-1].add_result(message, _read_text(message, field, bad), field, bad)
        else:
            rounds[-1].add_turn(message, _read_text(message, field, bad), field, bad)
    if not rounds:
        bad.append(Violation("messages", "have none of the user's"))
    return "\n\n".join(filter(None, instructions)), [each.close(bad) for each in rounds]


class _Round:
    """A question and what has been done about it so far."""

    def __init__(self, query: str) -> None:
        self._query = query
        self._calls: list[Call] = []
        self._waiting: dict[str, tuple[int, str]] = {}
        """Id of a call without a result → (its place, the field that made it)."""
        self._said = ""

    def add_turn(self, message: Mapping[str, Any], text: str, field: str, bad: list[Violation]) -> None:
        """What the assistant said, and the calls that it made."""
        said = "\n".join(filter(None, (self._said, text.strip())))
        calls = list(_read_calls(message, field, bad))
        for number, (identity, call) in enumerate(calls):
            if identity in self._waiting:
                bad.append(
                    Violation(f"{field}.tool_calls[{number}].id", f"{identity[:60]!r} is the id of another call")
                )
            self._waiting[identity] = len(self._calls), f"{field}.tool_calls[{number}]"
            self._calls.append(call._replace(lead="" if number else said))
        self._said = "" if calls else said

    def add_result(self, message: Mapping[str, Any], text: str, field: str, bad: list[Violation]) -> None:
        """A tool's result; without an id it is that of the only call that waits for one."""
        identity = message.get("tool_call_id")
        if identity is None and len(self._waiting) == 1:
            identity = next(iter(self._waiting))
        if not isinstance(identity, str) or identity not in self._waiting:
            told = str(identity)[:60]
            bad.append(Violation(f"{field}.tool_call_id", f"{told!r} is not the id of a call that waits for a result"))
            return
        place, _ = self._waiting.pop(identity)
        self._calls[place] = self._calls[place]._replace(observation=text)

    def close(self, bad: list[Violation]) -> Round:
        """The round as it is rendered."""
        for identity, (_, field) in self._waiting.items():
            bad.append(
                Violation(field, f"has no result: a message of the role tool with tool_call_id {identity[:60]!r}")
            )
        return Round(self._query, Turn(tuple(self._calls), self._said))


def _read_calls(message: Mapping[str, Any], field: str, bad: list[Violation]) -> Iterator[tuple[str, Call]]:
    if message.get("function_call"):
        bad.append(Violation(f"{field}.function_call", "came before tool_calls and has no id; use tool_calls"))
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        bad.append(Violation(f"{field}.tool_calls", "must be a list"))
        return
    for number, call in enumerate(calls):
        place = f"{field}.tool_calls[{number}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(call.get("id"), str):
            bad.append(Violation(place, "must be {id, type: function, function: {name, arguments}}"))
            continue
        name, arguments = function.get("name"), _read_arguments(function.get("arguments"))
        if not isinstance(name, str) or not name.strip() or FORBIDDEN_IN_NAMES & set(name):
            bad.append(Violation(f"{place}.function.name", f"{str(name)[:60]!r} is no tool's name"))
        if arguments is None:
            bad.append(Violation(f"{place}.function.arguments", "must be the JSON text of an object"))
        yield call["id"], Call(str(name), arguments or "{}")


def _read_arguments(told: Any) -> str | None:
    """One line of JSON, as rows have it; None when it is no object."""
    try:
        value = json.loads(told) if isinstance(told, str) and told.strip() else told or {}
    except (ValueError, RecursionError):
        return None
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else None


def _read_text(message: Mapping[str, Any], field: str, bad: list[Violation]) -> str:
    """Text, or a list of text parts; null is no text."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content if content is not None else ""]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    known = [text for text in texts if isinstance(text, str)]
    if len(known) < len(texts):
        bad.append(Violation(f"{field}.content", "must be text, or a list of {type: text, text}"))
    return "".join(known)
