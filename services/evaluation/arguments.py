"""Whether a call's arguments are among the possible ones, by the AST rules of the Berkeley Function Calling Leaderboard.

Source: gorilla, bfcl_eval/eval_checker/ast_eval/ast_checker.py (v4), for Python. Per parameter a list of allowed values, of
which "" says that it may be absent:

- no parameter that is not expected, every required one, and every expected one that may not be absent;
- the type of the schema, or that of an allowed value where the two differ; an int where a float is asked (not inside lists);
- strings without regard to case, blanks and `,./-_*^`, and with ' as "; also in lists and in the values of objects;
- lists with the same elements in the same order; elements of the type of `items`;
- objects with allowed values per key, again with "" for a key that may be absent, also as elements of a list.

Two things differ. True is never 1. And what an expected call itself leaves out or has beyond its schema is not asked: rows that
were not made for BFCL do that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Possible = Mapping[str, Sequence[Any]]
"""Parameter → allowed values."""
ABSENT = ""
_IGNORED = re.compile(r"[ ,./\-_*^]")
# JSON schema's and BFCL's names of types. BFCL's "any" is a string, or what the allowed values are.
TYPES: Mapping[str, type] = {
    "string": str,
    "any": str,
    "integer": int,
    "number": float,
    "float": float,
    "double": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "object": dict,
    "dict": dict,
}


def allow_only(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, list[Any]]:
    """One call's arguments as possible ones. schema: the tool's parameters; those that it does not require may be absent."""
    required = schema.get("required", list(arguments))
    return {name: [_allow(value), *([] if name in required else [ABSENT])] for name, value in arguments.items()}


def find_mismatch(given: Mapping[str, Any], possible: Possible, schema: Mapping[str, Any]) -> str:
    """The first thing that is wrong with a call's arguments, for people; "" when they are right."""
    properties, required = schema.get("properties", {}), schema.get("required", ())
    for name in possible:
        if name not in given and (name in required or ABSENT not in possible[name]):
            return f"{name} is missing"
    for name, value in given.items():
        if name not in possible:
            return f"{name} is not asked for"
        if problem := _find_problem(value, possible[name], properties.get(name, {})):
            return f"{name}: {problem}"
    return ""


def same_value(given: Any, wanted: Any, schema: Mapping[str, Any] | None = None) -> bool:
    """Whether a value is the wanted one. schema: of this value."""
    return not _find_problem(given, [_allow(wanted)], schema or {})


def _allow(value: Any) -> Any:
    """A plain value in BFCL's form, in which an object holds allowed values per key (one level deep)."""
    if isinstance(value, dict):
        return {key: [inner] for key, inner in value.items()}
    if isinstance(value, list):
        return [_allow(item) if isinstance(item, dict) else item for item in value]
    return value


def _find_problem(value: Any, allowed: Sequence[Any], schema: Mapping[str, Any]) -> str:
    wanted = _types(schema)
    candidates = [item for item in allowed if item != ABSENT] or ([] if wanted else list(allowed))
    if float in wanted and type(value) is int:
        value = float(value)
    if wanted and type(value) in wanted:
        if isinstance(value, list) and not _elements_fit(value, candidates, _types(schema.get("items", {}))):
            return f"{value!r:.100} has an element of another type"
    elif type(value) not in {type(item) for item in candidates} and not (
        not wanted and type(value) is int and any(isinstance(item, float) for item in candidates)
    ):
        return f"{value!r:.100} is a {_type_name(value)}"
    return "" if any(_matches(value, item) for item in allowed) else f"{value!r:.100} is none of {candidates!r:.200}"


def _types(schema: Any) -> set[type]:
    told = schema.get("type") if isinstance(schema, dict) else None
    names = told if isinstance(told, list) else [told]
    return {TYPES[name] for name in names if isinstance(name, str) and name in TYPES}


def _elements_fit(value: Sequence[Any], candidates: Sequence[Any], wanted: set[type]) -> bool:
    """Whether every element has a type of `items`, or that of the elements of one of the allowed lists."""
    if not wanted:
        return True
    return any(
        all(type(element) in wanted or type(element) in {type(i) for i in item} for element in value)
        for item in candidates
        if isinstance(item, list)
    )


def _matches(value: Any, item: Any) -> bool:
    if isinstance(value, dict) and isinstance(item, dict):
        return _matches_object(value, item)
    if isinstance(value, list) and isinstance(item, list):
        if len(value) != len(item):
            return False
        return all(
            _matches_object(v, i) if isinstance(v, dict) and isinstance(i, dict) else _equal(v, i)
            for v, i in zip(value, item, strict=True)
        )
    return _equal(value, item)


def _matches_object(value: Mapping[str, Any], item: Mapping[str, Any]) -> bool:
    for key, inner in value.items():
        allowed = item.get(key)
        if not isinstance(allowed, list) or not any(_equal(inner, one) for one in allowed):
            return False
    return all(key in value or ABSENT in allowed for key, allowed in item.items())


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, str) and isinstance(second, str):
        return _fold(first) == _fold(second)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    return bool(first == second)


def _fold(text: str) -> str:
    return _IGNORED.sub("", text).lower().replace("'", '"')


def _type_name(value: Any) -> str:
    return next((name for name, kind in TYPES.items() if type(value) is kind and name != "any"), "null")
