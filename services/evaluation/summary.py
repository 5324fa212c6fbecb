"""Many answers' scores as estimates with intervals: by group, and as the difference of two evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from services.evaluation.intervals import Estimate, Mean, Proportion, difference_interval
from services.evaluation.metrics import GROUPS, METRICS, Score


def summarize(scores: Iterable[Score]) -> dict[str, dict[str, Estimate]]:
    """Group → metric → estimate. Groups are those by listed tools, then categories, if there are any."""
    scores = list(scores)
    categories = dict.fromkeys(s.category for s in scores if s.category)
    return {
        group: {metric: _estimate(metric, [s for s in scores if _belongs(s, group)]) for metric in METRICS}
        for group in (*GROUPS, *categories)
    }


def group_of(tools: int) -> str:
    """The group of a prompt by how many tools it lists."""
    return GROUPS[min(max(tools, 1), 3)]


def paired_difference(before: Sequence[Score], after: Sequence[Score], metric: str) -> tuple[float, float, float, int]:
    """(difference after - before, low, high, n) on the rows where the metric applies to both, with its 95 % interval."""
    first = {s.id: s.marks[metric] for s in before}
    pairs = [(s, first.get(s.id), s.marks[metric]) for s in after]
    rows = _by_row((s, float(b) - float(a)) for s, a, b in pairs if a is not None and b is not None)
    return *difference_interval(rows), sum(map(len, rows))


def _by_row(found: Iterable[tuple[Score, float]]) -> list[tuple[float, ...]]:
    """The values of each row's steps."""
    rows: dict[str, list[float]] = {}
    for score, value in found:
        rows.setdefault(score.row, []).append(value)
    return [tuple(values) for values in rows.values()]


def _belongs(score: Score, group: str) -> bool:
    return group in ("all", score.category, group_of(score.tools))


def _estimate(metric: str, scores: Iterable[Score]) -> Estimate:
    rows = _by_row((s, float(mark)) for s in scores if (mark := s.marks[metric]) is not None)
    known = [value for row in rows for value in row]
    several = tuple(rows) if len(known) > len(rows) else ()
    return Mean(tuple(known), several) if METRICS[metric].graded else Proportion(round(sum(known)), len(known), several)
