"""The answers of all targets, one server after the other.

They are kept as they come, also outside this process: an attempt that begins again asks only what is missing.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from services.common.reporter import Progress, Reporter
from services.evaluation.ask import Sampling, ask_all
from services.evaluation.earlier import read_answers
from services.evaluation.latency import measure_latency
from services.evaluation.metrics import score_answer
from services.evaluation.questions import Answer, Question
from services.evaluation.report import MAIN_ANSWERS
from services.evaluation.spec import Spec
from services.evaluation.targets import Asked

KEEP_SECONDS = 30.0
"""So often answers are kept for another attempt."""


async def collect_answers(
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
        files = [output / answers_file(len(answers) + n, target) for n, target in enumerate(targets)]
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


def answers_file(number: int, target: Asked) -> str:
    """Where a target's answers are kept, row by row."""
    if target.role == "target":
        return MAIN_ANSWERS
    slug = re.sub(r"[^a-z0-9]+", "-", target.label.lower()).strip("-") or "model"
    return f"answers-{number}-{slug[:40]}.jsonl"
