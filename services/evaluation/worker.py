"""The evaluation worker: asks, scores, compares on the same rows, writes the report."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from services.common.errors import Cancelled
from services.common.reporter import Reporter
from services.common.stage import Stage
from services.evaluation.bfcl import read_bfcl
from services.evaluation.collect import answers_file, collect_answers
from services.evaluation.earlier import read_baseline, read_compared, read_latency
from services.evaluation.gate import check_comparisons, check_gate, raise_if_not_met
from services.evaluation.intervals import Proportion
from services.evaluation.metrics import Score
from services.evaluation.questions import Question, check_ids, read_questions
from services.evaluation.report import Column, Section, render_html, render_json
from services.evaluation.spec import BASELINE, Spec
from services.evaluation.summary import summarize
from services.evaluation.targets import find_label, find_targets

T = TypeVar("T")


def run(spec: Spec, inputs: Mapping[str, Path], output: Path, reporter: Reporter) -> dict[str, Any]:
    """Evaluate one target, and others beside it.

    inputs: dataset and/or bfcl; optionally baseline and compared/0, … (earlier reports on the same rows), and checkpoint
    (answers of an earlier attempt).
    """
    suites, left_out = _read_suites(spec, inputs, reporter)
    questions = [question for _, _, each in suites for question in each]
    check_ids(questions)
    asked = find_targets(spec)
    earlier = read_baseline(spec, inputs, suites, [target.label for target in asked])
    compared = read_compared(spec, inputs, suites[0][2])
    answers, latency = run_stoppable(
        collect_answers(spec, asked, questions, inputs.get("checkpoint"), output, reporter)
    )
    columns = [(target, answers_file(n, target), answers[n]) for n, target in enumerate(asked)]
    sections = [
        Section(
            name,
            title,
            [
                *(Column(c.label, each, c.answers, "baseline", c.file) for c in earlier if _answers_any(c, each)),
                *(Column(target.label, each, kept, target.role, file) for target, file, kept in columns),
            ],
            left_out.get(name, {}),
        )
        for name, title, each in suites
    ]
    own = sections[0].target
    measured = summarize(own.scores)["all"]

    def scores_of(than: str) -> Sequence[Score]:
        if than == BASELINE:
            return earlier[0].scores if earlier else ()
        if than in compared:
            return compared[than].scores
        return next(c.scores for c in sections[0].columns if c.label == find_label(asked, than))

    gate = check_gate(spec.gate, measured) + check_comparisons(spec.not_worse, scores_of, own.scores)
    before = read_latency(inputs["baseline"], spec.baseline, earlier[0].label) if earlier else []
    report = render_json(sections, spec.dataset or spec.bfcl, before + latency, gate)
    (output / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    (output / "report.html").write_text(render_html(report), encoding="utf-8")
    values = {
        name: {"value": p.value, "n": p.n, **({"k": p.k} if isinstance(p, Proportion) else {})}
        for name, p in measured.items()
        if p.n
    }
    return {"label": own.label, "metrics": values, "gate": gate}


def run_stoppable(work: Coroutine[Any, Any, T]) -> T:
    """asyncio.run, ended by the signals that the process ends by. Raises Cancelled.

    Their handlers raise wherever the process is; what is raised in the midst of asyncio's own writing to a socket it takes for
    a broken connection (CPython 3.11), and a worker that was told to stop would ask again instead.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    own = [n for n, h in handlers.items() if callable(h) and h is not signal.default_int_handler]

    async def stoppable() -> T:
        task = asyncio.create_task(work)
        for number in own:
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await task

    try:
        return asyncio.run(stoppable())
    except asyncio.CancelledError:
        raise Cancelled("told to stop") from None
    finally:
        for number in own:
            signal.signal(number, handlers[number])


def _read_suites(
    spec: Spec, inputs: Mapping[str, Path], reporter: Reporter
) -> tuple[list[tuple[str, str, Sequence[Question]]], dict[str, Mapping[str, int]]]:
    """(name, title, questions) of each, the report's own first; and by name the rows that are left out, by reason."""
    suites: list[tuple[str, str, Sequence[Question]]] = []
    left_out: dict[str, Mapping[str, int]] = {}
    if "dataset" in inputs:
        questions = read_questions(inputs["dataset"], spec.split, spec.limit, spec.follows_up)
        first = sum(q.after is None for q in questions)
        on = f" and {len(questions) - first} after a tool's result" if spec.follows_up else ""
        suites.append(("held_out", f"{first} held-out questions ({spec.split}){on}", questions))
    if "bfcl" in inputs:
        found, left_out["bfcl"] = read_bfcl(inputs["bfcl"], spec.limit)
        suites.append(("bfcl", f"{len(found)} questions in BFCL's format", found))
        for reason, count in left_out["bfcl"].items():
            reporter.log(f"{count} rows of {spec.bfcl} are left out: {reason}", "WARNING")
    return suites, left_out


def _answers_any(column: Column, questions: Sequence[Question]) -> bool:
    return any(q.id in column.by_id for q in questions)


def _inputs(spec: Spec) -> dict[str, str]:
    named = {"dataset": spec.dataset, "bfcl": spec.bfcl, "baseline": spec.baseline}
    reports = {f"compared/{n}": comparison.report for n, comparison in enumerate(spec.not_worse)}
    return {role: name for role, name in {**named, **reports}.items() if name}


STAGE: Stage[Spec] = Stage(
    kind="evaluation",
    collection="evaluationJobs",
    output_kind="report",
    output_collection="reports",
    spec=Spec,
    inputs=_inputs,
    run=run,
    verdict=raise_if_not_met,
)

if __name__ == "__main__":
    from services.common.worker import main

    main(STAGE)
