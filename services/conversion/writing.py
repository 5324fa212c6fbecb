"""The second pass: one bucket of rows after the other becomes training rows, in the seeded order, and the dataset's parts.

Rows that share a prompt come from one bucket, so buckets can be written by any process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from services.common.fabric import Example, Round, Tool, Turn, language_of, remember_tools, render_rows
from services.conversion.mixture import SPLITS, add_distractors, fits_none, pick_count, pick_one, seeded
from services.conversion.processes import Tell
from services.conversion.rendering import LAYOUTS, Renderer, in_language
from services.conversion.report import Report, count
from services.conversion.selection import Marks
from services.conversion.spec import Spec
from services.conversion.spill import Row, read_tools, unpack_row, unpack_rows
from services.conversion.tokens import Tokenizer, open_tokenizer

BUFFER_BYTES = 1 << 18
"""Of each file that is written."""

Question = tuple[str, tuple[Tool, ...]]
"""A question and the tools of its row."""


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
        # Only who counts characters or tokens asks for the text of a prompt.
        self._renderer = Renderer(plan.spec, as_json=not (plan.tokenizer or plan.spec.max_row_characters))
        self._together = plan.spec.questions.max > 1 or plan.spec.refusals.ratio > 0
        self._tokenizer: Tokenizer | None = open_tokenizer(Path(plan.tokenizer)) if plan.tokenizer else None
        self._lengths: list[Sequence[Mapping[str, Any]]] = []
        self.report = Report()

    def write(self, bucket: int, spilled: Sequence[Path], tables: Sequence[Sequence[Tool]]) -> int:
        """Write one bucket's rows; returns how many there were."""
        waiting: list[Row] = []
        seen = 0
        for place, packed, known in unpack_rows(spilled, tables, bucket):
            seen += 1
            if place not in self._gone:
                waiting = self._take(unpack_row(packed, known), waiting)
        if waiting:
            self._write_together(waiting)
        self._count_tokens(0)
        return seen

    def _take(self, row: Row, waiting: list[Row]) -> list[Row]:
        """Write a row, or let it wait for others to share its prompt; returns those that wait."""
        split = self._split(row)
        row = self._exchange_tools(split, row)
        layouts = LAYOUTS[self._sources[row.source].layout]
        if not (self._together and split == "train" and "split" in layouts and self._renderer.may_share(row)):
            self._write_alone(split, row)
            return waiting
        if "inline" in layouts:
            self._write_alone(split, row, "inline")
        if waiting and not all(fits_none(row.tools, other.tools) for other in waiting):
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

    def _exchange_tools(self, split: str, row: Row) -> Row:
        """Other tools of the split instead of those that are held out from it: none of them is called here."""
        splits = self._plan.splits
        own = [tool for tool in row.tools if splits[tool.name] == split]
        missing = len(row.tools) - len(own)
        if not missing:
            return row
        self.report.tools_exchanged += missing
        tools = add_distractors(own, self._plan.pools[split], missing, self._spec.seed, row.id)
        return row._replace(tools=tuple(tools))

    def _write_alone(self, split: str, row: Row, only: str = "") -> None:
        report, tools = self.report, self._add_tools(split, row)
        examples = self._renderer.alone(row, tools, only)
        if len(tools) > len(row.tools) and any(self._renderer.is_too_long(e) for _, e in examples):
            tools = row.tools
            examples = self._renderer.alone(row, tools, only)
        count(report.languages, self._renderer.language(row))
        for _, turn, _ in row.rounds:
            report.turns_with_calls += bool(turn.calls)
            report.turns_without_call += not turn.calls
        listed = list_tools(tools)
        for number, (layout, example) in enumerate(examples):
            count(report.layouts, layout)
            # The inline row of a conversation whose split rows are written elsewhere has no number among them.
            suffix = "/inline" if only == "inline" else f"/{number}" if len(examples) > 1 else ""
            self._write(split, row.id + suffix, row.file, example, listed)

    def _add_tools(self, split: str, row: Row) -> Sequence[Tool]:
        wanted, seed = self._spec.distractors, self._spec.seed
        number = pick_count(wanted.min, wanted.max, seed, "distractors", row.id) if wanted.max else 0
        if not (number and row.tools and row.system is None):
            return row.tools
        return add_distractors(row.tools, self._plan.pools[split], number, seed, row.id)

    def _write_together(self, rows: Sequence[Row]) -> None:
        """Several rows as questions of one: their tools side by side are each other's distractors."""
        spec, report, first = self._spec, self.report, rows[0]
        own = list({t.name: t for row in rows for t in row.tools}.values())
        wanted = pick_count(spec.distractors.min, spec.distractors.max, spec.seed, "distractors", first.id)
        tools = add_distractors(
            own, self._plan.pools.get("train", ()), max(0, wanted + 1 - len(own)), spec.seed, first.id
        )
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
        self._write("train", "+".join(r.id for r in rows), first.file, example, list_tools(tools))
        for row in rows:
            if seeded(spec.seed, "summary", row.id) % 10_000 < spec.summaries * 10_000:
                self._write_summary(row, self._renderer.language(first))

    def _write_summary(self, row: Row, language: str) -> None:
        system = self._renderer.system(row, row.tools, language)
        for number, example in enumerate(render_rows("split", system, row.tools, row.rounds, language)):
            if example.expected is None and not self._renderer.is_too_long(example):
                count(self.report.layouts, "split")
                self._write("train", f"{row.id}/{number}", row.file, example, list_tools(row.tools))

    def _refusals(self, row_id: str, questions: int, tools: Sequence[Tool]) -> Iterator[Round]:
        """Questions of other rows that none of these tools fits, each with a refusal as its answer."""
        spec, asked = self._spec, self._plan.asked
        # From none to twice as many as the ratio says: were it always the same number, a model could count, not read.
        missing = pick_count(0, round(2 * questions * spec.refusals.ratio), spec.seed, "refusals", row_id)
        start = seeded(spec.seed, "refused", row_id)
        for step in range(min(len(asked), 200)):
            if not missing:
                return
            query, others = asked[(start + step) % len(asked)]
            if fits_none(others, tools):
                answers = in_language(spec.refusals.answers, language_of(query))
                missing -= 1
                yield Round(query, Turn(answer=pick_one(answers, spec.seed, row_id, query)))

    def _write(self, split: str, row_id: str, source: str, example: Example, tools: bytes) -> None:
        """One row, and its tools, as `list_tools` has them, beside it."""
        line = {"id": row_id, "source": source, "messages": example.messages}
        self._files[split].write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        expected = b""
        if example.expected is not None:
            calls = [b'{"name":%b,"arguments":%b}' % (orjson.dumps(c[0]), c[1].encode()) for c in example.expected]
            expected = b',"expected":[%b]' % b",".join(calls)
            count(self.report.scored, split)
        self._files[f"tools-{split}"].write(b'{"id":%b,"tools":[%b]%b}\n' % (orjson.dumps(row_id), tools, expected))
        count(self.report.rows, split)
        if self._tokenizer is not None:
            self._lengths.append(example.messages)
            self._count_tokens(256)

    def _count_tokens(self, at_least: int) -> None:
        """Count the tokens of rows that wait for it, many at a time."""
        if self._tokenizer is not None and self._lengths and len(self._lengths) >= at_least:
            self.report.tokens.add(self._tokenizer.count_rows(self._lengths))
            self._lengths = []


def list_tools(tools: Sequence[Tool]) -> bytes:
    """Tools as OpenAI function objects: what stands between the brackets of a JSON list."""
    return b",".join([_tool_json(tool) for tool in tools])


@remember_tools
def _tool_json(tool: Tool) -> bytes:
    """A tool as an OpenAI function object."""
    parameters = orjson.Fragment(tool.parameters)  # as it is: no number loses digits
    told = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return orjson.dumps({"type": "function", "function": told})
