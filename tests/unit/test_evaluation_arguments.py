"""BFCL's AST rules on cases worked out by hand; as its own checker decides (docs/evaluation.md names the two exceptions)."""

from __future__ import annotations

from typing import Any

import pytest

from services.evaluation.arguments import allow_only, find_mismatch, same_value

INT, FLOAT, TEXT = {"type": "integer"}, {"type": "number"}, {"type": "string"}
NUMBERS, TEXTS = {"type": "array", "items": FLOAT}, {"type": "array", "items": TEXT}
OBJECT, OBJECTS = {"type": "object"}, {"type": "array", "items": {"type": "object"}}


@pytest.mark.parametrize(
    ("given", "allowed", "schema", "right"),
    [
        (3, [3], INT, True), (4, [3, 4], INT, True), (5, [3, 4], INT, False),
        (3.0, [3], INT, False), ("3", [3], INT, False), (True, [1], INT, False), (1, [True], {"type": "boolean"}, False),
        (3, [3.0], FLOAT, True), (3, [3], FLOAT, True), (3.0, [3], FLOAT, True), (3.5, [3], FLOAT, False),
        ("April 1, 2024", ["april 1 2024"], TEXT, True), ("don't", ['don"t'], TEXT, True), ("a", ["b"], TEXT, False),
        ("", ["x", ""], TEXT, True), (3, ["3"], TEXT, False),
        # A value of a type that the schema does not say, but an allowed value has (BFCL: a variable).
        ("x", ["x"], INT, True), (3, [3], TEXT, True), ("X", ["x"], INT, True),
        ([1.0, 2.5], [[1.0, 2.5]], NUMBERS, True), ([2.5, 1.0], [[1.0, 2.5]], NUMBERS, False),
        ([1, 2], [[1.0, 2.0]], NUMBERS, False), ([1.0, 2.0], [[1, 2]], NUMBERS, True),
        (["New York"], [["new york"], ["NYC"]], TEXTS, True), (["New York", "x"], [["New York"]], TEXTS, False),
        ("New York", [["New York"]], TEXTS, False), ([], [[]], TEXTS, True),
        ({"a": 1}, [{"a": [1, 2]}], OBJECT, True), ({"a": 3}, [{"a": [1, 2]}], OBJECT, False),
        ({"a": "X y"}, [{"a": ["xy"]}], OBJECT, True), ({}, [{"a": [1, ""]}], OBJECT, True),
        ({}, [{"a": [1]}], OBJECT, False), ({"a": 1, "b": 2}, [{"a": [1]}], OBJECT, False),
        ([{"a": 1}, {"a": 2}], [[{"a": [1]}, {"a": [2]}]], OBJECTS, True),
        ([{"a": 2}, {"a": 1}], [[{"a": [1]}, {"a": [2]}]], OBJECTS, False), ([{"a": 1}], [[{"a": [1]}] * 2], OBJECTS, False),
        (None, [None], {}, True), (0, [None], {}, False), (3, [3.0], {}, True), (3.0, [3], {}, False),
        (1, [1], {"type": ["integer", "null"]}, True),
    ],
)  # fmt: skip
def test_values(given: Any, allowed: list[Any], schema: dict[str, Any], right: bool) -> None:
    problem = find_mismatch({"p": given}, {"p": allowed}, {"properties": {"p": schema}, "required": ["p"]})
    assert (problem == "") is right, problem


SCHEMA = {"properties": {"city": TEXT, "days": INT}, "required": ["city"]}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"city": "Rome"}, ""),
        ({"city": "Rome", "days": 3}, ""),
        ({"city": "Rome", "days": 4}, "days: 4 is none of [3]"),
        ({"city": "Rome", "days": "3"}, "days: '3' is a string"),
        ({"days": 3}, "city is missing"),
        ({"city": "Rome", "hours": 1}, "hours is not asked for"),
    ],
)
def test_parameters(given: dict[str, Any], problem: str) -> None:
    assert find_mismatch(given, {"city": ["Rome"], "days": [3, ""]}, SCHEMA) == problem


def test_one_call_allows_its_own_values_and_lets_optional_ones_be_absent() -> None:
    call = {"city": "Rome", "days": 3, "where": {"a": [1], "b": {"c": 2}}, "list": [{"x": 1}]}
    possible = allow_only(call, SCHEMA)
    assert possible["city"] == ["Rome"]
    assert possible["days"] == [3, ""]
    assert find_mismatch(call, possible, SCHEMA) == ""
    assert find_mismatch({**call, "where": {"a": [1], "b": {"c": 3}}}, possible, SCHEMA).startswith("where: ")
    assert find_mismatch({**call, "list": [{"x": 1, "y": 2}]}, possible, SCHEMA).startswith("list: ")


def test_what_an_expected_call_leaves_out_is_not_asked() -> None:
    assert find_mismatch({"days": 3}, allow_only({"days": 3}, SCHEMA), SCHEMA) == ""


def test_a_value_equals_itself_whatever_it_is() -> None:
    for value in (1, 1.5, True, None, "x", "", [], [1, "a", {"b": [1]}], {}, {"a": {"b": None}}):
        assert same_value(value, value)
