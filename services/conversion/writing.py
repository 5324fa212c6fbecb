"""The second pass: one bucket of rows after the other becomes training rows, in the seeded order, and the dataset's parts.

Rows that share a prompt come from one bucket, so buckets can be written by any process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from services.common.fabric import Example, Round, Tool, Turn, language_of, render_rows
from services.common.fabric_json import begin_messages, list_functions, tool_json
from services.conversion.drafts import Draft, expected_json, stands_together, unpack_draft
from services.conversion.elsewhere import Elsewhere, Question
from services.conversion.kinship import fits_none, pair_up, related
from services.conversion.mixture import SPLITS, add_distractors, pick_count, pick_one, seeded
from services.conversion.processes import Tell
from services.conversion.rendering import LAYOUTS, Renderer, in_language
from services.conversion.report import Report, count
from services.conversion.selection import Marks
from services.conversion.spec import Spec
from services.conversion.spill import Row, list_known, read_tools, unpack_row, unpack_rows
from services.conversion.tokens import Tokenizer, open_tokenizer

BUFFER_BYTES = 1 << 18
"""Of each file that is written."""


@dataclass(frozen=True)
class Plan:
    """What the first pass has decided for the second."""

    spec: Spec
    rows: Mapping[int, int]
    """Chunk → rows."""
    gone: bytes
    """Bits of `Marks`: duplicates, and rows that were left out."""
    splits: Mapping[str, str]
    """Tool → split."""
    pools: Mapping[str, Sequence[Tool]] = field(default_factory=dict)
    """Split → tools that may be added to its prompts, in seeded order."""
    asked: Sequence[Question] = ()
    """Questions of training rows that may be asked where their tool is not listed."""
    tokenizer: str = ""
    """A folder."""
    repeated: bytes = b""
    """Bits of `Marks`: rows whose id an earlier row has."""


def write_buckets(plan: Plan, buckets: Sequence[int], spilled: Sequence[Path], parts: Path, tell: Tell) -> Report:
    """Do the second pass over buckets that follow each other; leaves `part_file`s. The spilled rows are gone afterwards."""
    names = [name for split in SPLITS for name in (split, f"tools-{split}")]
    with ExitStack() as opened:
        files = {
            name: opened.enter_context(part_file(parts, name, buckets[0]).open("wb", buffering=BUFFER_BYTES))
            for name in names
        }
        writer = _Writer(plan, files)
        tables = read_tools(spilled)
        for bucket in buckets:
            tell(writer.write(bucket, spilled, tables))
    return writer.report


def part_file(parts: Path, name: str, first: int) -> Path:
    """The part of one of the dataset's files that begins with a bucket; name: a split, or "tools-" and a split."""
    return parts / f"{name}-{first:06d}"


class _Writer:
    def __init__(self, plan: Plan, files: Mapping[str, BinaryIO]) -> None:
        self._plan, self._spec, self._files = plan, plan.spec, files
        self._sources = plan.spec.all_sources
        self._gone = Marks(plan.rows, plan.gone) if any(plan.gone) else ()
        self._repeated = Marks(plan.rows, plan.repeated) if any(plan.repeated) else ()
        # Only who counts characters or tokens asks for the text of a prompt.
        self._renderer = Renderer(plan.spec, as_json=not (plan.tokenizer or plan.spec.max_row_characters))
        self._together = stands_together(plan.spec)
        self._equivalents = pair_up(plan.spec.equivalent_tools)
        self._elsewhere = Elsewhere(plan.asked, self._equivalents)
        self._tokenizer: Tokenizer | None = open_tokenizer(Path(plan.tokenizer)) if plan.tokenizer else None
        self._lengths: list[Sequence[Mapping[str, Any]]] = []
        self.report = Report()

    def write(self, bucket: int, spilled: Sequence[Path], tables: Sequence[Sequence[Tool]]) -> int:
        """Write one bucket's rows; returns how many there were."""
        waiting: list[Row] = []
        seen = 0
        for place, packed, is_draft, known in unpack_rows(spilled, tables, bucket):
            seen += 1
            if place in self._gone:
                continue
            # An id is one row's: evaluation finds what is expected by it. Its place tells a later row from the first.
            own = "~{}.{}".format(*place) if place in self._repeated else ""
            if is_draft:
                draft = unpack_draft(packed)
                self._finish(draft._replace(id=draft.id + own) if own else draft, known)
            else:
                row = unpack_row(packed, known)
                waiting = self._take(row._replace(id=row.id + own) if own else row, waiting)
        if waiting:
            self._write_together(waiting)
        self._count_tokens(0)
        return seen

    def _take(self, row: Row, waiting: list[Row]) -> list[Row]:
        """Write a row, or let it wait for others to share its prompt; returns those that wait."""
        split = self._split(row)
        row = row._replace(tools=tuple(self._exchange_tools(split, row.tools, row.id)))
        layouts = LAYOUTS[self._sources[row.source].layout]
        if not (self._together and split == "train" and "split" in layouts and self._renderer.may_share(row)):
            self._write_alone(split, row)
            return waiting
        if "inline" in layouts:
            self._write_alone(split, row, "inline")
        if waiting and not all(fits_none(row.tools, other.tools, self._equivalents) for other in waiting):
            # Each question must have one right answer under the prompt that they share.
            self._write_together(waiting)
            waiting = []
        waiting.append(row)
        wanted = self._spec.questions
        if len(waiting) >= pick_count(wanted.min, wanted.max, self._spec.seed, "questions", waiting[0].id):
            self._write_together(waiting)
            return []
        return waiting

    def _split(self, row: Row) -> str:
        if row.tools:
            for _, turn, _ in row.rounds:
                if turn.calls:
                    return self._plan.splits[turn.calls[0].name]
            return self._plan.splits[row.tools[0].name]
        named = self._sources[row.source].split
        return "train" if named == "auto" else named  # rows without tools cannot leak one

    def _exchange_tools(self, split: str, tools: Sequence[Tool], row_id: str) -> Sequence[Tool]:
        """Other tools of the split instead of those that are held out from it: none of them is called in the row."""
        splits = self._plan.splits
        own = [tool for tool in tools if splits[tool.name] == split]
        missing = len(tools) - len(own)
        if not missing:
            return tools
        self.report.tools_exchanged += missing
        return self._add_distractors(own, split, missing, row_id)

    def _finish(self, draft: Draft, known: Sequence[Tool]) -> None:
        """Write a draft: what `_write_alone` does for its row."""
        row_id, file, _, numbers, language, called, parts = draft
        report, listed = self.report, list_known(numbers, known)
        split = self._plan.splits[called or listed[0].name]
        tools = self._exchange_tools(split, listed, row_id)
        if self._spec.distractors.max:
            tools = self._add_tools(split, tools, row_id)
        pieces = [tool_json(tool) for tool in tools]
        begin = begin_messages(pieces, self._renderer.role(row_id, language), language, self._spec.wording)
        functions = b",".join([piece.function for piece in pieces])
        count(report.languages, language)
        report.turns_with_calls += bool(called)
        report.turns_without_call += not called
        for number, (layout, messages, expected) in enumerate(parts):
            count(report.layouts, layout)
            own_id = f"{row_id}/{number}" if len(parts) > 1 else row_id
            self._write_json(split, own_id, file, (begin, messages), functions, expected)

    def _write_alone(self, split: str, row: Row, only: str = "") -> None:
        report = self.report
        tools = self._add_tools(split, row.tools, row.id) if row.system is None else row.tools
        examples = self._renderer.alone(row, tools, only)
        if len(tools) > len(row.tools) and any(self._renderer.is_too_long(e) for _, e in examples):
            tools = row.tools
            examples = self._renderer.alone(row, tools, only)
        count(report.languages, self._renderer.language(row))
        for _, turn, _ in row.rounds:
            report.turns_with_calls += bool(turn.calls)
            report.turns_without_call += not turn.calls
        listed = list_functions(tools)
        for number, (layout, example) in enumerate(examples):
            count(report.layouts, layout)
            # The inline row of a conversation whose split rows are written elsewhere has no number among them.
            suffix = "/inline" if only == "inline" else f"/{number}" if len(examples) > 1 else ""
            self._write(split, row.id + suffix, row.file, example, listed)

    def _add_tools(self, split: str, tools: Sequence[Tool], row_id: str) -> Sequence[Tool]:
        wanted, seed = self._spec.distractors, self._spec.seed
        number = pick_count(wanted.min, wanted.max, seed, "distractors", row_id) if wanted.max and tools else 0
        return self._add_distractors(tools, split, number, row_id) if number else tools

    def _add_distractors(self, tools: Sequence[Tool], split: str, number: int, row_id: str) -> Sequence[Tool]:
        pool = self._plan.pools.get(split, ())
        return add_distractors(tools, pool, number, self._spec.seed, row_id, self._equivalents)

    def _write_together(self, rows: Sequence[Row]) -> None:
        """Several rows as questions of one: their tools side by side are each other's distractors."""
        spec, report, first = self._spec, self.report, rows[0]
        own = list({t.name: t for row in rows for t in row.tools}.values())
        wanted = pick_count(spec.distractors.min, spec.distractors.max, spec.seed, "distractors", first.id)
        tools = self._add_distractors(own, "train", max(0, wanted + 1 - len(own)), first.id)
        rounds = [*(row.rounds[0] for row in rows), *self._refusals(first.id, len(rows), tools)]
        rounds.sort(key=lambda r: seeded(spec.seed, "turn", first.id, r.query))
        example = self._renderer.together(first, tools, rounds)
        if self._renderer.is_too_long(example):
            for row in rows:
                self._write_alone("train", row, "split")
            return
        count(report.languages, self._renderer.language(first), len(rows))
        report.turns_with_calls += sum(bool(turn.calls) for _, turn, _ in rounds)
        report.turns_without_call += sum(not turn.calls for _, turn, _ in rounds)
        count(report.layouts, "together")
        self._write("train", "+".join(r.id for r in rows), first.file, example, list_functions(tools))
        for row in rows:
            if seeded(spec.seed, "summary", row.id) % 10_000 < spec.summaries * 10_000:
                self._write_summary(row, self._renderer.language(first))

    def _write_summary(self, row: Row, language: str) -> None:
        system = self._renderer.system(row, row.tools, language)
        for number, example in enumerate(render_rows("split", system, row.tools, row.rounds, language)):
            if example.expected is None and not self._renderer.is_too_long(example):
                count(self.report.layouts, "split")
                self._write("train", f"{row.id}/{number}", row.file, example, list_functions(row.tools))

    def _refusals(self, row_id: str, questions: int, tools: Sequence[Tool]) -> Iterator[Round]:
        """Questions of other rows that none of these tools fits, each with a refusal as its answer."""
        spec, elsewhere = self._spec, self._elsewhere
        # From none to twice as many as the ratio says: were it always the same number, a model could count, not read.
        wanted = pick_count(0, round(2 * questions * spec.refusals.ratio), spec.seed, "refusals", row_id)
        # Rounded up as often as the rest says, so that the part is right where prompts have one refusal, too.
        near = int(wanted * spec.refusals.near + seeded(spec.seed, "near", row_id) % 100 / 100)
        start = seeded(spec.seed, "refused", row_id)
        found = list(islice(elsewhere.near(tools, start), near))
        for _, others in found:
            for pair in related(others, tools):
                count(self.report.near_misses, "\n".join(pair))
        found += islice(elsewhere.far(tools, start), wanted - len(found))
        for query, _ in found:
            answers = in_language(spec.refusals.answers, language_of(query))
            yield Round(query, Turn(answer=pick_one(answers, spec.seed, row_id, query)))

    def _write(self, split: str, row_id: str, source: str, example: Example, tools: bytes) -> None:
        """One row, and its tools, as `list_functions` has them, beside it."""
        messages, calls = example
        self._write_json(
            split, row_id, source, (orjson.dumps(messages),), tools, None if calls is None else expected_json(calls)
        )
        if self._tokenizer is not None:
            self._lengths.append(example.messages)
            self._count_tokens(256)

    def _write_json(
        self, split: str, row_id: str, source: str, messages: Sequence[bytes], tools: bytes, expected: bytes | None
    ) -> None:
        begin = b'{"id":' + orjson.dumps(row_id)
        told = (begin, b',"source":', orjson.dumps(source), b',"messages":', *messages, b"}\n")
        self._files[split].write(b"".join(told))
        end = b"}\n"
        if expected is not None:
            end = b',"expected":' + expected + end
            count(self.report.scored, split)
        self._files[f"tools-{split}"].write(b"".join((begin, b',"tools":[', tools, b"]", end)))
        count(self.report.rows, split)

    def _count_tokens(self, at_least: int) -> None:
        """Count the tokens of rows that wait for it, many at a time."""
        if self._tokenizer is not None and self._lengths and len(self._lengths) >= at_least:
            self.report.tokens.add(self._tokenizer.count_rows(self._lengths))
            self._lengths = []
