"""What a tool's JSON schema must be, checked before an engine sees it, so that all that is wrong is named at once.

Only the shape of the keywords that say what arguments look like; what a schema means is the grammar compiler's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from services.common.errors import Violation

TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
DEEPEST = 64
"""Levels; vLLM refuses much deeper ones too."""


def _is_type(value: Any) -> bool:
    listed = value if isinstance(value, list) else [value]
    return bool(listed) and all(isinstance(each, str) and each in TYPES for each in listed)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_is_type, f"must be one of {', '.join(TYPES)}, or a list of them"),
    "description": (lambda value: isinstance(value, str), "must be text"),
    "properties": (lambda value: isinstance(value, dict), "must be an object of schemas"),
    "required": (_is_texts, "must be a list of names"),
    "enum": (lambda value: isinstance(value, list) and bool(value), "must be a list with one value or more"),
    "items": (lambda value: _is_schema(value) or isinstance(value, list), "must be a schema"),
    "additionalProperties": (_is_schema, "must be true, false or a schema"),
    "anyOf": (lambda value: isinstance(value, list) and bool(value), "must be a list of schemas"),
    "oneOf": (lambda value: isinstance(value, list) and bool(value), "must be a list of schemas"),
    "allOf": (lambda value: isinstance(value, list) and bool(value), "must be a list of schemas"),
    "$defs": (lambda value: isinstance(value, dict), "must be an object of schemas"),
    "definitions": (lambda value: isinstance(value, dict), "must be an object of schemas"),
    "$ref": (lambda value: isinstance(value, str) and value.startswith("#"), "must point into this schema (#/…)"),
    "pattern": (lambda value: isinstance(value, str), "must be text"),
    "format": (lambda value: isinstance(value, str), "must be text"),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), (_is_count, "must be a number from 0 on")),
    **dict.fromkeys(("minimum", "maximum", "multipleOf"), (_is_number, "must be a number")),
}
"""Keyword → whether its value is well-formed, and what it must be."""

NAMED = ("properties", "$defs", "definitions", "patternProperties")
LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLE = ("items", "additionalProperties", "not")


def check_schema(schema: Any, field: str, root: Any = None, depth: int = 0) -> Iterator[Violation]:
    """All that is malformed in a schema. field: the path to it, for the violations; root: the whole, where $ref points."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        yield Violation(field, f"must be a JSON schema, not {str(schema)[:60]!r}")
        return
    if depth > DEEPEST:
        yield Violation(field, f"is nested deeper than {DEEPEST} levels")
        return
    for keyword, (fits, must) in RULES.items():
        if keyword in schema and not fits(schema[keyword]):
            yield Violation(f"{field}.{keyword}", f"{must}, not {str(schema[keyword])[:60]!r}")
    if _points_nowhere(schema.get("$ref"), root):
        yield Violation(f"{field}.$ref", f"{str(schema['$ref'])[:60]!r} points at nothing in this schema")
    for keyword in NAMED:
        if isinstance(named := schema.get(keyword), dict):
            for name, value in named.items():
                yield from check_schema(value, f"{field}.{keyword}.{name}", root, depth + 1)
    for keyword in (*LISTED, *SINGLE):
        value = schema.get(keyword)
        if isinstance(value, list):
            for number, each in enumerate(value):
                yield from check_schema(each, f"{field}.{keyword}[{number}]", root, depth + 1)
        elif keyword in SINGLE and isinstance(value, dict):
            yield from check_schema(value, f"{field}.{keyword}", root, depth + 1)


def _points_nowhere(reference: Any, root: Any) -> bool:
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return False
    found = root
    for step in reference[2:].split("/"):
        found = found.get(step) if isinstance(found, dict) else None
    return found is None
