"""The evaluation worker: asks, scores, compares on the same rows, writes the report.

Answers are kept as they come, also outside this process: an attempt that begins again asks only what is missing.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from services.common.errors import Cancelled
from services.common.reporter import Progress, Reporter
from services.common.stage import Stage
from services.evaluation.ask import Sampling, ask_all
from services.evaluation.bfcl import read_bfcl
from services.evaluation.earlier import read_answers, read_baseline, read_compared, read_latency
from services.evaluation.gate import check_comparisons, check_gate, raise_if_not_met
from services.evaluation.intervals import Proportion
from services.evaluation.latency import measure_latency
from services.evaluation.metrics import Score, score_answer, summarize
from services.evaluation.questions import Answer, Question, check_ids, read_questions
from services.evaluation.report import MAIN_ANSWERS, Column, Section, render_html, render_json
from services.evaluation.spec import BASELINE, Spec
from services.evaluation.targets import Asked, find_label, find_targets

T = TypeVar("T")
KEEP_SECONDS = 30.0
"""So often answers are kept for another attempt."""


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
    answers, latency = run_stoppable(_ask_targets(spec, asked, questions, inputs.get("checkpoint"), output, reporter))
    columns = [(target, _file(n, target), answers[n]) for n, target in enumerate(asked)]
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


async def _ask_targets(
    spec: Spec,
    asked: Sequence[Asked],
    questions: Sequence[Question],
    checkpoint: Path | None,
    output: Path,
    reporter: Reporter,
) -> tuple[list[list[Answer]], list[dict[str, Any]]]:
    """One server after the other: answers of each target in the questions' order, and its latency if that is asked for."""
    sampling = Sampling(spec.concurrency, spec.max_tokens, spec.temperature)
    keeper = _Keeper(output, checkpoint, reporter, len(questions) * len(asked))
    answers: list[list[Answer]] = []
    latency = []
    for _, together in groupby(asked, lambda target: target.address.server):
        targets = list(together)
        files = [output / _file(len(answers) + n, target) for n, target in enumerate(targets)]
        kept = [keeper.resume(file, questions) for file in files]
        for target, known in zip(targets, kept, strict=True):
            again = f", of which {len(known)} are answered already" if known else ""
            reporter.log(f"asking {target.label} at {target.address.url} {len(questions)} questions{again}")
        found = await _ask(targets, questions, sampling, files, kept, keeper)
        answers += found
        for target, own in zip(targets, found, strict=True):
            if refused := [answer for answer in own if answer.refused]:
                first = f"such as {refused[0].id} ({refused[0].refused})"
                reporter.log(
                    f"{target.label} refused {len(refused)} questions, {first}; they count as failed", "WARNING"
                )
            if "latency" in spec.suites:
                told = await measure_latency(questions, target.address, sampling)
                latency.append({"label": target.label, **told})
    return answers, latency


async def _ask(
    targets: Sequence[Asked],
    questions: Sequence[Question],
    sampling: Sampling,
    files: Sequence[Path],
    kept: Sequence[dict[str, Answer]],
    keeper: _Keeper,
) -> list[list[Answer]]:
    """Answers of targets that are one server, asked in several ways."""
    by_id = {q.id: q for q in questions}
    scored = [[score_answer(by_id[i], answer).marks["right_tool"] for i, answer in each.items()] for each in kept]
    with ExitStack() as stack:
        lines = [stack.enter_context(file.open("a", encoding="utf-8")) for file in files]
        try:
            async for way, answer in ask_all(questions, [target.address for target in targets], sampling, kept):
                kept[way][answer.id] = answer
                lines[way].write(_line(answer))
                lines[way].flush()
                scored[way].append(score_answer(by_id[answer.id], answer).marks["right_tool"])
                keeper.count("; ".join(map(_describe, targets, scored)))
        except BaseException:
            keeper.keep()
            raise
    return [[each[q.id] for q in questions] for each in kept]


def _describe(target: Asked, scored: Sequence[float | None]) -> str:
    known = [mark for mark in scored if mark is not None]
    return f"{target.label}: right tool {sum(map(bool, known))}/{len(known)}"


def _line(answer: Answer) -> str:
    """An answer as it is kept."""
    return json.dumps(asdict(answer), ensure_ascii=False) + "\n"


class _Keeper:
    """Counts answers, and keeps them now and then where another attempt finds them."""

    def __init__(self, output: Path, checkpoint: Path | None, reporter: Reporter, total: int) -> None:
        self._output, self._checkpoint, self._reporter, self._total = output, checkpoint, reporter, total
        self._answered = self._kept = 0
        self._last = time.monotonic()

    def resume(self, file: Path, questions: Sequence[Question]) -> dict[str, Answer]:
        """Answers of an earlier attempt, by id; they are in this attempt's file, too."""
        before = self._checkpoint / file.name if self._checkpoint else None
        if before is None or not before.exists():
            return {}
        asked = {q.id: q.digest for q in questions}
        # Refused rows are asked again: the server may have been set right in between.
        found = {
            a.id: a for a in read_answers(before) if a.question and a.question == asked.get(a.id) and not a.refused
        }
        file.write_text("".join(map(_line, found.values())), encoding="utf-8")
        self._answered += len(found)
        self._kept = self._answered
        return found

    def count(self, phase: str) -> None:
        """One answer more."""
        self._answered += 1
        self._reporter.progress(Progress("prompts", self._answered, self._total, phase))
        if time.monotonic() - self._last > KEEP_SECONDS:
            self.keep()

    def keep(self) -> None:
        """Keep what is new."""
        if self._answered > self._kept:
            self._reporter.checkpoint(self._answered, self._output)
            self._kept = self._answered
        self._last = time.monotonic()


def _file(number: int, target: Asked) -> str:
    """Where a target's answers are kept, row by row."""
    if target.role == "target":
        return MAIN_ANSWERS
    slug = re.sub(r"[^a-z0-9]+", "-", target.label.lower()).strip("-") or "model"
    return f"answers-{number}-{slug[:40]}.jsonl"


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
