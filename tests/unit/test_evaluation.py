"""Scores worked out by hand, and the report they make."""

from __future__ import annotations

import math
from typing import Any

import pytest

from services.common.errors import GateNotMet
from services.evaluation.ask import Answer, Question
from services.evaluation.gate import check_gate, raise_if_not_met
from services.evaluation.metrics import (
    Proportion,
    paired_difference,
    parse_arguments,
    same_value,
    score_answer,
    summarize,
)
from services.evaluation.report import Column, render_html, render_json

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "share": {"type": "number"}},
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("weather", "tides")]
WANTED = [{"name": "weather", "arguments": {"city": "New York", "days": 3}}]


def marks(text: str, expected: list[dict[str, Any]] = WANTED, finish: str = "stop") -> dict[str, bool | None]:
    return dict(score_answer("r", text, finish, TOOLS, expected).marks)


@pytest.mark.parametrize(
    ("text", "calls", "right", "exact", "parses", "listed"),
    [
        ('Action: weather\nAction Input: {"city": "New York", "days": 3}\n', True, True, True, True, True),
        ('Action: weather\nAction Input: {"city": "new-york"}', True, True, True, True, True),  # days is optional
        ('I look.\nAction: weather\nAction Input: {"city": "Boston"}', True, True, False, True, True),
        ('Action: weather\nAction Input: {"city": "New York", "hours": 3}', True, True, False, True, True),
        ('Action: weather\nAction Input: {"days": 3}', True, True, False, True, True),
        ('Action: tides\nAction Input: {"city": "New York", "days": 3}', True, False, False, True, True),
        ('Action: rain\nAction Input: {"city": "New York"}', True, False, False, True, False),
        ("Action: weather\nAction Input: {'city': 'New York'}", True, True, False, False, True),
        ('Action: weather\nAction Input: {"city": NaN}', True, True, False, False, True),
        ('Action: weather\nAction Input: ["New York"]', True, True, False, False, True),
        ("It is sunny.", False, False, False, None, None),
        ("Action: weather", False, False, False, None, None),
    ],
)
def test_answers(text: str, calls: bool, right: bool, exact: bool, parses: bool | None, listed: bool | None) -> None:
    wanted = {"calls": calls, "right_tool": right, "exact_arguments": exact, "parses": parses, "listed": listed}
    assert marks(text) == {**wanted, "stops": True, "no_call": None}


def test_questions_that_no_tool_fits() -> None:
    assert marks("I can't.", [])["no_call"] is True
    assert marks('Action: weather\nAction Input: {"city": "x"}', [])["no_call"] is False
    assert marks("I can't.", [])["calls"] is None


def test_stopping() -> None:
    call = 'Action: weather\nAction Input: {"city": "x"}\n'
    assert marks(call)["stops"] is True
    assert marks(call, finish="length")["stops"] is False
    assert marks(call + call)["stops"] is False


@pytest.mark.parametrize(
    ("given", "wanted", "same"),
    [
        (3, 3.0, True), (3.0, 3, False), (3, 3, True), ("3", 3, False), (True, 1, False), (1, True, False),
        ("A b, c", "ab.C", True), ("don't", 'don"t', True), ([1, 2], [1, 2], True), ([2, 1], [1, 2], False),
        ({"a": 1}, {"a": 1}, True), ({"a": 1, "b": 2}, {"a": 1}, False), (None, None, True), (0, None, False),
    ],
)  # fmt: skip
def test_values(given: Any, wanted: Any, same: bool) -> None:
    assert same_value(given, wanted) is same


def test_arguments_are_one_strict_object() -> None:
    assert parse_arguments('{"a": 1}') == {"a": 1}
    for bad in ("", "{", "[]", "1", '{"a": Infinity}', '{"a": 1} and more'):
        assert parse_arguments(bad) is None


def test_wilson_intervals() -> None:
    # Worked by hand for 8 of 10: (0.8 + z²/20 ± z·sqrt(0.016 + z²/400)) / (1 + z²/10), z = 1.96
    low, high = Proportion(8, 10).interval
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert Proportion(0, 10).interval[0] == 0
    assert round(Proportion(0, 10).interval[1], 4) == 0.2775
    assert Proportion(0, 0).interval == (0, 1)


def test_groups_by_how_many_tools_are_listed() -> None:
    scores = [score_answer(str(n), "no", "stop", TOOLS[:1] * n, WANTED) for n in (1, 2, 3, 5)]
    counted = summarize(scores)
    assert {g: m["calls"].n for g, m in counted.items()} == {
        "all": 4, "one tool": 1, "two tools": 1, "three or more tools": 2,
    }  # fmt: skip


def test_paired_difference() -> None:
    right = 'Action: weather\nAction Input: {"city": "New York"}'
    before = [score_answer(str(n), "no", "stop", TOOLS, WANTED) for n in range(10)]
    after = [score_answer(str(n), right if n < 6 else "no", "stop", TOOLS, WANTED) for n in range(10)]
    difference, low, high, n = paired_difference(before, after, "calls")
    half = 1.959963984540054 * math.sqrt(6 - 36 / 10) / 10
    assert (difference, n) == (0.6, 10)
    assert (low, high) == pytest.approx((0.6 - half, 0.6 + half))


def test_the_gate() -> None:
    measured = {"calls": Proportion(8, 10), "no_call": Proportion(0, 0)}
    met = check_gate({"calls": 0.8}, measured)
    assert met[0]["met"]
    raise_if_not_met({"gate": met})
    missed = check_gate({"calls": 0.9, "no_call": 0.1}, measured)
    with pytest.raises(GateNotMet) as refused:
        raise_if_not_met({"gate": missed})
    assert [v.field for v in refused.value.violations] == ["calls", "no_call"]
    assert "80.0% of 10 rows; the gate asks for 90.0%" in refused.value.violations[0].description


def test_the_report() -> None:
    evil = "<script>alert(1)</script>"
    questions = [
        Question("a", [{"role": "user", "content": "Rome?"}], TOOLS, WANTED),
        Question("b", [{"role": "user", "content": evil}], TOOLS[:1], []),
    ]
    right = Answer("a", 'Action: weather\nAction Input: {"city": "New York"}', "stop", 9, 0.5)
    columns = [
        Column("before", questions, [Answer("a", evil, "stop", 9, 0.5), Answer("b", "no", "stop", 2, 0.1)]),
        Column("after", questions, [right, Answer("b", right.text, "stop", 2, 0.1)]),
    ]
    report = render_json(columns, "2 questions", "datasets/d")
    assert [c["groups"]["all"]["calls"]["k"] for c in report["columns"]] == [0, 1]
    assert report["paired"]["calls"]["difference"] == 1
    page = render_html(columns, report)
    assert evil not in page
    assert "&lt;script&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
