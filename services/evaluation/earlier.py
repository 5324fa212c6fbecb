"""Earlier reports: what a model answered then counts beside today's where the very same questions are asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.common.errors import InvalidData
from services.evaluation.questions import Answer, Question, read_lines
from services.evaluation.report import MAIN_ANSWERS, Column
from services.evaluation.spec import Spec


def read_baseline(
    spec: Spec, inputs: Mapping[str, Path], suites: Sequence[tuple[str, str, Sequence[Question]]]
) -> list[Column]:
    """The baseline's column, over the report's own questions; where it was asked others too, its answers to those as well."""
    if "baseline" not in inputs:
        return []
    report = inputs["baseline"]
    own = read_column(report, spec.baseline, suites[0][2])
    further = [read_column(report, spec.baseline, questions, strict=False) for _, _, questions in suites[1:]]
    answers = [answer for column in (own, *further) for answer in column.answers]
    return [Column(own.label, own.questions, answers, "baseline", own.file)]


def read_compared(spec: Spec, inputs: Mapping[str, Path], questions: Sequence[Question]) -> dict[str, Column]:
    """Report → its judged column, of those that not_worse names; the gate says which rows they lack."""
    return {
        comparison.report: read_column(inputs[f"compared/{number}"], comparison.report, questions, strict=False)
        for number, comparison in enumerate(spec.not_worse)
        if comparison.report
    }


def read_latency(report: Path, label: str) -> list[dict[str, Any]]:
    """What an earlier report has measured of its judged model."""
    told = json.loads((report / "report.json").read_text(encoding="utf-8"))
    return [entry for entry in told.get("latency", ()) if entry["label"] == label]


def read_column(report: Path, name: str, questions: Sequence[Question], strict: bool = True) -> Column:
    """The judged column of an earlier report, of the questions that were the same there, word for word. name: the report's.

    Raises InvalidData when it does not say what was asked, and, when strict, if a row has no answer there.
    """
    told = json.loads((report / "report.json").read_text(encoding="utf-8"))
    # The first reports had no roles; their last column was the judged one.
    column = next((c for c in told["columns"] if c.get("role") == "target"), told["columns"][-1])
    kept = {a.id: a for a in read_answers(report / column.get("answers", MAIN_ANSWERS))}
    if not all(answer.question for answer in kept.values()):
        raise InvalidData(
            f"{name} does not say what was asked: it was made by an earlier fabrictune, and its rows may be others. Evaluate "
            f"its model again; for a run, `fabrictune artifacts rm {name}` and begin the run again"
        )
    same = {q.id for q in questions if q.id in kept and kept[q.id].question == q.digest}
    missing = [q.id for q in questions if q.id not in same and q.after is None]
    if missing and strict:
        raise InvalidData(
            f"{name} has no answer to {len(missing)} of the rows, such as {missing[0]!r}, as they are asked here: "
            "it was made on other rows"
        )
    return Column(column["label"], questions, [kept[q.id] for q in questions if q.id in same])


def read_answers(file: Path) -> list[Answer]:
    """Answers row by row, as they were kept. Raises InvalidData."""
    return [Answer(**row) for row in read_lines(file)]
