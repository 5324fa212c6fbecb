"""What every reader makes of a row, and every renderer starts from: tools, and rounds of a question and what was done.

Schemas and arguments are JSON text in one line, as AgentFabric prints them: it can be compared, hashed, kept in a cache and
written without being built again, and no number loses digits on the way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from services.common.fabric import FORBIDDEN_IN_NAMES, Call, Round, Tool
from services.conversion.refusals import (
    DUPLICATE_TOOL,
    INVALID_ACTION_INPUT,
    INVALID_PARAMETERS,
    INVALID_TOOL_NAME,
    RESULT_TAG_IN_RESULT,
    Refused,
)


class Conversation(NamedTuple):
    """A row that has been understood."""

    id: str
    """The row's own; "" when it has none."""
    tools: tuple[Tool, ...]
    rounds: tuple[Round, ...]
    system: str | None = None
    """Kept word for word (AgentFabric's own rows, plain chat; "" sends none); None: rendered from the tools."""
    instruction: str = ""
    """The row's own role text, where the prompt is rendered from the tools; "": one of the spec's."""


def make_tool(name: str, description: str, schema: Mapping[str, Any]) -> Tool:
    """A tool out of its schema. Raises Refused: a name that the prompt's lines cannot hold, a schema that is no JSON."""
    if not name or name != name.strip() or FORBIDDEN_IN_NAMES & set(name):
        raise Refused(INVALID_TOOL_NAME, f"{name[:80]!r}")
    return Tool(name, description, _to_json(schema, INVALID_PARAMETERS, f"tool {name!r}"))


def make_call(name: str, arguments: Mapping[str, Any] | str, observation: str | None = None) -> Call:
    """A call out of its arguments, or of what `plain_object` has made of them. Raises Refused."""
    if observation is not None and "</result>" in observation:
        raise Refused(RESULT_TAG_IN_RESULT, f"the result of {name}")
    if isinstance(arguments, str):
        return Call(name, arguments, observation)
    if not all(isinstance(key, str) for key in arguments):
        raise Refused(INVALID_ACTION_INPUT, f"{str(arguments)[:80]} has a key that is no text")
    return Call(name, _to_json(arguments, INVALID_ACTION_INPUT, f"the arguments of {name}"), observation)


def unique_tools(tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """Tools in order, each once. Raises Refused when a name has two definitions."""
    if len({tool.name for tool in tools}) == len(tools):
        return tuple(tools)
    by_name: dict[str, Tool] = {}
    for tool in tools:
        if by_name.setdefault(tool.name, tool) != tool:
            raise Refused(DUPLICATE_TOOL, f"{tool.name!r} is defined twice, differently")
    return tuple(by_name.values())


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def _to_json(value: Mapping[str, Any], code: str, what: str) -> str:
    try:
        text = _encode(value)
        text.encode()  # half a surrogate pair is no text
    except (TypeError, ValueError, RecursionError):
        raise Refused(code, f"{what} cannot be written as JSON") from None
    return text
