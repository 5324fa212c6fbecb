"""The grammar that an answer with tools is held to: xgrammar's structural tags, as a plain value.

Source: xgrammar 0.2.8, structural_tag.py (triggered_tags, json_schema).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ANY_OBJECT: Mapping[str, Any] = {"type": "object", "additionalProperties": True}


def render_grammar(tools: Sequence[Mapping[str, Any]], only: str, forced: bool, several: bool) -> dict[str, Any]:
    """A structural tag: free text, and calls that are right.

    tools: OpenAI functions (name, parameters, strict: false takes any object). only: the one that may be called, "" for all.
    forced: the answer is a call, from its first character on. several: more may follow; else the call ends the answer.
    """
    tags = [
        {
            "type": "tag",
            "begin": f"Action: {tool['name']}\nAction Input: ",
            # Without a limit a weak model writes blanks for ever.
            "content": {"type": "json_schema", "json_schema": _schema(tool), "max_whitespace_cnt": 1},
            "end": "\n",
        }
        for tool in tools
        if not only or tool["name"] == only
    ]
    return {
        "type": "structural_tag",
        "format": {
            "type": "triggered_tags",
            "triggers": ["Action:"],
            "tags": tags,
            "at_least_one": forced,
            "stop_after_first": not several,
        },
    }


def _schema(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of an object, whatever the client's combines at its top.

    xgrammar 0.2.8 lets allOf, anyOf and oneOf stand for the whole schema, so that other values than objects could be written:
    their parts are merged into it here. A part that is but a $ref adds nothing.
    """
    if tool.get("strict") is False:
        return ANY_OBJECT
    schema = {"type": "object", **(tool.get("parameters") or {})}
    for part in schema.pop("allOf", ()):
        schema = _merge(schema, part)
    one, other = schema.pop("anyOf", None), schema.pop("oneOf", None)
    if not (choices := one or other):
        return schema
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return {**shared, "anyOf": [_merge(schema, choice) for choice in choices]}


def _merge(schema: Mapping[str, Any], part: Any) -> dict[str, Any]:
    told = part if isinstance(part, dict) else {}
    properties = {**schema.get("properties", {}), **told.get("properties", {})}
    required = [*schema.get("required", ()), *told.get("required", ())]
    merged = {**schema, "required": list(dict.fromkeys(required))}
    return {**merged, "properties": properties} if properties else merged
