"""Rows on disk between the two passes, in buckets of the seeded order: each bucket fits into memory and is sorted there.

How many buckets there are depends on the sources' size alone, and a row's bucket on its hash alone; so whoever reads the
rows, and in how many processes, the result is the same.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from services.common.fabric import Round, Tool

BUCKET_BYTES = 12 << 20
BUFFER_BYTES = 6 << 20
"""Of all buckets of a name together, in one process."""
_HEAD = struct.Struct(">QIII")
"""Order, chunk, number in the chunk, length: sorted as bytes, they are in the seeded order."""
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


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Row).decode


def count_buckets(unpacked_bytes: int) -> int:
    """How many buckets rows of so many bytes are dealt to."""
    return max(1, -(-unpacked_bytes // BUCKET_BYTES))


class Buckets:
    """Append-only files, one a bucket, written in large pieces: hundreds of them need no hundreds of open files."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self._folder, self._name, self.count = folder, name, count
        self._held: dict[int, bytearray] = {}
        self._limit = max(4096, BUFFER_BYTES // count)

    def put(self, bucket: int, data: bytes) -> None:
        """Append to a bucket."""
        held = self._held.setdefault(bucket, bytearray())
        held += data
        if len(held) > self._limit:
            self._flush(bucket)

    def put_hashed(self, digest: bytes, data: bytes) -> None:
        """Append to the bucket that the first eight bytes of a hash name."""
        self.put(int.from_bytes(digest[:8], "big") * self.count >> 64, data)

    def close(self) -> None:
        """Write what is still held."""
        for bucket in list(self._held):
            self._flush(bucket)

    def _flush(self, bucket: int) -> None:
        with bucket_file(self._folder, self._name, bucket).open("ab") as file:
            file.write(self._held.pop(bucket))


def bucket_file(folder: Path, name: str, bucket: int) -> Path:
    """Where a bucket lies."""
    return folder / f"{name}-{bucket:06d}"


def read_bucket(folders: Sequence[Path], name: str, bucket: int) -> bytes:
    """All that was put into a bucket by any process. The files are gone afterwards."""
    found = []
    for folder in folders:
        file = bucket_file(folder, name, bucket)
        if file.exists():
            found.append(file.read_bytes())
            file.unlink()
    return b"".join(found)


def pack_row(row: Row, order: int, chunk: int, number: int) -> bytes:
    """A row as it lies in its bucket."""
    body = _encode(row)
    return _HEAD.pack(order, chunk, number, len(body)) + body


def unpack_rows(data: bytes) -> Iterator[tuple[tuple[int, int], memoryview]]:
    """((chunk, number), row still packed) of a bucket, in the seeded order; `unpack_row` reads it."""
    view, found, position = memoryview(data), list[tuple[bytes, int]](), 0
    while position < len(data):
        found.append((data[position : position + 16], position))
        position += _HEAD.size + int.from_bytes(data[position + 16 : position + 20], "big")
    for head, start in sorted(found):
        length = int.from_bytes(data[start + 16 : start + 20], "big")
        body = start + _HEAD.size
        yield PLACE.unpack(head[8:]), view[body : body + length]


def unpack_row(data: memoryview) -> Row:
    """The row."""
    return _decode(data)
