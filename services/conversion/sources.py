"""Finds the rows of a source and reads them in chunks, each by itself: the unit that processes and shards share out.

A plain file is cut about every CHUNK_BYTES at a line's end; what is packed is read from its beginning, so it is one chunk.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import orjson

from services.common.errors import InvalidData
from services.conversion.refusals import INVALID_JSON, ROW_TOO_LARGE, WRONG_ENCODING, Refused

BOM = b"\xef\xbb\xbf"
PACKED = (".jsonl.gz", ".jsonl.zst")
PARQUET = ".parquet"
SUFFIXES = (".jsonl", *PACKED, PARQUET)
CHUNK_BYTES = 2 << 20
TABLE_ROWS = 256
"""Of a table, so many rows are in memory at a time."""
PIECE_BYTES = 256
"""So much of a zstd file is unpacked at a time: 4 bytes can stand for 128 kB, so at most 8 MB come of it."""
PACKED_RATIO = 6
"""About so many times larger are rows when they are unpacked."""


class RawRow(NamedTuple):
    """One line of a source, or one row of a table as JSON."""

    data: bytes
    line: int
    """In its chunk, from 1."""
    offset: int
    """Bytes before it in the (unpacked) file; rows before it in a table."""


class Chunk(NamedTuple):
    """A part of a file."""

    number: int
    """Among all chunks of the conversion."""
    source: int
    path: str
    name: str
    """The file's, as the report tells it."""
    start: int = 0
    end: int = 0
    """Bytes of a plain file: lines that begin in start..end. 0..0 reads all of it."""


def find_files(path: Path, pattern: str) -> list[Path]:
    """The rows files of a source, in order. Raises InvalidData when there are none."""
    if path.is_file():
        return [path]
    inside = [PurePosixPath(f.relative_to(path).as_posix()) for f in path.rglob("*") if f.is_file()]
    return [path / name for name in choose_files(path.name, inside, pattern)]


def choose_files(folder: str, paths: Iterable[PurePosixPath], pattern: str) -> list[PurePosixPath]:
    """Those of a folder's files that hold rows and match the pattern, in order. Raises InvalidData when there are none."""
    found = sorted(p for p in paths if p.name.endswith(SUFFIXES) and p.match(pattern or "*"))
    # Hidden ones are nobody's, unless there is nothing else: a file that was pushed by its name.
    found = [p for p in found if not any(part.startswith(".") for part in p.parts)] or found
    if not found:
        raise InvalidData(
            f"{folder} has no rows files{f' that match {pattern!r}' if pattern else ''}; they end in {', '.join(SUFFIXES)}"
        )
    return found


def cut_chunks(files: Sequence[tuple[int, Path]]) -> list[Chunk]:
    """(source's number, file) → chunks, in order. They depend on nothing but the files' sizes."""
    chunks: list[Chunk] = []
    for source, file in files:
        size = 0 if file.name.endswith((*PACKED, PARQUET)) else file.stat().st_size
        starts = range(0, size, CHUNK_BYTES) if size else (0,)
        chunks += [
            Chunk(len(chunks) + n, source, str(file), file.name, start, min(start + CHUNK_BYTES, size))
            for n, start in enumerate(starts)
        ]
    return chunks


def unpacked_bytes(files: Sequence[tuple[int, Path]]) -> int:
    """About how many bytes the rows of these files have."""
    return sum(
        file.stat().st_size * (PACKED_RATIO if file.name.endswith((*PACKED, PARQUET)) else 1) for _, file in files
    )


def read_rows(chunk: Chunk, max_bytes: int) -> Iterator[RawRow]:
    """The rows of a chunk, blank ones too, so that lines can be counted. Raises InvalidData when it cannot be unpacked.

    Of a line that is longer than max_bytes only so much is kept as tells that: a line without end fills no memory.
    """
    path = Path(chunk.path)
    if path.name.endswith(PARQUET):
        yield from read_table(path, path.name)
        return
    try:
        with _open(path) as lines:
            offset = _seek_line(lines, chunk.start)
            if chunk.end and offset >= chunk.end:
                return
            number = 0
            while line := lines.readline(max_bytes + 2):
                number += 1
                yield RawRow(line.rstrip(b"\r\n"), number, offset)
                offset += len(line)
                while not line.endswith(b"\n") and (line := lines.readline(CHUNK_BYTES)):
                    offset += len(line)
                if chunk.end and offset >= chunk.end:
                    return
    except (OSError, EOFError, zlib.error, _zstd_error(path)) as error:
        raise InvalidData(f"{path.name} cannot be unpacked: {error}") from None


def decode_row(data: bytes, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a line. Raises Refused."""
    if len(data) > max_bytes:
        raise Refused(ROW_TOO_LARGE, f"more than {max_bytes} bytes")
    try:
        # Twice as fast as the standard library's, and strict: NaN and half surrogate pairs are no JSON.
        row = orjson.loads(data.removeprefix(BOM))
    except orjson.JSONDecodeError as error:
        raise Refused(*_explain(data, error)) from None
    if not isinstance(row, dict):
        raise Refused(INVALID_JSON, "not an object")
    return row


def _explain(data: bytes, error: orjson.JSONDecodeError) -> tuple[str, str]:
    try:
        data.decode()
    except UnicodeDecodeError as wrong:
        return WRONG_ENCODING, f"byte {wrong.start} of the line"
    return INVALID_JSON, str(error)[:120]


def _seek_line(lines: io.BufferedIOBase, start: int) -> int:
    """Go to the first line that begins at `start` or after it; returns where that is."""
    if not start:
        return 0
    lines.seek(start - 1)
    position = start - 1
    while line := lines.readline(CHUNK_BYTES):
        position += len(line)
        if line.endswith(b"\n"):
            break
    return position


def read_table(table: Path | bytes, name: str, at_a_time: int = TABLE_ROWS) -> Iterator[RawRow]:
    """The rows of a Parquet file, or of all its bytes, as JSON. name: the file's. Raises InvalidData."""
    from arro3.io import read_parquet

    number = 0
    try:
        for batch in read_parquet(table, batch_size=at_a_time):
            names = batch.schema.names
            columns = [batch.column(name).to_pylist() for name in names]
            for values in zip(*columns, strict=True):
                number += 1
                row = dict(zip(names, values, strict=True))
                yield RawRow(orjson.dumps(row, default=str), number, number - 1)
    except (ValueError, OSError, TypeError) as error:
        raise InvalidData(f"{name} cannot be read as Parquet: {error}") from None
    except BaseException as error:
        # arro3 0.9.1 panics on a broken footer, and a panic is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise InvalidData(f"{name} cannot be read as Parquet: {error}") from None


def _zstd_error(path: Path) -> type[Exception]:
    if not path.name.endswith(".zst"):
        return OSError
    import zstandard

    return zstandard.ZstdError


def _open(path: Path) -> io.BufferedIOBase:
    if path.name.endswith(".gz"):
        return gzip.GzipFile(path)
    if path.name.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(path), 1 << 18)
    return io.BufferedReader(io.FileIO(path), 1 << 18)


class _ZstdFile(io.RawIOBase):
    """Frames of zstd as one stream. The reader of zstandard 0.25 ends a file that was cut off as if it were whole."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._file = path.open("rb")
        self._context = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises EOFError when the last frame is not whole."""
        while not self._ready:
            piece = self._packed or self._file.read(PIECE_BYTES)
            if not piece:
                if self._frame is not None:
                    raise EOFError("it ends in the middle")
                return 0
            self._frame = self._frame or self._context.decompressobj()
            self._ready = memoryview(self._frame.decompress(piece))
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        size = min(len(self._ready), len(buffer))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        """Close the file, too."""
        self._file.close()
        super().close()
