"""A chat request with `tools` becomes AgentFabric's prompt, as conversion trains it: the chat template of tools.

The messages leave here rendered, with calls and results where RolePlay puts them; the model's own template only wraps the
turns, as it does for a request without tools. The tools go along for the engine's `tool_parser`, which constrains the answer and
reads the calls out of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from typing import Any

from services.common.errors import InvalidSpec, Violation
from services.common.fabric import (
    FORBIDDEN_IN_NAMES,
    ROLES,
    Tool,
    language_of,
    render_request,
    render_system,
)
from services.common.tool_schemas import BadSchema, make_schema
from services.inference.tool_messages import read_messages
from services.inference.tool_schema import check_schema

STOP = "\nObservation:"
"""Where RolePlay stops an answer: what follows is the tool's to say. At the beginning of a line only, for vLLM looks for it in
arguments too, where a JSON string has no bare line break; RolePlay's own "Observation:" would end such a call in its midst."""
CONSTRAIN = "constrain_tools"
"""Our own field of a request: false lets the model write calls freely. The engine is told in `vllm_xargs`."""
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}
CHOICES = ("none", "auto", "required")
MOST_TOOLS = 1024
"""Of a request, which is rendered between the answers of all others; no prompt holds so many."""
NO_CALL = {"type": "structural_tag", "format": {"type": "any_text", "excludes": ["Action:"]}}
"""A grammar of text that is no call. Source: xgrammar 0.2.8, structural_tag.py."""


def render_tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """The request for the engine out of an OpenAI chat request with `tools`. Raises InvalidSpec naming all that is wrong."""
    try:
        return _render_tools(body)
    except RecursionError:
        raise InvalidSpec("the request's tools or messages are nested too deeply") from None


def _render_tools(body: Mapping[str, Any]) -> dict[str, Any]:
    bad: list[Violation] = []
    tools = _read_tools(body["tools"], bad)
    names = [tool.name for tool in tools]
    choice = _read_choice(body.get("tool_choice"), names, bad)
    _check_switches(body, bad)
    instruction, rounds = read_messages(body.get("messages"), bad)
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
    if len(told) > MOST_TOOLS:
        bad.append(Violation("tools", f"are {len(told)}; a request may have {MOST_TOOLS} at most"))
        return []
    tools: list[Tool] = []
    taken: set[str] = set()
    for number, item in enumerate(told):
        field = f"tools[{number}]"
        function = item.get("function") if isinstance(item, dict) else None
        if not isinstance(function, dict) or item.get("type", "function") != "function":
            bad.append(Violation(field, "must be {type: function, function: {name, description, parameters}}"))
            continue
        name = function.get("name")
        if problem := _name_problem(name, taken):
            bad.append(Violation(f"{field}.function.name", problem))
        if not isinstance(function.get("description"), str | None):
            bad.append(Violation(f"{field}.function.description", "must be text"))
        if not isinstance(function.get("strict"), bool | None):
            bad.append(Violation(f"{field}.function.strict", "must be true or false"))
        parameters = _read_parameters(function.get("parameters"), f"{field}.function.parameters", name, bad)
        taken.add(str(name))
        tools.append(Tool(str(name), str(function.get("description") or ""), parameters))
    return tools


def _name_problem(name: Any, taken: Set[str]) -> str:
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
    elif names and function.get("name") not in names:
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
