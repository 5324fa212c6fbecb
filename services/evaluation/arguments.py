"""Whether a call's arguments are among the possible ones, by the AST rules of the Berkeley Function Calling Leaderboard.

Source: gorilla, bfcl_eval/eval_checker/ast_eval/ast_checker.py (v4), for Python. Per parameter a list of allowed values, of
which "" says that it may be absent:

- no parameter that is not expected, every required one, and every expected one that may not be absent;
- the type of the schema, or that of the first allowed value; an int where a float is asked (not inside lists);
- strings without regard to case, blanks and `,./-_*^`, and with ' as "; also as elements of a list and as values of an object,
  but no deeper, and not where the first allowed value has another type than the schema says: BFCL calls that a variable;
- lists with the same elements in the same order, of the type of `items`; [] also where the list may be absent;
- objects with allowed values per key, again with "" for a key that may be absent, also as elements of a list.

Two things differ. True is never 1. And what an expected call itself leaves out of its schema, has beyond it or has of another
type is right all the same: rows that were not made for BFCL do that.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
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
    if float in wanted and type(value) is int and value.bit_length() < sys.float_info.max_exp:
        value = float(value)
    if wanted and type(value) in wanted:
        if isinstance(value, list) and not _elements_fit(value, allowed, _types(schema.get("items", {}))):
            return f"{_show(value)} has an element of another type"
    elif not _has_type_of(value, candidates[:1] if wanted else candidates, strict=bool(wanted)):
        return f"{_show(value)} is a {_type_name(value)}"
    variable = bool(wanted and candidates) and type(candidates[0]) not in wanted
    if value == [] and ABSENT in allowed and not variable:
        return ""
    same = _equal if variable else _equal_folded
    return (
        "" if any(_matches(value, item, same) for item in allowed) else f"{_show(value)} is none of {candidates!r:.200}"
    )


def _types(schema: Any) -> set[type]:
    told = schema.get("type") if isinstance(schema, dict) else None
    names = told if isinstance(told, list) else [told]
    return {TYPES[name] for name in names if isinstance(name, str) and name in TYPES}


def _has_type_of(value: Any, candidates: Sequence[Any], strict: bool) -> bool:
    """Whether a value has the type of one of the allowed ones. strict: else an int may stand for a float."""
    kinds = {type(item) for item in candidates}
    return type(value) in kinds or (not strict and type(value) is int and float in kinds)


def _elements_fit(value: Sequence[Any], allowed: Sequence[Any], wanted: set[type]) -> bool:
    """Whether every element has a type of `items`, or that of the elements of one of the allowed lists.

    As in BFCL's checker, an allowed value that is no list asks nothing of the elements.
    """
    if not wanted:
        return True
    return any(
        not isinstance(item, list) or all(type(element) in {*wanted, *map(type, item)} for element in value)
        for item in allowed
    )


def _matches(value: Any, item: Any, same: Callable[[Any, Any], bool]) -> bool:
    """same: how strings are compared that are not nested any deeper."""
    if isinstance(value, dict) and isinstance(item, dict):
        return _matches_object(value, item, same)
    if isinstance(value, list) and isinstance(item, list):
        if len(value) != len(item):
            return False
        return all(
            _matches_object(v, i, same) if isinstance(v, dict) and isinstance(i, dict) else same(v, i)
            for v, i in zip(value, item, strict=True)
        )
    return same(value, item)


def _matches_object(value: Mapping[str, Any], item: Mapping[str, Any], same: Callable[[Any, Any], bool]) -> bool:
    for key, inner in value.items():
        allowed = item.get(key)
        if not isinstance(allowed, list) or not any(same(inner, one) for one in allowed):
            return False
    return all(key in value or ABSENT in allowed for key, allowed in item.items())


def _equal_folded(first: Any, second: Any) -> bool:
    if isinstance(first, str) and isinstance(second, str):
        return _fold(first) == _fold(second)
    return _equal(first, second)


def _equal(first: Any, second: Any) -> bool:
    """Equality as JSON has it, where true is not 1."""
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    return bool(first == second)


def _fold(text: str) -> str:
    return _IGNORED.sub("", text).lower().replace("'", '"')


def _show(value: Any) -> str:
    try:
        return f"{value!r:.100}"
    except RecursionError:  # JSON of some hundred lists in each other is read and cannot be printed
        return "a value nested too deeply"


def _type_name(value: Any) -> str:
    return next((name for name, kind in TYPES.items() if type(value) is kind and name != "any"), "null")
