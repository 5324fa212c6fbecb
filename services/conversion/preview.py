"""Rows before and after, with every change marked: what a conversion would do to them, without doing it.

A row is converted alone: no tools of other rows, no questions beside its own, and nothing is left out as a duplicate.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from services.common.errors import InvalidData
from services.conversion.changes import Span, cut_spans, mark_changes
from services.conversion.readers.turns import list_turns
from services.conversion.reading import understand_row
from services.conversion.refusals import REASONS, ROW_TOO_LONG, Refused
from services.conversion.rendering import Renderer, count_characters
from services.conversion.report import EXCERPT
from services.conversion.sources import PARQUET, Chunk, RawRow, decode_row, find_files, read_rows, read_table
from services.conversion.spec import Source, Spec
from services.conversion.spill import Row

ROWS, MOST_ROWS = 5, 50
LONGEST_TEXT = 20_000
MOST_EXAMPLES = 8
"""Training rows shown of a row: one with many calls makes many, each with all that was said before."""
HEAD_BYTES = 8 << 20
"""So much of a rows file is read, and unpacked, on a server."""

Mark = Callable[[str, str], Sequence[Span]]


class PreviewedMessage(NamedTuple):
    """A turn; after the conversion with what has changed in it, and whether training learns it."""

    role: str
    text: str
    trained: bool = False
    spans: Sequence[Span] = ()


class PreviewedExample(NamedTuple):
    """A training row."""

    layout: str
    messages: Sequence[PreviewedMessage]


class PreviewedRefusal(NamedTuple):
    """Why a row is refused."""

    code: str
    expected: str
    found: str
    excerpt: str


class PreviewedRow(NamedTuple):
    """A row before and after. Mirrors fabrictune.v1.PreviewedRow, which says what its fields mean."""

    source: str
    line: int
    id: str
    before: Sequence[PreviewedMessage] = ()
    after: Sequence[PreviewedExample] = ()
    after_left_out: int = 0
    refusal: PreviewedRefusal | None = None


class RawTurn(NamedTuple):
    """A turn of the row as it is, whatever its form."""

    role: str
    text: str


def preview_path(path: Path, spec: Spec, rows: int) -> Iterator[PreviewedRow]:
    """The first rows of a file or folder, as the spec's first source. Raises InvalidData: there are no rows."""
    source = spec.sources[0]
    raws = (
        (raw, file.name)
        for file in find_files(path, source.files)
        for raw in read_rows(Chunk(0, 0, str(file), file.name), spec.max_row_bytes)
        if raw.data.strip()
    )
    for raw, name in islice(raws, rows):
        yield preview_row(raw.data, source, spec, raw.line, name)


def preview_head(head: bytes, whole: bool, name: str, spec: Spec, rows: int) -> Iterator[PreviewedRow]:
    """The first rows of a rows file of which only the beginning is there. whole: it is all of it. Raises InvalidData."""
    for number, line in islice(_list_lines(head, whole, name, rows), rows):
        yield preview_row(line, spec.sources[0], spec, number, name)


def preview_row(data: bytes, source: Source, spec: Spec, line: int, name: str = "") -> PreviewedRow:
    """A row before and after, or why it is refused. name: of its file."""
    shown = PreviewedRow(name or source.uri, line, f"{name or source.uri}:{line}")
    turns: Sequence[RawTurn] = ()
    try:
        turns = _list_turns(decode_row(data, spec.max_row_bytes))
        shown = shown._replace(before=[PreviewedMessage(_cut(turn.role), _cut(turn.text)) for turn in turns])
        told = understand_row(RawRow(data, line, 0), source, spec)
        shown = shown._replace(id=_cut(told.id) or shown.id)
        row = Row(shown.id, shown.source, 0, 0, told.tools, told.rounds, told.system, told.instruction)
        renderer = Renderer(spec.model_copy(update={"sources": (source,)}))
        examples = renderer.alone(row, row.tools)
        if any(renderer.is_too_long(example) for _, example in examples):
            longest = max(count_characters(example) for _, example in examples)
            raise Refused(ROW_TOO_LONG, f"{longest} characters after conversion")
    except Refused as refused:
        excerpt = data.decode("utf-8", errors="replace")[:EXCERPT]
        refusal = PreviewedRefusal(refused.code, REASONS[refused.code].expected, _cut(refused.detail), excerpt)
        return shown._replace(refusal=refusal)
    mark = lru_cache(maxsize=64)(mark_changes)  # what training rows of one row have in common is compared once
    after = [_show(layout, example.messages, turns, mark) for layout, example in examples[:MOST_EXAMPLES]]
    return shown._replace(after=after, after_left_out=len(examples) - len(after))


def to_plain(value: Any) -> Any:
    """A previewed row as the JSON form of its message."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {k: to_plain(v) for k, v in zip(value._fields, value, strict=True) if v is not None}
    return [to_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _list_lines(head: bytes, whole: bool, name: str, rows: int) -> Iterator[tuple[int, bytes]]:
    """(its number, from 1, line) of the lines that are not blank."""
    if name.endswith(PARQUET):
        if not whole:
            # What its columns are stands at its end.
            raise InvalidData(
                f"{name} cannot be previewed here: of Parquet only files up to {HEAD_BYTES >> 20} MiB can"
            )
        yield from ((row.line, row.data) for row in read_table(head, name, rows))
        return
    text, complete = _unpack(head, name)
    lines = text.split(b"\n")
    if not (whole and complete) and len(lines) > 1:
        lines.pop()  # it may be torn
    yield from ((number, line.rstrip(b"\r")) for number, line in enumerate(lines, 1) if line.strip())


def _show(layout: str, messages: Sequence[Mapping[str, Any]], turns: Sequence[RawTurn], mark: Mark) -> PreviewedExample:
    """A training row, each message beside the turn that it was made from."""
    shown: list[PreviewedMessage] = []
    system, rounds = _rounds(turns)
    asked = -1
    for group in _group(messages):
        role = group[0]["role"]
        asked += role == "user"
        was = system if role == "system" else rounds[asked][role == "assistant"] if 0 <= asked < len(rounds) else ""
        texts = [_cut(str(message["content"])) for message in group]
        pieces = cut_spans(mark(_cut(was), "".join(texts)), [len(text) for text in texts])
        for message, text, spans in zip(group, texts, pieces, strict=True):
            trained = role == "assistant" and message.get("loss") is not False
            shown.append(PreviewedMessage(role, text, trained, spans))
    return PreviewedExample(layout, shown)


def _group(messages: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Messages one by one, but those of the assistant that follow each other together: they are one turn."""
    group: list[Mapping[str, Any]] = []
    for message in messages:
        if group and not group[-1]["role"] == message["role"] == "assistant":
            yield group
            group = []
        group.append(message)
    if group:
        yield group


def _rounds(turns: Sequence[RawTurn]) -> tuple[str, list[tuple[str, str]]]:
    """(all before the first question, [(question, all that followed until the next one)])."""
    system: list[str] = []
    rounds: list[tuple[str, list[str]]] = []
    for turn in turns:
        if turn.role == "user":
            rounds.append((turn.text, []))
        else:
            (rounds[-1][1] if rounds else system).append(turn.text)
    return "\n".join(system), [(question, "\n".join(answers)) for question, answers in rounds]


def _list_turns(row: Mapping[str, Any]) -> list[RawTurn]:
    """The row's turns, as far as they can be made out: a refused row is shown, too. Its tools come first."""
    try:
        listed = list_turns(row)
    except Refused:
        return []
    tools = [RawTurn("tools", _plain(row["tools"]))] if row.get("tools") else []
    return tools + [_turn(turn) for turn in listed]


def _turn(turn: Any) -> RawTurn:
    if not isinstance(turn, Mapping):
        return RawTurn("?", _plain(turn))
    role = turn.get("from", turn.get("role"))
    text = turn.get("value", turn.get("content"))
    more = {k: v for k, v in turn.items() if k not in ("from", "role", "value", "content") and v}
    parts = [_plain(part) for part in (text, more) if part]
    return RawTurn(str(role or "?"), "\n".join(parts))


def _plain(value: Any) -> str:
    """Text as it is, anything else as JSON."""
    if isinstance(value, str):
        return value
    try:
        return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # too deep, or text that is none
        return "…"


def _cut(text: str) -> str:
    """The text as a message can carry it: not too long, and without halves of surrogate pairs."""
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]}\n… (cut: {len(text) - LONGEST_TEXT:,} more characters)"
    return text.encode(errors="replace").decode()


def _unpack(head: bytes, name: str) -> tuple[bytes, bool]:
    """(at most HEAD_BYTES of text, whether it is all). Raises InvalidData."""
    try:
        if name.endswith(".gz"):
            unpacker = zlib.decompressobj(wbits=31)
            text = unpacker.decompress(head, HEAD_BYTES)
            return text, unpacker.eof and not unpacker.unused_data
        if name.endswith(".zst"):
            import zstandard

            try:
                with zstandard.ZstdDecompressor().stream_reader(BytesIO(head), read_across_frames=True) as unpacked:
                    text = unpacked.read(HEAD_BYTES)
                    return text, not unpacked.read(1)
            except zstandard.ZstdError as error:
                raise InvalidData(f"{name} cannot be unpacked: {error}") from None
    except zlib.error as error:
        raise InvalidData(f"{name} cannot be unpacked: {error}") from None
    if name.endswith(".jsonl"):
        return head, True
    raise InvalidData(
        f"{name} cannot be previewed here: only .jsonl, .jsonl.gz, .jsonl.zst and small .parquet files can"
    )
