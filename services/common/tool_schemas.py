"""Parameters in the forms that rows hold become the JSON schema of an object that AgentFabric prints.

Every property has a type and a description, first and in this order: RolePlay does not start with a tool that lacks one.
A type that is not written is that of what the property refers to or of its branches, else "string" (formats of ms_agent rows).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ELSEWHERE = ("$ref", "anyOf", "oneOf", "allOf")
"""Where a property's type may stand instead."""
MAX_STEPS, MOST_BRANCHES = 4, 8
"""So far are references and branches followed: they may go in circles."""


class BadSchema(ValueError):
    """Parameters that no schema can be made of; the text says what was found, and where."""


def make_schema(raw: Any, name: str) -> dict[str, Any]:
    """{"type": "object", "properties", "required", …} out of a list of {name, description, required} or a JSON schema.

    name: the tool's, for the error. Raises BadSchema.
    """
    if isinstance(raw, dict):
        return _complete_schema(raw, name)
    if not isinstance(raw, list):
        raise BadSchema(f"tool {name!r}: neither a list nor an object")
    properties: dict[str, Any] = {}
    required: list[str] = []
    for item in raw:
        told = item.get("name") if isinstance(item, dict) else None
        if not isinstance(told, str) or not told or told in properties:
            raise BadSchema(f"tool {name!r}: {str(item)[:80]} is no parameter with a name of its own")
        properties[told] = _make_property(item, name)
        if str(item.get("required")).strip().lower() == "true":
            required.append(told)
    return {"type": "object", "properties": properties, "required": required}


def _complete_schema(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    properties = raw.get("properties", {} if raw.get("type") == "object" else None)
    required = raw.get("required") or []
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise BadSchema(f"tool {name!r}: an object that is no JSON schema of an object")
    types = _Types(raw)
    typed = {key: _with_type(value, name, types) for key, value in properties.items()}
    named = {key for key in required if isinstance(key, str)}
    known = [key for key in typed if key in named]
    rest = {key: value for key, value in raw.items() if key not in ("type", "properties", "required")}
    return {"type": "object", "properties": typed, "required": known, **rest}


def _make_property(item: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`schema` stands for what it holds; a `required` that is a list is the property's own, of what is nested in it."""
    schema = item.get("schema")
    nested = isinstance(item.get("required"), list) and isinstance(item.get("properties"), dict)
    rest = {k: v for k, v in item.items() if k not in ("name", "schema") and (k != "required" or nested)}
    return _with_type({**rest, **schema} if isinstance(schema, dict) else rest, name, _Types())


def _with_type(value: Any, name: str, types: _Types) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadSchema(f"tool {name!r}: a property that is no object")
    rest = {key: each for key, each in value.items() if key not in ("type", "description")}
    told = value.get("type") or types.find(value) or "string"
    return {"type": told, "description": value.get("description") or "", **rest}


class _Types:
    """The types of a schema's parts. Many properties may refer to one part, and each part to many: each is looked at once."""

    def __init__(self, root: Mapping[str, Any] | None = None) -> None:
        self._root = root
        """The whole schema, in which a $ref is looked up."""
        self._known: dict[tuple[int, int], list[str]] = {}
        """(id of a part, steps left) → its types."""

    def find(self, value: Mapping[str, Any]) -> str | list[str]:
        """The type of what a property refers to, or the types of its branches, each once; none: []."""
        if value.keys().isdisjoint(ELSEWHERE):
            return []
        types = list(dict.fromkeys(self._of(value, MAX_STEPS)))
        return types[0] if len(types) == 1 else types

    def _of(self, value: Any, steps: int) -> list[str]:
        """The types that a schema allows, as far as it says so: by itself, by what it refers to, or by its branches."""
        if not isinstance(value, Mapping) or not steps:
            return []
        place = id(value), steps
        if place not in self._known:
            self._known[place] = self._look_at(value, steps)
        return self._known[place]

    def _look_at(self, value: Mapping[str, Any], steps: int) -> list[str]:
        own = value.get("type")
        listed = own if isinstance(own, list) else [own]
        if told := [each for each in listed if isinstance(each, str)]:
            return told
        if referred := self._of(_resolve(value.get("$ref"), self._root), steps - 1):
            return referred
        for key in ELSEWHERE[1:]:
            branches = value.get(key)
            listed = branches[:MOST_BRANCHES] if isinstance(branches, list) else []
            if told := [each for branch in listed for each in self._of(branch, steps - 1)]:
                return told
        return []


def _resolve(reference: Any, root: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What "#/$defs/NAME" points at in the whole schema; None where it points at no schema."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found: Any = root
    for step in reference[2:].split("/"):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None
