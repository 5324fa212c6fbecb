"""BFCL's AST rules. docs/evaluation.md tells how all of BFCL's calls were compared, and what differs on purpose."""

from __future__ import annotations

from typing import Any

import pytest

from services.evaluation.arguments import allow_only, find_mismatch, same_value

INT, FLOAT, TEXT = {"type": "integer"}, {"type": "number"}, {"type": "string"}
NUMBERS, TEXTS = {"type": "array", "items": FLOAT}, {"type": "array", "items": TEXT}
OBJECT, OBJECTS = {"type": "object"}, {"type": "array", "items": {"type": "object"}}
LISTS = {"type": "array", "items": {"type": "array"}}


@pytest.mark.parametrize(
    ("given", "allowed", "schema", "right"),
    # Verdicts of simple_function_checker, bfcl-eval 2026.3.23, for one required parameter.
    [
        (3, [3], INT, True), (4, [3, 4], INT, True), (5, [3, 4], INT, False),
        (3.0, [3], INT, False), ("3", [3], INT, False), (True, [1], INT, False), (1, [True], {"type": "boolean"}, False),
        (3, [3.0], FLOAT, True), (3, [3], FLOAT, True), (3.0, [3], FLOAT, True), (3.5, [3], FLOAT, False),
        ("April 1, 2024", ["april 1 2024"], TEXT, True), ("don't", ['don"t'], TEXT, True), ("a", ["b"], TEXT, False),
        ("", ["x", ""], TEXT, True), (3, ["3"], TEXT, False),
        # A value of a type that the schema does not say, but an allowed value has (BFCL: a variable).
        ("x", ["x"], INT, True), (3, [3], TEXT, True),
        # Such values are compared as they are, and only the first one has a say.
        ("X", ["x"], INT, False), ("x ", ["x", ""], INT, False), (["X"], [["x"]], TEXT, False), ([], ["x", ""], TEXTS, False),
        (5, [5, "five"], INT, True), ("five", [5, "five"], INT, False), ("five", ["", "five", 5], INT, True),
        ("five", [5, "five"], TEXT, True), ("Five", [5, "five"], TEXT, False), (3, [3.0], INT, True), (3.0, [3.0], INT, True),
        ([1.0, 2.5], [[1.0, 2.5]], NUMBERS, True), ([2.5, 1.0], [[1.0, 2.5]], NUMBERS, False),
        ([1, 2], [[1.0, 2.0]], NUMBERS, False), ([1.0, 2.0], [[1, 2]], NUMBERS, True),
        (["New York"], [["new york"], ["NYC"]], TEXTS, True), (["New York", "x"], [["New York"]], TEXTS, False),
        ("New York", [["New York"]], TEXTS, False), ([], [[]], TEXTS, True),
        # A list that may be absent may be empty; one that may not, not.
        ([], [["x"], ""], TEXTS, True), ([], [""], TEXTS, True), ([], [["x"]], TEXTS, False),
        ([], [[{"a": [1]}], ""], OBJECTS, True), ([], [[{"a": [1]}]], OBJECTS, False),
        ([1, 2], [[1.0, 2.0], ""], NUMBERS, True), (["1", 2], [[1, 2]], NUMBERS, False),
        # Case and punctuation count below the first level.
        ([["x"]], [[["x"]]], LISTS, True), ([["X"]], [[["x"]]], LISTS, False), ([["a b"]], [[["ab"]]], LISTS, False),
        ({"a": ["x"]}, [{"a": [["x"]]}], OBJECT, True), ({"a": ["X"]}, [{"a": [["x"]]}], OBJECT, False),
        ({"a": {"b": "x"}}, [{"a": [{"b": "x"}]}], OBJECT, True), ({"a": {"b": "X"}}, [{"a": [{"b": "x"}]}], OBJECT, False),
        ([{"a": "X."}], [[{"a": ["x"]}]], OBJECTS, True), ([{"a": ["X"]}], [[{"a": [["x"]]}]], OBJECTS, False),
        ({"a": 1}, [{"a": [1, 2]}], OBJECT, True), ({"a": 3}, [{"a": [1, 2]}], OBJECT, False),
        ({"a": "X y"}, [{"a": ["xy"]}], OBJECT, True), ({}, [{"a": [1, ""]}], OBJECT, True),
        ({}, [{"a": [1]}], OBJECT, False), ({"a": 1, "b": 2}, [{"a": [1]}], OBJECT, False),
        ([{"a": 1}, {"a": 2}], [[{"a": [1]}, {"a": [2]}]], OBJECTS, True),
        ([{"a": 2}, {"a": 1}], [[{"a": [1]}, {"a": [2]}]], OBJECTS, False), ([{"a": 1}], [[{"a": [1]}] * 2], OBJECTS, False),
    ],
)  # fmt: skip
def test_values_are_judged_as_by_bfcls_own_checker(
    given: Any, allowed: list[Any], schema: dict[str, Any], right: bool
) -> None:
    assert (find_problem(given, allowed, schema) == "") is right


@pytest.mark.parametrize(
    ("given", "allowed", "schema", "right"),
    [
        # Types that BFCL does not have.
        (None, [None], {}, True), (0, [None], {}, False), (3, [3.0], {}, True), (3.0, [3], {}, False),
        (1, [1], {"type": ["integer", "null"]}, True),
        # BFCL's checker takes 1 for true where it compares with "in".
        (1, [True], INT, False), ({"a": 1}, [{"a": [True]}], OBJECT, False), ([{"a": [0]}], [[{"a": [[False]]}]], OBJECTS, False),
        # An expected call that breaks its own schema; BFCL's checker calls even the same value wrong.
        ({"a": 1}, [{"a": [1]}], TEXT, True), ([1, "x"], [[1, "x"]], {"type": "array", "items": INT}, True),
        # Its checker ends with OverflowError.
        (10**400, [1.5], FLOAT, False), (10**400, [10**400], FLOAT, True),
    ],
)  # fmt: skip
def test_values_where_bfcls_own_checker_differs_or_has_no_say(
    given: Any, allowed: list[Any], schema: dict[str, Any], right: bool
) -> None:
    assert (find_problem(given, allowed, schema) == "") is right


def find_problem(given: Any, allowed: list[Any], schema: dict[str, Any]) -> str:
    return find_mismatch({"p": given}, {"p": allowed}, {"properties": {"p": schema}, "required": ["p"]})


def test_a_value_that_is_nested_too_deeply_to_be_printed_is_wrong() -> None:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    assert find_problem(value, ["x"], TEXT) == "p: a value nested too deeply is a array"


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
