"""Rows on disk between the two passes, in buckets of the seeded order: each bucket fits into memory and is sorted there.

How many buckets there are depends on the sources' size alone, and a row's bucket on its hash alone; so whoever reads the
rows, and in how many processes, the result is the same. Rows repeat their tools, so each process writes a tool once and
its rows name it by its number.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from services.common.fabric import Round, Tool

BUCKET_BYTES, LARGEST_BUCKET, FEW_BUCKETS = 4 << 20, 5 << 20, 64
"""Of the sources' bytes: few buckets are small, so that processes have the same to do; from so many on they grow."""
BUFFER_BYTES = 6 << 20
"""Of all buckets of a name together, in one process."""
TOOLS_BYTES = 24 << 20
"""Of tools that rows name by a number, in all processes together; each of the second pass holds them."""
ROWS, TOOLS = "rows", "tools"
_HEAD = struct.Struct(">QIII?")
"""Order, chunk, number in the chunk, length, whether it is a draft: sorted, they are in the seeded order."""
PLACE = struct.Struct(">II")
"""Chunk, number in the chunk."""


class Row(NamedTuple):
    """A row that has been understood, as it waits on disk."""

    id: str
    file: str
    """The name of the file that it stood in."""
    offset: int
    source: int
    """Among the spec's sources; the one after the last is self-cognition."""
    tools: tuple[Tool, ...]
    rounds: tuple[Round, ...]
    system: str | None = None
    instruction: str = ""

    @property
    def key(self) -> str:
        """What seeded orders know it by."""
        return f"{self.file}:{self.id}:{self.offset}"


class _Packed(NamedTuple):
    """A Row as it is written: a tool is a number of its process's `KnownTools`, or itself where these are full."""

    id: str
    file: str
    offset: int
    source: int
    tools: tuple[int | Tool, ...]
    rounds: tuple[Round, ...]
    system: str | None
    instruction: str


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Packed).decode
_decode_tools = msgspec.msgpack.Decoder(list[Tool]).decode


def count_buckets(unpacked_bytes: int) -> int:
    """How many buckets rows of so many bytes are dealt to."""
    return max(1, min(FEW_BUCKETS, -(-unpacked_bytes // BUCKET_BYTES)), -(-unpacked_bytes // LARGEST_BUCKET))


class KnownTools:
    """The tools that one process has written, by number."""

    def __init__(self, most_bytes: int) -> None:
        """most_bytes: of them all; tools that come later have no number."""
        self._numbers: dict[Tool, int] = {}
        self._room = most_bytes

    def number(self, tool: Tool) -> int | None:
        """A tool's number, if it has one."""
        return self._numbers.get(tool)

    def add(self, tool: Tool) -> None:
        """Give a tool a number, where there is room for it."""
        size = 4 * sum(map(len, tool)) + 200  # of its texts, at most, and of the objects around them
        if size <= self._room:
            self._room -= size
            self._numbers.setdefault(tool, len(self._numbers))

    @property
    def tools(self) -> list[Tool]:
        """Those that have a number, in order."""
        return list(self._numbers)

    def save(self, folder: Path) -> None:
        """Write them beside the rows."""
        (folder / TOOLS).write_bytes(_encode(self.tools))


def read_tools(folders: Sequence[Path]) -> list[list[Tool]]:
    """What each folder's rows name by number. A tool that several know is one object."""
    one: dict[Tool, Tool] = {}
    return [[one.setdefault(tool, tool) for tool in _decode_tools((folder / TOOLS).read_bytes())] for folder in folders]


class Buckets:
    """Append-only files, one a bucket, written in large pieces: hundreds of them need no hundreds of open files."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self._folder, self._name, self.count = folder, name, count
        self._limit = max(4096, BUFFER_BYTES // count)
        # Filled again and again: one that grows would be moved by each row or so, for other things lie behind it.
        self._held: dict[int, bytearray] = {}
        self._ends = [0] * count

    def put(self, bucket: int, data: bytes) -> None:
        """Append to a bucket."""
        start = self._ends[bucket]
        end = start + len(data)
        if end > self._limit:
            self._flush(bucket)
            start, end = 0, len(data)
            if end > self._limit:
                self._append(bucket, data)
                return
        held = self._held.get(bucket)
        if held is None:
            held = self._held[bucket] = bytearray(self._limit)
        held[start:end] = data
        self._ends[bucket] = end

    def put_hashed(self, digest: bytes, data: bytes) -> None:
        """Append to the bucket that the first eight bytes of a hash name."""
        self.put(int.from_bytes(digest[:8], "big") * self.count >> 64, data)

    def close(self) -> None:
        """Write what is still held."""
        for bucket in self._held:
            self._flush(bucket)
        self._held.clear()

    def _flush(self, bucket: int) -> None:
        if end := self._ends[bucket]:
            self._append(bucket, memoryview(self._held[bucket])[:end])
            self._ends[bucket] = 0

    def _append(self, bucket: int, data: bytes | memoryview) -> None:
        with bucket_file(self._folder, self._name, bucket).open("ab", buffering=0) as file:
            file.write(data)


def bucket_file(folder: Path, name: str, bucket: int) -> Path:
    """Where a bucket lies."""
    return folder / f"{name}-{bucket:06d}"


def read_bucket(folders: Sequence[Path], name: str, bucket: int) -> bytes:
    """All that was put into a bucket by any process. The files are gone afterwards."""
    return b"".join([_take_file(bucket_file(folder, name, bucket)) for folder in folders])


def _take_file(file: Path) -> bytes:
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return b""
    file.unlink()
    return data


def pack_row(row: Row, tools: Sequence[int | Tool]) -> bytes:
    """A row as it lies in its bucket. tools: its own, by number where they have one."""
    row_id, file, offset, source, _, rounds, system, instruction = row
    return _encode((row_id, file, offset, source, tools, rounds, system, instruction))


def place_row(packed: bytes, order: int, chunk: int, number: int, is_draft: bool) -> bytes:
    """A packed row or draft with its place before it."""
    return _HEAD.pack(order, chunk, number, len(packed), is_draft) + packed


def unpack_rows(
    folders: Sequence[Path], tables: Sequence[Sequence[Tool]], bucket: int
) -> Iterator[tuple[tuple[int, int], memoryview, bool, Sequence[Tool]]]:
    """((chunk, number), still packed, whether it is a draft, tools by number) of a bucket's rows, in the seeded order.

    tables: `read_tools` of the folders. The files are gone afterwards.
    """
    views = [memoryview(_take_file(bucket_file(folder, ROWS, bucket))) for folder in folders]
    found: list[tuple[int, int, int, int, int, int, bool]] = []
    for part, view in enumerate(views):
        position, end = 0, len(view)
        while position < end:
            order, chunk, number, length, is_draft = _HEAD.unpack_from(view, position)
            start = position + _HEAD.size
            position = start + length
            found.append((order, chunk, number, part, start, position, is_draft))
    found.sort()
    for _, chunk, number, part, start, end, is_draft in found:
        yield (chunk, number), views[part][start:end], is_draft, tables[part]


def unpack_row(data: memoryview, known: Sequence[Tool]) -> Row:
    """The row. known: the tools that it names by number."""
    row_id, file, offset, source, tools, rounds, system, instruction = _decode(data)
    return Row(row_id, file, offset, source, tuple(list_known(tools, known)), rounds, system, instruction)


def list_known(tools: Sequence[int | Tool], known: Sequence[Tool]) -> list[Tool]:
    """Tools themselves, out of numbers and tools."""
    return [known[tool] if isinstance(tool, int) else tool for tool in tools]
