"""Scores worked out by hand, and the report they make."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import GateNotMet
from services.evaluation.gate import check_comparisons, check_gate, raise_if_not_met
from services.evaluation.intervals import Proportion
from services.evaluation.metrics import Score, parse_arguments, score_answer
from services.evaluation.questions import Answer, Question, Result
from services.evaluation.report import Column, Section, render_html, render_json
from services.evaluation.spec import Comparison
from services.evaluation.summary import paired_difference, summarize

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "share": {"type": "number"}},
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("weather", "tides")]
WANTED = [{"name": "weather", "arguments": {"city": "New York", "days": 3}}]


def score(
    text: str,
    expected: list[dict[str, Any]] = WANTED,
    finish: str = "stop",
    tools: list[dict[str, Any]] = TOOLS,
    calls: list[dict[str, str]] | None = None,
    row: str = "r",
) -> Score:
    return score_answer(Question(row, ask(row), tools, expected), Answer(row, text, finish, 1, 0.1, calls))


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def marks(*args: Any, **options: Any) -> dict[str, Any]:
    return dict(score(*args, **options).marks)


def after(text: str, reference: str, observation: str = "{}", finish: str = "stop") -> Score:
    """The score of an answer after a tool's result."""
    question = Question("r#1", [], TOOLS, [], Result("r", "said", observation), reference)
    return score_answer(question, Answer("r#1", text, finish, 1, 0.1))


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
    wanted |= {"stops": True, "no_call": None, "rouge_l": None, "pictures": None, "stops_after_result": None}
    assert {name: mark for name, mark in marks(text).items() if name in wanted} == wanted


def test_questions_that_no_tool_fits() -> None:
    assert marks("I can't.", [])["no_call"] is True
    assert marks('Action: weather\nAction Input: {"city": "x"}', [])["no_call"] is False
    assert marks("I can't.", [])["calls"] is None


def test_stopping() -> None:
    call = 'Action: weather\nAction Input: {"city": "x"}\n'
    assert marks(call)["stops"] is True
    assert marks(call, finish="length")["stops"] is False
    assert marks(call + call)["stops"] is False


def test_arguments_are_one_strict_object() -> None:
    assert parse_arguments('{"a": 1}') == {"a": 1}
    for bad in ("", "{", "[]", "1", '{"a": Infinity}', '{"a": 1} and more'):
        assert parse_arguments(bad) is None


def test_arguments_nested_too_deeply_or_too_large_are_wrong_and_no_error() -> None:
    for value in ("[" * 5000, "[" * 5000 + "]" * 5000, "[" * 900 + "]" * 900, "1" * 5000, "1" * 400):
        for name in ("city", "share"):
            found = marks(f'Action: weather\nAction Input: {{"city": "New York", "{name}": {value}}}')
            assert (found["right_tool"], found["exact_arguments"]) == (True, False)


def test_a_call_that_allows_nothing_for_a_parameter_is_never_right_and_no_error() -> None:
    """As in live_simple_106-63-0 of BFCL v4."""
    wanted = [{"name": "weather", "possible": {"city": ["Rome"], "days": []}}]
    for arguments in ('{"city": "Rome"}', '{"city": "Rome", "days": 3}'):
        found = marks(f"Action: weather\nAction Input: {arguments}", wanted)
        assert (found["right_tool"], found["exact_arguments"]) == (True, False)


def test_groups_by_how_many_tools_are_listed() -> None:
    scores = [score("no", tools=TOOLS[:1] * n) for n in (1, 2, 3, 5)]
    counted = summarize(scores)
    assert {g: m["calls"].n for g, m in counted.items()} == {
        "all": 4, "one tool": 1, "two tools": 1, "three or more tools": 2,
    }  # fmt: skip


def test_calls_that_the_server_parsed_are_scored_instead_of_the_text() -> None:
    call = {"name": "weather", "arguments": '{"city": "New York", "days": 3}'}
    assert marks("Action: tides\nAction Input: {}", calls=[call], finish="tool_calls")["exact_arguments"] is True
    assert marks("Action: weather\nAction Input: {}", calls=[])["calls"] is False
    assert marks("", calls=[call, call], finish="tool_calls")["stops"] is False
    cut = marks("", calls=[{"name": "weather", "arguments": '{"city": "New'}], finish="length")
    assert (cut["parses"], cut["exact_arguments"], cut["stops"]) == (False, False, False)


def test_several_expected_calls_count_in_any_order() -> None:
    two = [*WANTED, {"name": "weather", "arguments": {"city": "Rome"}}]
    rome = 'Action: weather\nAction Input: {"city": "Rome"}\n'
    york = 'Action: weather\nAction Input: {"city": "New York"}\n'
    assert marks(rome + york, two)["exact_arguments"] is True
    assert marks(rome + york, two)["stops"] is True
    assert marks(rome + rome, two)["exact_arguments"] is False
    assert marks(rome, two)["right_tool"] is False


def test_an_answer_after_a_result() -> None:
    told = after("It is 21 degrees in Rome.", "It is 21 degrees.").marks
    # 4 tokens in common of 6 and 4: 2 · 4 / (6 + 4)
    assert told["rouge_l"] == 0.8
    assert (told["stops_after_result"], told["pictures"], told["calls"], told["stops"]) == (True, None, None, None)
    assert (told["plan_em"], told["act_em"], told["hallu_rate"]) == (True, None, False)
    again = after("Action: weather\nAction Input: {}", "It rains.").marks
    assert (again["stops_after_result"], again["plan_em"]) == (False, False)
    assert after("It rains", "It rains.", finish="length").marks["stops_after_result"] is False
    shown = after("![x](https://a.cn/1.png)", "", "{'url': 'https://a.cn/1.png'}")
    assert shown.marks["pictures"] is True
    assert after("Here.", "", "https://a.cn/1.png").failure == "does not show a picture"


@pytest.mark.parametrize(
    ("text", "failure", "reason"),
    [
        ("no", "no call, though a tool fits", ""),
        ("Action: rain\nAction Input: {}", "calls a tool that is not listed", ""),
        ("Action: tides\nAction Input: {}", "calls another tool", ""),
        ("Action: weather\nAction Input: {", "arguments are not JSON", "the arguments are not one JSON object"),
        ('Action: weather\nAction Input: {"city": "Rome"}', "other arguments", "city: 'Rome' is none of ['New York']"),
        ('Action: weather\nAction Input: {"city": "New York"}', "", ""),
    ],
)
def test_the_kind_of_failure_is_the_first_that_applies(text: str, failure: str, reason: str) -> None:
    assert (score(text).failure, score(text).reason) == (failure, reason)


def test_paired_differences_are_of_rows_that_both_answered() -> None:
    right = 'Action: weather\nAction Input: {"city": "New York"}'
    before = [score("no", row=str(n)) for n in range(10)]
    later = [score(right if n < 6 else "no", row=str(n)) for n in range(8)]
    difference, low, high, n = paired_difference(before, later, "calls")
    assert (difference, n) == (0.75, 8)
    assert 0.3 < low < 0.6 < 0.9 < high <= 1
    assert paired_difference(before, later, "parses") == (0, 0, 0, 0)


def test_steps_of_a_row_hang_together_in_intervals_and_differences() -> None:
    def steps(row: int, text: str) -> list[Score]:
        """A question and three answers after results, all right or all wrong by Plan.EM."""
        first = Question(f"r{row}", ask(str(row)), TOOLS, WANTED)
        scores = [score_answer(first, Answer(first.id, text, "stop", 1, 0.1))]
        for number in range(1, 4):
            later = Question(f"r{row}#{number}", first.messages, TOOLS, WANTED, Result("r", "said", "{}"))
            scores.append(score_answer(later, Answer(later.id, text, "stop", 1, 0.1)))
        return scores

    call = "Action: weather\nAction Input: {}"
    before = [s for row in range(10) for s in steps(row, "no")]
    later = [s for row in range(10) for s in steps(row, call if row % 2 else "no")]
    alone = [s for s in later if "#" not in s.id]
    together, first = summarize(later)["all"]["plan_em"], summarize(alone)["all"]["plan_em"]
    assert (together.value, together.n, first.n) == (0.5, 40, 10)
    assert together.interval == (0.2, 0.8)
    assert first.interval == pytest.approx((0.2, 0.8))
    assert paired_difference(before, later, "plan_em") == (0.5, 0.2, 0.8, 40)


def test_rows_with_the_same_prompt_tell_no_more_than_one_of_them() -> None:
    """Conversion writes a conversation in two layouts, whose prompts are the same, and so are the answers to them."""

    def answered(right: int, times: int) -> list[Score]:
        texts = ["Action: weather\nAction Input: {}" if row < right else "no" for row in range(10)]
        asked = [(Question(f"{n}/{part}", ask(str(n)), TOOLS, WANTED), n) for n in range(10) for part in range(times)]
        return [score_answer(question, Answer(question.id, texts[n], "stop", 1, 0.1)) for question, n in asked]

    once, twice = (summarize(answered(5, times))["all"]["calls"] for times in (1, 2))
    assert (once.n, twice.n, twice.value) == (10, 20, once.value)
    assert twice.interval == pytest.approx(once.interval) == (0.2, 0.8)
    differences = [paired_difference(answered(0, times), answered(5, times), "calls") for times in (1, 2)]
    assert differences == [(0.5, 0.2, 0.8, 10), (0.5, 0.2, 0.8, 20)]


def test_an_answer_that_a_stop_string_cut_off_has_not_ended_by_itself() -> None:
    """finish_reason is "stop" for both; only what vLLM says beside it tells them apart."""
    call = 'Action: weather\nAction Input: {"city": "x"}\n'
    cut = Answer("r", call, "stop", 1, 0.1, stop_string="Observation:")
    question = Question("r", [], TOOLS, WANTED)
    assert score_answer(question, cut).marks["stops"] is False
    assert score_answer(question, replace(cut, stop_string="")).marks["stops"] is True
    # An inline row goes on with the result in the same turn: its call need not end that, and all else must.
    inline = replace(question, goes_on=True)
    assert score_answer(inline, cut).marks["stops"] is True
    assert score_answer(inline, replace(cut, text="I look.\n")).marks["stops"] is False
    after_result = Question("r#1", [], TOOLS, [], Result("r", "said", "{}", in_turn=True), "Warm.")
    warm = Answer("r#1", "Warm.", "stop", 1, 0.1, stop_string="Observation:")
    assert score_answer(after_result, warm).marks["stops_after_result"] is False


def test_the_gate() -> None:
    measured = {"calls": Proportion(8, 10), "no_call": Proportion(0, 0)}
    met = check_gate({"calls": 0.8}, measured)
    assert met[0]["met"]
    raise_if_not_met({"gate": met}, "reports/r")
    missed = check_gate({"calls": 0.9, "no_call": 0.1}, measured)
    with pytest.raises(GateNotMet) as refused:
        raise_if_not_met({"gate": missed}, "reports/r")
    assert [v.field for v in refused.value.violations] == ["calls", "no_call"]
    assert "80.0% of 10 rows; the gate asks for 90.0%" in refused.value.violations[0].description
    assert refused.value.violations[1].description == "no row was measured"
    assert "reports/r" in refused.value.message
    assert refused.value.metadata == {"report": "reports/r"}


def test_a_threshold_of_a_metric_of_which_less_is_better_is_the_most() -> None:
    found = check_gate({"hallu_rate": 0.1}, {"hallu_rate": Proportion(2, 10)})
    assert found == [{"metric": "hallu_rate", "most": 0.1, "value": 0.2, "n": 10, "met": False}]
    assert check_gate({"hallu_rate": 0.2}, {"hallu_rate": Proportion(2, 10)})[0]["met"]


def test_not_worse_than_another_by_more_than() -> None:
    call, none = "Action: weather\nAction Input: {}", "no"
    other = [score(call, row=str(n)) for n in range(10)]
    own = [score(call if n else none, row=str(n)) for n in range(10)]
    asked = [Comparison(than="reports/r", by={"calls": 0.1, "hallu_rate": 0.0})]
    found = check_comparisons(asked, lambda _: other, own)
    assert [(g["metric"], round(g["difference"], 3), g["n"], g["met"]) for g in found] == [
        ("calls", -0.1, 10, True), ("hallu_rate", 0.0, 10, True),
    ]  # fmt: skip
    stricter = check_comparisons([Comparison(than="reports/r", by={"calls": 0.05})], lambda _: other, own)
    with pytest.raises(GateNotMet) as refused:
        raise_if_not_met({"gate": stricter}, "reports/mine")
    said = refused.value.violations[0].description
    assert said.startswith("-10.0 points [")
    assert said.endswith("against reports/r on 10 rows; the gate allows 5.0 points worse")
    assert not check_comparisons(asked, lambda _: [], own)[0]["met"]


def test_a_comparison_with_fewer_rows_is_not_met_and_says_why() -> None:
    call = "Action: weather\nAction Input: {}"
    own = [score(call, row=str(n)) for n in range(10)]
    (found,) = check_comparisons([Comparison(than="reports/r", by={"calls": 0.1})], lambda _: own[:1], own)
    assert (found["n"], found["missing"], found["met"]) == (1, 9, False)
    with pytest.raises(GateNotMet) as refused:
        raise_if_not_met({"gate": [found]}, "reports/mine")
    assert "reports/r has no answer to 9 of the rows as they are asked here" in refused.value.violations[0].description


def test_a_question_is_known_by_all_that_is_asked_and_expected() -> None:
    first = Question("a", [{"role": "user", "content": "Rome?"}], TOOLS, WANTED)
    assert first.digest == replace(first, id="b", category="c").digest
    later = Result("a", "said", "{}")
    others: list[dict[str, Any]] = [
        {"messages": []},
        {"tools": []},
        {"expected": []},
        {"after": later},
        {"reference": "x"},
    ]
    assert len({first.digest, *(replace(first, **other).digest for other in others)}) == 6


def test_the_report() -> None:
    evil = "<script>alert(1)</script>"
    questions = [
        Question("a", [{"role": "user", "content": "Rome?"}], TOOLS, WANTED),
        Question("b", [{"role": "user", "content": evil}], TOOLS[:1], []),
    ]
    right = Answer("a", 'Action: weather\nAction Input: {"city": "New York"}', "stop", 9, 0.5)
    columns = [
        Column("before", questions, [Answer("a", evil, "stop", 9, 0.5), Answer("b", "no", "stop", 2, 0.1)], "baseline"),
        Column("qwen-max", questions, [Answer("a", "?", "stop", 1, 0.2)], "reference", "answers-0-qwen-max.jsonl"),
        Column("after", questions, [right, Answer("b", right.text, "stop", 2, 0.1)]),
    ]
    latency = [{"label": "after", "requests": 2, "concurrency": 1, "tokens_per_second_all": 9.5}]
    latency[0] |= {name: {"p50": 0.5, "p95": 0.7} for name in ("first_token", "tokens_per_second", "whole")}
    gate = [{"metric": "calls", "least": 0.5, "value": 1.0, "n": 1, "met": True}]
    report = render_json([Section("held_out", "2 questions", columns)], "datasets/d", latency, gate)
    assert [c["groups"]["all"]["calls"]["k"] for c in report["columns"]] == [0, 0, 1]
    assert [c["role"] for c in report["columns"]] == ["baseline", "reference", "target"]
    assert report["paired"]["calls"]["difference"] == 1
    assert [(p["label"], p["metrics"]["calls"]["n"]) for p in report["pairs"]] == [("before", 1), ("qwen-max", 1)]
    assert report["columns"][2]["failures"] == {"a call, though no tool fits": 1}
    assert [(e["id"], list(e["answers"])) for e in report["examples"]] == [("b", ["before", "after"])]
    page = render_html(report)
    assert evil not in page
    assert "&lt;script&gt;" in page
    assert "The gate is met" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_categories_and_what_is_left_out_stand_in_the_report_whatever_an_earlier_one_lacked() -> None:
    """Both where BFCL's rows are the whole report and where they are a suite of it."""
    questions = [
        Question(f"bfcl/{name}_0", [{"role": "user", "content": "Rome?"}], TOOLS, WANTED, category=name)
        for name in ("simple_python", "live_multiple")
    ]
    answers = [Answer(q.id, "no", "stop", 1, 0.1) for q in questions]
    columns = [Column("before", questions, answers[:1], "baseline"), Column("after", questions, answers)]
    bfcl = Section("bfcl", "2 questions in BFCL's format", columns, {"needs the web": 100})
    held_out = Question("a", [{"role": "user", "content": "Rome?"}], TOOLS, WANTED)
    own = Section("held_out", "1 question", [Column("after", [held_out], [Answer("a", "no", "stop", 1, 0.1)])])
    for sections in ([bfcl], [own, bfcl]):
        report = render_json(sections, "datasets/b")
        assert [told["left_out"] for told in (report, *report["suites"])] == [s.left_out for s in sections]
        page = render_html(report)
        assert page.count("By category") == 1
        assert page.count("<th>simple_python</th><th>live_multiple</th>") == 1
        assert page.count("Left out: 100 rows (needs the web).") == 1


def test_the_table_of_a_run_has_a_column_for_each_model_and_no_row_without_figures() -> None:
    from rich.console import Console

    from fabrictune.cli.results import report_table

    questions = [Question("a", [{"role": "user", "content": "Rome?"}], TOOLS, WANTED)]
    answers = [Answer("a", 'Action: weather\nAction Input: {"city": "New York"}', "stop", 9, 0.5)]
    labels = {"before": "baseline", "after [/y]": "target", "after, tools=": "constrained"}
    columns = [Column(label, questions, answers, role) for label, role in labels.items()]
    for shown, wide in ((columns, False), (columns[:2], True)):
        report = render_json([Section("held_out", "1 question", shown)], "datasets/d")
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(report_table(report))
        text = console.export_text()
        assert all(column.label in text for column in shown)
        assert ("1/1" in text) is wide
        assert "100% [" in text
        assert "Rouge-L" not in text


def test_only_a_line_break_ends_a_row_of_a_report(tmp_path: Path) -> None:
    from fabrictune.cli.results import _read_rows

    rows = [{"text": "a\u2028b\x85c"}, {"text": "d"}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert _read_rows(tmp_path / "answers.jsonl") == rows
