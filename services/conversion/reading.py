"""The first pass: chunks of sources are read, each row is refused by name or understood, and put where the second finds it.

One process does this for its share of the chunks and leaves one folder: rows in buckets of their seeded order, hashes of
them, what it refused, and a summary. Folders of several processes or machines add up to the same, however many there are.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec
import orjson

from services.common.fabric import Tool, language_of
from services.conversion.drafts import Drafter
from services.conversion.duplicates import IDS, Index, put_id
from services.conversion.identity import make_conversations
from services.conversion.mixture import ToolGroups, seeded
from services.conversion.pictures import has_pictures, show_pictures
from services.conversion.processes import Tell
from services.conversion.readers import READERS
from services.conversion.refusals import MAX_ROUNDS, ROW_TOO_LARGE, ROW_TOO_LONG, Refused
from services.conversion.rendering import Renderer, count_characters
from services.conversion.report import EXAMPLES, Report, count, describe_refusal
from services.conversion.rows import Conversation
from services.conversion.selection import Ballots
from services.conversion.sources import Chunk, RawRow, decode_row, read_rows
from services.conversion.spec import Source, Spec
from services.conversion.spill import ROWS, Buckets, KnownTools, Row, pack_row, place_row

TOLD_EACH = 500
"""Rows between two words of progress."""
POOL, ASKED = 4096, 4096
"""So many tools are drawn as distractors, and so many questions for refusals, however large the data."""
SUMMARY, REJECTS = "summary", "rejects"


class Asked(NamedTuple):
    """A question that a tool answers."""

    order: int
    """Of its row, seeded."""
    chunk: int
    number: int
    """Of its row in the chunk."""
    query: str
    tools: tuple[Tool, ...]


@dataclass
class Summary:
    """What one process found."""

    report: Report = field(default_factory=Report)
    lines: dict[int, int] = field(default_factory=dict)
    """Chunk → lines."""
    rows: dict[int, int] = field(default_factory=dict)
    """Chunk → rows that were understood."""
    groups: list[tuple[str, str]] = field(default_factory=list)
    """(tool, the tool that its group is named by)."""
    fixed: dict[str, list[str]] = field(default_factory=dict)
    """Tool → splits that sources name for its rows."""
    pool: list[tuple[int, Tool]] = field(default_factory=list)
    """Tools that may be distractors, with their place in the seeded order."""
    asked: list[Asked] = field(default_factory=list)
    """Questions that may be asked elsewhere."""


def read_chunks(spec: Spec, chunks: Sequence[Chunk], folder: Path, buckets: int, tools_bytes: int, tell: Tell) -> None:
    """Do the first pass over some chunks, in order; leaves its files in the empty folder.

    tools_bytes: at most so many of tools are written once instead of with each row.
    """
    reader = _Reader(spec, folder, buckets, tools_bytes)
    with (folder / REJECTS).open("wb") as rejects:
        for chunk in chunks:
            if chunk.source == len(spec.sources):
                reader.introduce(chunk)
                continue
            for number, raw in enumerate(read_rows(chunk, spec.max_row_bytes), 1):
                if refused := reader.read(chunk, raw):
                    rejects.write(orjson.dumps(refused) + b"\n")
                if number % TOLD_EACH == 0:
                    tell(TOLD_EACH)
            tell(reader.summary.lines.get(chunk.number, 0) % TOLD_EACH)
    reader.close()


def read_summary(folder: Path) -> Summary:
    """What a process left."""
    return msgspec.msgpack.decode((folder / SUMMARY).read_bytes(), type=Summary)


def understand_row(raw: RawRow, source: Source, spec: Spec) -> Conversation:
    """What a row says, as its source's reader and the spec have it. Raises Refused."""
    conversation = READERS[source.format](decode_row(raw.data, spec.max_row_bytes))
    if len(conversation.rounds) > MAX_ROUNDS:
        raise Refused(ROW_TOO_LARGE, f"{len(conversation.rounds)} rounds")
    if not spec.pictures or conversation.system is not None:
        return conversation
    if not any(map(has_pictures, [round.turn for round in conversation.rounds])):
        return conversation
    rounds = [r._replace(turn=show_pictures(r.turn, language_of(r.query))) for r in conversation.rounds]
    return conversation._replace(rounds=tuple(rounds))


class _Reader:
    def __init__(self, spec: Spec, folder: Path, buckets: int, tools_bytes: int) -> None:
        self._spec, self._sources, self._folder = spec, spec.all_sources, folder
        self.summary = Summary()
        self._groups = ToolGroups()
        self._listed: Counter[int | str] = Counter()
        """Tools by number, else by name → rows that list them."""
        self._rows = Buckets(folder, ROWS, buckets)
        self._known = KnownTools(tools_bytes)
        self._ids = Buckets(folder, IDS, buckets)
        self._index = Index(folder, buckets, spec.duplicates == "near") if spec.duplicates != "keep" else None
        self._ballots = Ballots(folder, spec, buckets)
        self._renderer = Renderer(spec)
        self._drafter = Drafter(spec)
        self._pool: dict[str, tuple[int, Tool]] = {}
        self._asked: list[Asked] = []

    def read(self, chunk: Chunk, raw: RawRow) -> dict[str, object] | None:
        """Put a row where it belongs; returns its refusal, if it is one."""
        summary, report = self.summary, self.summary.report
        summary.lines[chunk.number] = raw.line
        if not raw.data.strip():
            return None
        report.rows_in += 1
        source = self._sources[chunk.source]
        try:
            row = to_row(understand_row(raw, source, self._spec), chunk, raw.offset)
            if self._spec.max_row_characters:
                self._check_length(row)
        except Refused as refused:
            told = describe_refusal(refused, raw.data, chunk.name, raw.line, raw.offset)
            told["chunk"] = chunk.number
            self._count_refusal(told)
            return told
        self._put(row, chunk.number, source)
        return None

    def introduce(self, chunk: Chunk) -> None:
        """Put the rows of self-cognition."""
        told = self._spec.self_cognition
        for number, conversation in enumerate(make_conversations(told.count, told.name, told.author, self._spec.seed)):
            self.summary.report.rows_in += 1
            self._put(to_row(conversation, chunk, number), chunk.number, self._sources[chunk.source])

    def close(self) -> None:
        """Write what is still held, and the summary."""
        self._rows.close()
        self._ids.close()
        self._known.save(self._folder)
        self._ballots.close()
        if self._index is not None:
            self._index.close()
        tools = self._known.tools
        for told, rows in self._listed.items():
            count(self.summary.report.tools, told if isinstance(told, str) else tools[told].name, rows)
        self.summary.groups = self._groups.pairs()
        self.summary.pool = smallest_tools(self._pool)
        self.summary.asked = heapq.nsmallest(ASKED, self._asked)
        (self._folder / SUMMARY).write_bytes(msgspec.msgpack.encode(self.summary))

    def _put(self, row: Row, chunk: int, source: Source) -> None:
        summary, seed, key = self.summary, self._spec.seed, row.key
        number = summary.rows.get(chunk, 0)
        summary.rows[chunk] = number + 1
        tools = list(map(self._meet, row.tools))
        order = seeded(seed, "order", key)
        draft = self._drafter.draft(row, tools)
        packed = pack_row(row, tools) if draft is None else draft
        self._rows.put(
            order * self._rows.count >> 64, place_row(packed, order, chunk, number, is_draft=draft is not None)
        )
        put_id(self._ids, row.id, chunk, number)
        if self._index is not None and row.source < len(self._spec.sources):
            self._index.add(row, chunk, number)
        if self._ballots.wants(row.source):
            self._ballots.add(row.source, seeded(seed, "count", key), chunk, number)
        if row.tools:
            self._tie(row, source)
        self._count(row)
        if self._spec.refusals.ratio and self._renderer.may_share(row) and row.rounds[0].turn.calls:
            self._asked.append(Asked(order, chunk, number, row.rounds[0].query, row.tools))
            if len(self._asked) > 4 * ASKED:
                self._asked = heapq.nsmallest(ASKED, self._asked)

    def _tie(self, row: Row, source: Source) -> None:
        if source.split != "auto" or row.system is not None:
            names = [tool.name for tool in row.tools]  # a prompt that is not to be changed
        else:
            # Of the others only those that are called must stay together: the rest can be exchanged.
            names = list(dict.fromkeys([call.name for _, turn, _ in row.rounds for call in turn.calls]))
        if len(names) > 1:
            self._groups.tie(names)
        if source.split != "auto":
            splits = self.summary.fixed.setdefault(names[0], [])
            if source.split not in splits:
                splits.append(source.split)

    def _meet(self, tool: Tool) -> int | Tool:
        """Count a tool; returns its number, or itself where it has none."""
        number = self._known.number(tool)
        if number is None:
            self._groups.add((tool.name,))
            self._draw(tool)
            self._known.add(tool)
            number = self._known.number(tool)
        self._listed[tool.name if number is None else number] += 1
        return tool if number is None else number

    def _draw(self, tool: Tool) -> None:
        known = self._pool.get(tool.name)
        if known is None or known[1] != tool:
            place = seeded(self._spec.seed, "pool", *tool)
            if known is None or place < known[0]:
                self._pool[tool.name] = place, tool
        if len(self._pool) > 4 * POOL:
            self._pool = {tool.name: (place, tool) for place, tool in smallest_tools(self._pool)}

    def _count(self, row: Row) -> None:
        report = self.summary.report
        count(report.sources, row.file)
        count(report.turns, str(len(row.rounds)))
        for _, (calls, _), _ in row.rounds:
            count(report.calls, str(len(calls)))

    def _count_refusal(self, told: dict[str, object]) -> None:
        code = str(told["code"])
        count(self.summary.report.rejected, code)
        examples = self.summary.report.examples.setdefault(code, [])
        if len(examples) < EXAMPLES:
            examples.append({key: value for key, value in told.items() if key != "row"})

    def _check_length(self, row: Row) -> None:
        longest = max((count_characters(e) for _, e in self._renderer.alone(row, row.tools)), default=0)
        if longest > self._spec.max_row_characters:
            raise Refused(ROW_TOO_LONG, f"{longest} characters after conversion")


def smallest_tools(pool: dict[str, tuple[int, Tool]]) -> list[tuple[int, Tool]]:
    """The POOL tools that come first in the seeded order."""
    return heapq.nsmallest(POOL, pool.values())


def to_row(conversation: Conversation, chunk: Chunk, offset: int) -> Row:
    """A conversation with the place that it stood at. offset: as `RawRow` has it."""
    row_id, tools, rounds, system, instruction = conversation
    own = row_id or f"{chunk.name}@{offset}"
    return Row(own, chunk.name, offset, chunk.source, tools, rounds, system, instruction)
