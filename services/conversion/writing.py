"""Rows become training rows: alone, or several questions sharing a prompt; and the dataset's files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.reporter import Progress, Reporter
from services.conversion.fabric import Example, language_of, render_rows, render_system, render_together
from services.conversion.mixture import SPLITS, add_distractors, fits_none, pick_count, pick_one, seeded, seeded_order
from services.conversion.refusals import ROW_TOO_LONG, Refused
from services.conversion.report import Report
from services.conversion.rows import Round, Tool, Turn, to_openai
from services.conversion.sources import RawRow
from services.conversion.spec import Source, Spec

EVERY = 500
"""Rows between two words of progress."""


@dataclass(frozen=True)
class Row:
    """A row that has been understood."""

    id: str
    raw: RawRow
    source: Source
    tools: tuple[Tool, ...]
    rounds: tuple[Round, ...]
    system: str | None = None

    def __repr__(self) -> str:
        return f"{self.raw.source}:{self.id}:{self.raw.offset}"  # what seeded orders know it by


class DatasetWriter:
    """The dataset's files; tools.jsonl has the same ids in the same order as the splits one after the other."""

    def __init__(self, spec: Spec, output: Path, report: Report) -> None:
        self._spec, self._report = spec, report
        self._files = {
            name: (output / f"{name}.jsonl").open("w", encoding="utf-8") for name in (*SPLITS, "tools", "rejects")
        }

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def reject(self, raw: RawRow, refused: Refused) -> None:
        """Put a refused row aside, with the reason."""
        self._line("rejects", self._report.reject(raw, refused))

    def write_split(self, split: str, rows: Sequence[Row], reporter: Reporter) -> None:
        """Write the rows of one split, in this order. In train several may share a prompt."""
        spec = self._spec
        pool = list({t.name: t for row in rows for t in row.tools}.values())
        pool = seeded_order(pool, spec.seed, f"pool {split}")
        self._report.tools[split] = {t.name for t in pool}
        together = split == "train" and (spec.questions.max > 1 or spec.refusals.ratio > 0)
        asked = [r for r in rows if _is_single(r) and r.rounds[0][1].calls]
        waiting: list[Row] = []
        for number, row in enumerate(rows):
            if number % EVERY == 0:
                reporter.progress(Progress(unit="rows", step=number, total_steps=len(rows), phase=f"writing {split}"))
            if not (together and _is_single(row)):
                self._write_alone(split, row, pool)
                continue
            if waiting and not _may_join(waiting, row):
                self._write_together(waiting, pool, asked)
                waiting = []
            waiting.append(row)
            if len(waiting) >= pick_count(
                spec.questions.min, spec.questions.max, spec.seed, "questions", waiting[0].id
            ):
                self._write_together(waiting, pool, asked)
                waiting = []
        if waiting:
            self._write_together(waiting, pool, asked)

    def _write_alone(self, split: str, row: Row, pool: Sequence[Tool]) -> None:
        spec, report, language = self._spec, self._report, self._language(row)
        count = pick_count(spec.distractors.min, spec.distractors.max, spec.seed, "distractors", row.id)
        tools = add_distractors(row.tools, pool, count, spec.seed, row.id) if row.tools and count else list(row.tools)
        system = self._system(tools, row.id, language)
        layouts = ("split", "inline") if row.source.layout == "both" else (row.source.layout,)
        examples = [(layout, e) for layout in layouts for e in render_rows(layout, system, tools, row.rounds, language)]
        longest = max((_length(example) for _, example in examples), default=0)
        if self._is_too_long(longest):
            self.reject(row.raw, Refused(ROW_TOO_LONG, f"{longest} characters after conversion"))
            return
        report.languages[language] += 1
        for _, turn, _ in row.rounds:
            report.calls += bool(turn.calls)
            report.without_call += not turn.calls
        for number, (layout, example) in enumerate(examples):
            report.layouts[layout] += 1
            row_id = f"{row.id}/{number}" if len(examples) > 1 else row.id
            self._write(split, row_id, row.raw.source, example, tools)

    def _write_together(self, rows: Sequence[Row], pool: Sequence[Tool], asked: Sequence[Row]) -> None:
        """Several rows as questions of one: their tools side by side are each other's distractors."""
        spec, report, first = self._spec, self._report, rows[0]
        language = self._language(first)
        own = list({t.name: t for row in rows for t in row.tools}.values())
        wanted = pick_count(spec.distractors.min, spec.distractors.max, spec.seed, "distractors", first.id)
        tools = add_distractors(own, pool, max(0, wanted + 1 - len(own)), spec.seed, first.id)
        rounds = [*(row.rounds[0] for row in rows), *self._refusals(first.id, len(rows), tools, asked)]
        rounds.sort(key=lambda r: seeded(spec.seed, "turn", first.id, r[0]))
        messages = render_together(self._system(tools, first.id, language), tools, rounds, language)
        example = Example(messages, None)
        if self._is_too_long(_length(example)):
            for row in rows:
                self._write_alone("train", row, pool)
            return
        report.languages[language] += len(rows)
        report.calls += sum(bool(turn.calls) for _, turn, _ in rounds)
        report.without_call += sum(not turn.calls for _, turn, _ in rounds)
        report.layouts["together"] += 1
        self._write("train", "+".join(r.id for r in rows), first.raw.source, example, tools)
        for row in rows:
            if seeded(spec.seed, "summary", row.id) % 10_000 < spec.summaries * 10_000:
                self._write_summary(row, language)

    def _write_summary(self, row: Row, language: str) -> None:
        system = self._system(row.tools, row.id, language)
        for number, example in enumerate(render_rows("split", system, row.tools, row.rounds, language)):
            if example.expected is None and not self._is_too_long(_length(example)):
                self._report.layouts["split"] += 1
                self._write("train", f"{row.id}/{number}", row.raw.source, example, row.tools)

    def _refusals(self, row_id: str, questions: int, tools: Sequence[Tool], asked: Sequence[Row]) -> list[Round]:
        """Questions of other rows that none of these tools fits, each with a refusal as its answer."""
        spec = self._spec
        # From none to twice as many as the ratio says: were it always the same number, a model could count, not read.
        count = pick_count(0, round(2 * questions * spec.refusals.ratio), spec.seed, "refusals", row_id)
        found: list[Round] = []
        start = seeded(spec.seed, "refused", row_id)
        for step in range(min(len(asked), 200)):
            if len(found) == count:
                break
            other = asked[(start + step) % len(asked)]
            if fits_none(other.tools, tools):
                query = other.rounds[0][0]
                answers = _in_language(spec.refusals.answers, language_of(query))
                found.append(Round(query, Turn(answer=pick_one(answers, spec.seed, row_id, query))))
        return found

    def _system(self, tools: Sequence[Tool], row_id: str, language: str) -> str:
        role = pick_one(_in_language(self._spec.instructions, language), self._spec.seed, "role", row_id)
        return render_system(tools, role, language, self._spec.wording)

    def _language(self, row: Row) -> str:
        return self._spec.language if self._spec.language != "auto" else language_of(row.rounds[-1][0])

    def _is_too_long(self, length: int) -> bool:
        return bool(self._spec.max_row_characters) and length > self._spec.max_row_characters

    def _write(self, split: str, row_id: str, source: str, example: Example, tools: Sequence[Tool]) -> None:
        """One row, and its tools beside it."""
        self._line(split, {"id": row_id, "source": source, "messages": list(example.messages)})
        beside: dict[str, Any] = {"id": row_id, "tools": [to_openai(t) for t in tools]}
        if example.expected is not None:
            beside["expected"] = [{"name": c.name, "arguments": json.loads(c.arguments)} for c in example.expected]
            self._report.scored[split] += 1
        self._line("tools", beside)
        self._report.rows[split] += 1

    def _line(self, file: str, value: Mapping[str, Any]) -> None:
        self._files[file].write(json.dumps(value, ensure_ascii=False) + "\n")


def _is_single(row: Row) -> bool:
    """Whether a row may share a prompt: one question, answered by a call or in plain words."""
    return len(row.rounds) == 1 and row.source.layout == "split" and bool(row.tools)


def _may_join(waiting: Sequence[Row], row: Row) -> bool:
    """Whether a row may share a prompt with those that wait: its question has one right answer there, and theirs too."""
    return all(fits_none(row.tools, other.tools) for other in waiting)


def _in_language(texts: Sequence[str], language: str) -> Sequence[str]:
    """Those in the language; all when there are none."""
    return [text for text in texts if language_of(text) == language] or texts


def _length(example: Example) -> int:
    """Characters of all messages."""
    return sum(len(m["content"]) for m in example.messages)
