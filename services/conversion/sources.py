"""Reads raw rows, one line at a time, with the line number and byte offset that a refusal names."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from services.common.errors import InvalidData
from services.conversion.refusals import INVALID_JSON, ROW_TOO_LARGE, WRONG_ENCODING, Refused

BOM = b"\xef\xbb\xbf"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class RawRow:
    """One line of a source. offset: bytes before it in the (unpacked) file."""

    source: str
    line: int
    offset: int
    data: bytes


def find_files(path: Path, pattern: str) -> list[Path]:
    """The rows files of a source, in order. Raises InvalidData when there are none."""
    if path.is_file():
        return [path]
    found = [f for f in sorted(path.rglob(pattern or "*")) if f.is_file() and f.name.endswith(SUFFIXES)]
    if not found:
        raise InvalidData(
            f"{path.name} has no rows files{f' that match {pattern!r}' if pattern else ''}; they end in {', '.join(SUFFIXES)}"
        )
    return found


def read_rows(file: Path, source: str) -> Iterator[RawRow]:
    """The lines of a file that are not blank. Raises InvalidData when it cannot be unpacked."""
    offset = 0
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield RawRow(source, number, offset, line.rstrip(b"\r\n"))
                offset += len(line)
    except (gzip.BadGzipFile, EOFError) as error:
        raise InvalidData(f"{file.name} cannot be unpacked: {error}") from None


def decode_row(data: bytes, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a line. Raises Refused."""
    if len(data) > max_bytes:
        raise Refused(ROW_TOO_LARGE, f"{len(data)} bytes")
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


def _open(file: Path) -> IO[bytes]:
    if file.name.endswith(".gz"):
        return gzip.open(file, "rb")  # type: ignore[return-value]  # GzipFile is read like one
    if file.name.endswith(".zst"):
        import zstandard

        return zstandard.open(file, "rb")  # type: ignore[no-any-return]
    return file.open("rb")
