"""The evaluation report: report.json for programs and one self-contained report.html for people.

report.json: {"version": 1, "title", "dataset", "prompts", "metrics": {name: meaning}, "titles": {name: words},
 "columns": [{"label", "groups": {group: {metric: {k, n, value, low, high}}}}],          # before, after
 "paired": {metric: {difference, low, high, n}},                                       # last column minus first
 "examples": [{id, question, tools, expected, answers: {label: text}, failed: [metric]}]}   # the worst rows first
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from services.evaluation.ask import Answer, Question
from services.evaluation.metrics import GROUPS, METRICS, Proportion, Score, paired_difference, score_answer, summarize

WORST = 50
TITLES = {
    "calls": "calls a tool",
    "right_tool": "the right tool",
    "exact_arguments": "exact arguments",
    "parses": "arguments parse",
    "listed": "a listed tool",
    "stops": "stops by itself",
    "no_call": "no call when none fits",
}


@dataclass(frozen=True)
class Column:
    """One model's answers to all questions, in the questions' order."""

    label: str
    questions: Sequence[Question]
    answers: Sequence[Answer]

    @cached_property
    def scores(self) -> list[Score]:
        """One score an answer."""
        pairs = zip(self.questions, self.answers, strict=True)
        return [score_answer(q.id, a.text, a.finish_reason, q.tools, q.expected) for q, a in pairs]


def render_json(columns: Sequence[Column], title: str, dataset: str) -> dict[str, Any]:
    """The report as plain JSON; see the module's docstring."""
    report: dict[str, Any] = {
        "version": 1,
        "title": title,
        "dataset": dataset,
        "prompts": len(columns[-1].questions),
        "metrics": dict(METRICS),
        "titles": TITLES,
        "columns": [_column(c) for c in columns],
        "paired": {},
        "examples": _examples(columns),
    }
    if len(columns) > 1:
        for metric in METRICS:
            difference, low, high, n = paired_difference(columns[0].scores, columns[-1].scores, metric)
            if n:
                report["paired"][metric] = {"difference": difference, "low": low, "high": high, "n": n}
    return report


def render_html(columns: Sequence[Column], report: dict[str, Any]) -> str:
    """The report as one page without anything from outside."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(report=report, groups=GROUPS, labels=[c.label for c in columns])


def _column(column: Column) -> dict[str, Any]:
    groups = summarize(column.scores)
    return {
        "label": column.label,
        "groups": {g: {m: _proportion(p) for m, p in metrics.items()} for g, metrics in groups.items()},
    }


def _proportion(p: Proportion) -> dict[str, Any]:
    low, high = p.interval
    return {"k": p.k, "n": p.n, "value": round(p.value, 4), "low": round(low, 4), "high": round(high, 4)}


def _examples(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """The rows on which the last column does worst."""
    rows = []
    for number, (question, score) in enumerate(zip(columns[-1].questions, columns[-1].scores, strict=True)):
        failed = [metric for metric, mark in score.marks.items() if mark is False]
        rows.append(
            {
                "id": question.id,
                "question": question.messages[-1]["content"],
                "tools": [t["function"]["name"] for t in question.tools],
                "expected": list(question.expected),
                "answers": {c.label: c.answers[number].text for c in columns},
                "failed": failed,
            }
        )
    rows.sort(key=lambda row: -len(row["failed"]))
    return [row for row in rows if row["failed"]][:WORST]
