"""Earlier reports: what a model answered then counts beside today's where the very same questions are asked."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from services.common.errors import InvalidData
from services.evaluation.questions import Answer, Question, read_lines
from services.evaluation.report import MAIN_ANSWERS, Column
from services.evaluation.spec import Spec


def read_baseline(
    spec: Spec,
    inputs: Mapping[str, Path],
    suites: Sequence[tuple[str, str, Sequence[Question]]],
    taken: Collection[str] = (),
) -> list[Column]:
    """The baseline's column, over the report's own questions; where it was asked others too, its answers to those as well.

    taken: labels of other columns; answers are told by label, so one that is taken gets "(baseline)" behind it.
    """
    if "baseline" not in inputs:
        return []
    report = inputs["baseline"]
    own = read_column(report, spec.baseline, suites[0][2])
    further = [read_column(report, spec.baseline, questions, strict=False) for _, _, questions in suites[1:]]
    answers = [answer for column in (own, *further) for answer in column.answers]
    label = own.label
    while label in taken:
        label += " (baseline)"
    return [Column(label, own.questions, answers, "baseline", own.file)]


def read_compared(spec: Spec, inputs: Mapping[str, Path], questions: Sequence[Question]) -> dict[str, Column]:
    """Report → its judged column, of those that not_worse names; the gate says which rows they lack."""
    return {
        comparison.report: read_column(inputs[f"compared/{number}"], comparison.report, questions, strict=False)
        for number, comparison in enumerate(spec.not_worse)
        if comparison.report
    }


def read_latency(report: Path, name: str, label: str) -> list[dict[str, Any]]:
    """What an earlier report has measured of its judged model, under the label that this has here. Raises InvalidData."""
    told = _read_report(report, name)
    judged = _find_judged(told)["label"]
    return [{**entry, "label": label} for entry in told.get("latency", ()) if entry["label"] == judged]


def read_column(report: Path, name: str, questions: Sequence[Question], strict: bool = True) -> Column:
    """The judged column of an earlier report, of the questions that were the same there, word for word. name: the report's.

    Raises InvalidData when it is no report or does not say what was asked, and, when strict, if a row has no answer there.
    """
    column = _find_judged(_read_report(report, name))
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
    return [_read_answer(row, f"{file}, row {number},") for number, row in enumerate(read_lines(file), 1)]


def _read_answer(row: Mapping[str, Any], where: str) -> Answer:
    known = {f.name: f.default is MISSING for f in fields(Answer)}
    lacking = [key for key, needed in known.items() if needed and key not in row]
    wrong = [f"it lacks {', '.join(lacking)}"] if lacking else []
    if unknown := sorted(row.keys() - known):
        wrong.append(f"it has {', '.join(unknown)}, which this fabrictune does not know")
    if wrong:
        raise InvalidData(f"{where} is no answer: {' and '.join(wrong)}; evaluate the model again")
    return Answer(**row)


def _read_report(report: Path, name: str) -> Mapping[str, Any]:
    """report.json of a folder. Raises InvalidData when it has none, or another one, as data sets have."""
    advice = "give the folder of a report that `fabrictune evaluate` wrote"
    try:
        told = json.loads((report / "report.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidData(f"{name}: there is no report.json in {report}; {advice}") from None
    except (OSError, ValueError) as error:
        raise InvalidData(f"{name}: report.json in {report} cannot be read ({error}); {advice}") from None
    columns = told.get("columns") if isinstance(told, dict) else None
    if not columns or not isinstance(columns, list) or not all(isinstance(c, dict) and "label" in c for c in columns):
        raise InvalidData(f"{name}: report.json in {report} tells no model's answers; {advice}")
    return dict(told)


def _find_judged(told: Mapping[str, Any]) -> Mapping[str, Any]:
    """The judged column. The first reports had no roles; it was their last one."""
    columns = told["columns"]
    return next((c for c in columns if c.get("role") == "target"), columns[-1])
