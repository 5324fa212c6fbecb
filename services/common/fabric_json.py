"""AgentFabric's prompt as JSON text: what tools and templates have in it is escaped once, not with every row.

A training row's messages begin with the system prompt and the user's prefix. Both name the tools and nothing else of the row,
so `begin_messages` makes them of pieces, and what follows can have been written before the tools were known.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import orjson

from services.common.fabric import Tool, cut_prefix, cut_system, remember_tools, render_tool

BEGIN_USER = b'{"role":"user","content":"'
_BEGIN_SYSTEM = b'[{"role":"system","content":"'


class ToolJson(NamedTuple):
    """A tool in JSON."""

    name: bytes
    """As it stands within a string."""
    line: bytes
    """The line that describes it, as it stands within a string."""
    function: bytes
    """It as an OpenAI function object."""


@remember_tools
def tool_json(tool: Tool) -> ToolJson:
    """A tool in all the forms that rows hold it in."""
    parameters = orjson.Fragment(tool.parameters)  # as it is: no number loses digits
    told = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return ToolJson(escape(tool.name), escape(render_tool(tool)), orjson.dumps({"type": "function", "function": told}))


def list_functions(tools: Sequence[Tool]) -> bytes:
    """Tools as OpenAI function objects: what stands between the brackets of a JSON list."""
    return b",".join([tool_json(tool).function for tool in tools])


def render_system_json(tools: Sequence[Tool], role: str, language: str, wording: str = "0.7.1") -> orjson.Fragment:
    """`fabric.render_system` as JSON."""
    head, middle, rest, end = _cut_system_json(language, wording)
    pieces = [tool_json(tool) for tool in tools]
    descs, names = rb"\n\n".join([p.line for p in pieces]), b",".join([p.name for p in pieces])
    return orjson.Fragment(b"".join((b'"', head, descs, middle, names, rest, escape(role), end, b'"')))


def begin_messages(tools: Sequence[ToolJson], role: str, language: str, wording: str) -> bytes:
    """The messages of a training row up to the question in its user's turn: "[", the system prompt, the prefix."""
    begin, middle, rest, end = _cut_begin(role, language, wording)
    names = b",".join([name for name, _, _ in tools])
    return b"".join((begin, rb"\n\n".join([line for _, line, _ in tools]), middle, names, rest, names, end))


def escape(text: str) -> bytes:
    """A text as it stands within a JSON string."""
    return orjson.dumps(text)[1:-1]


@cache
def _cut_system_json(language: str, wording: str) -> list[bytes]:
    return [escape(text) for text in cut_system(language, wording)]


@lru_cache(maxsize=256)
def _cut_begin(role: str, language: str, wording: str) -> tuple[bytes, bytes, bytes, bytes]:
    """What stands before the tools' lines, their names, their names once more, and the question."""
    head, middle, rest, end = _cut_system_json(language, wording)
    before, after = map(escape, cut_prefix(language))
    return _BEGIN_SYSTEM + head, middle, b"".join((rest, escape(role), end, b'"},', BEGIN_USER, before)), after
