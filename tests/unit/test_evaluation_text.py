"""Rouge-L, ModelScope's metrics and intervals on cases worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from services.evaluation.intervals import Mean, Proportion, difference_interval, percentiles
from services.evaluation.rouge import count_common, rouge_l, split_tokens
from services.evaluation.toolbench import Action, is_hallucinated, read_action, score_arguments


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        # Lin 2004, section 3.1: "police killed the gunman" is the reference; LCS 3 and 2 of 4.
        ("police kill the gunman", "police killed the gunman", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("Police killed, the GUNMAN!", "police killed the gunman", 1.0),
        ("今天北京晴", "北京今天晴朗", 2 * 3 / 11),  # 今天晴 (or 北京晴) of 5 and 6 characters
        ("气温25度", "气温是25度", 2 * 4 / 9),  # 气 温 25 度 of 4 and 5: digits are one token
        ("", "x", 0.0), ("x", "", 0.0), ("!?", "!?", 0.0), ("a b", "c d", 0.0),
    ],
)  # fmt: skip
def test_rouge_l(answer: str, reference: str, score: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score)


def test_chinese_is_split_by_characters_and_words_by_what_is_no_letter() -> None:
    assert split_tokens("The 天气 is 25.5°C, v2_x") == ["the", "天", "气", "is", "25", "5", "c", "v2", "x"]


def test_common_subsequences_are_those_of_the_table() -> None:
    """Against the textbook's table, on words long enough for several machine words."""
    import random

    draw = random.Random(1)
    for _ in range(40):
        first, second = ([draw.choice("abcd") for _ in range(draw.randrange(150))] for _ in range(2))
        row = [0] * (len(second) + 1)
        for token in first:
            before = row[:]
            for j, other in enumerate(second):
                row[j + 1] = before[j] + 1 if token == other else max(before[j + 1], row[j])
        assert count_common(first, second) == row[-1]


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ('Action: w\nAction Input: {"a": 1}\n', "w", '{"a": 1}'),
        ("Action:w Action Input:{}", "w", "{}"),
        ("Action: v\nAction Input: {}\nAction: w\nAction Input: 1", "w", "1"),  # the last one
        ("Action: w", "w", "{}"),
        ("It rains.", "", "{}"),
    ],
)
def test_actions_are_read_leniently(text: str, name: str, arguments: str) -> None:
    assert read_action(text) == Action(name, arguments)
    assert read_action(text).plan == ("call" if name else "finish")


@pytest.mark.parametrize(
    ("action", "wanted", "f1"),
    [
        (Action("w", '{"a": 1, "b": 2}'), {"a": 1, "b": 2}, 1.0),
        (Action("w", '{"a": 1, "b": 3}'), {"a": 1, "b": 2}, 0.75),  # (1 + 1/2) of 2 and of 2
        (Action("w", '{"a": 1}'), {"a": 1, "b": 2}, 2 / 3),  # recall 1/2, precision 1
        (Action("w", '{"a": 1, "c": 1}'), {"a": 1}, 2 / 3),  # recall 1, precision 1/2
        (Action("w", '{"c": 1}'), {"a": 1}, 0.0),
        (Action("w", "{}"), {}, 1.0), (Action("w", '{"a": 1}'), {}, 0.0), (Action("w", "{}"), {"a": 1}, 0.0),
        (Action("w", '{"a": ' + "[" * 5000), {"a": 1}, 0.0),
        (Action("w", '{"a": ' + "[" * 5000 + "]" * 5000 + "}"), {"a": 1}, 0.0),
        (Action("w", "{"), {"a": 1}, 0.0), (Action("w", "[1]"), {"a": 1}, 0.0), (Action("v", '{"a": 1}'), {"a": 1}, 0.0),
    ],
)  # fmt: skip
def test_f1_of_arguments(action: Action, wanted: dict[str, Any], f1: float) -> None:
    assert score_arguments(action, "w", wanted) == pytest.approx(f1)


def test_hallucinated_tools() -> None:
    assert is_hallucinated(Action("v", "{}"), {"w"})
    assert not is_hallucinated(Action("w", "{}"), {"w"})
    assert not is_hallucinated(Action("", "{}"), {"w"})


def test_intervals_of_proportions() -> None:
    # Binomial(10, 0.8): P(X ≤ 4) = 0.6 %, P(X ≤ 5) = 3.3 %; P(X ≤ 9) = 89.3 %.
    assert Proportion(8, 10).interval == (0.5, 1.0)
    # Binomial(4, 0.5): 1, 5, 11, 15, 16 of 16 cumulated: 6.25 % at 0, 93.75 % at 3.
    assert Proportion(2, 4).interval == (0.0, 1.0)
    low, high = Proportion(700, 1000).interval
    assert (low, high) == pytest.approx((0.6716, 0.7284), abs=1e-3)  # ± 1.96 · sqrt(0.7 · 0.3 / 1000)
    # All alike: Wilson's, z² / (n + z²) = 3.8415 / 13.8415.
    assert Proportion(0, 10).interval == pytest.approx((0, 0.2775), abs=1e-4)
    assert Proportion(10, 10).interval == pytest.approx((0.7225, 1), abs=1e-4)
    assert Proportion(0, 0).interval == (0, 1)


def test_the_steps_of_a_row_are_resampled_with_it() -> None:
    """Ten rows of ten equal steps know as much as ten rows, not as a hundred."""
    marks = (0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0)
    rows = tuple((mark,) * 10 for mark in marks)
    one_each = Mean(marks).interval
    assert one_each == (0.2, 0.8)
    assert Mean(marks * 10, rows).interval == Proportion(50, 100, rows).interval == one_each
    assert difference_interval(rows)[1:] == one_each
    assert Proportion(50, 100).interval == pytest.approx((0.4, 0.6))
    alike = ((0.0, 1.0),) * 10  # every resample is the same: Wilson's interval for ten rows
    assert Proportion(10, 20, alike).interval == pytest.approx((0.5 - 0.2775, 0.5 + 0.2775), abs=1e-4)


def test_intervals_of_means_and_differences() -> None:
    values = tuple(n / 100 for n in range(101))
    low, high = Mean(values).interval
    # The standard error is 0.2915 / sqrt(101) = 0.0290.
    assert (low, high) == pytest.approx((0.5 - 0.0569, 0.5 + 0.0569), abs=0.01)
    assert Mean(values).interval == (low, high)  # the same draws each time
    assert Mean((1.0,) * 10).interval == pytest.approx((0.7225, 1), abs=1e-4)
    mean, low, high = difference_interval([[1.0]] * 30 + [[0.0]] * 60 + [[-1.0]] * 10)
    # Variance 0.4 - 0.2²: ± 1.96 · 0.6 / 10.
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - 0.1176, 0.2 + 0.1176), abs=0.03)
    assert difference_interval([[0.0]] * 10) == pytest.approx((0, -0.2775, 0.2775), abs=1e-4)
    assert difference_interval([]) == (0, 0, 0)


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentiles([float(n) for n in range(1, 101)]) == {"p50": 50, "p95": 95}
    assert percentiles([3.0, 1.0]) == {"p50": 1, "p95": 3}
    assert percentiles([]) == {"p50": 0, "p95": 0}
