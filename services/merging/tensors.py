"""Safetensors files without torch: headers read and checked, tensors mapped from disk.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data without holes.
Source: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from services.common.errors import InvalidData
from services.merging.blas import Array

DTYPES: Mapping[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER = 100 << 20
Read = Callable[[int, int], Any]
"""(begin, end) → these bytes of a file, as a buffer."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. begin, end: bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself. raw: the JSON as it stands there; entries: in the order of their data."""

    file: str
    raw: bytes
    entries: Mapping[str, Entry]
    size: int
    """Bytes of the whole file."""

    @property
    def data(self) -> int:
        """Where the tensors begin."""
        return 8 + len(self.raw)


class TensorFile:
    """A safetensors file, mapped. Use it in a `with`. Raises InvalidData when it is truncated or no safetensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        self.file = path.open("rb")
        try:
            self.header = read_header(path.name, size, self._read_file)
            self._map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        except BaseException:
            self.file.close()
            raise
        self._map.madvise(mmap.MADV_SEQUENTIAL)
        self._view = memoryview(self._map)

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Its tensors by name."""
        return self.header.entries

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._view.release()
        with suppress(BufferError):  # after an error its trace may still hold a view; the map goes with it
            self._map.close()
        self.file.close()

    def read(self, name: str) -> Array:
        """A copy of a tensor. Raises InvalidData (a dtype that is not known)."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise InvalidData(f"{self.path.name}: {name} has the dtype {entry.dtype}, which a merge does not know")
        data = self._map[entry.begin : entry.end]
        return np.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)

    def view(self, begin: int, end: int) -> memoryview:
        """Bytes of the file, not copied. Whoever has one releases it before the file is closed."""
        return self._view[begin:end]

    def forget(self, begin: int, end: int) -> None:
        """These bytes are not looked at again: they leave this process's memory, and stay in the page cache."""
        begin -= begin % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _read_file(self, begin: int, end: int) -> bytes:
        self.file.seek(begin)
        return self.file.read(end - begin)


def read_tensor(path: Path, entry: Entry) -> Array:
    """A tensor of a file whose header has been read."""
    with path.open("rb") as file:
        file.seek(entry.begin)
        return np.frombuffer(file.read(entry.end - entry.begin), dtype=DTYPES[entry.dtype]).reshape(entry.shape)


def read_header(file: str, size: int, read: Read) -> Header:
    """The header of a file of `size` bytes, checked against it. Raises InvalidData."""
    prefix = bytes(read(0, min(8, size)))
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER + 1
    if length > min(MAX_HEADER, size - 8):
        raise InvalidData(f"{file} is no safetensors file, or is truncated: its header would be {length} bytes long")
    raw = bytes(read(8, 8 + length))
    try:
        told = json.loads(raw)
        found = [
            Entry(name, e["dtype"], tuple(e["shape"]), *(8 + length + int(at) for at in e["data_offsets"]))
            for name, e in told.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidData(f"{file} has a header that cannot be read: {error}") from None
    found.sort(key=lambda entry: (entry.begin, entry.end))
    _check_layout(file, size, 8 + length, found)
    return Header(file, raw, {entry.name: entry for entry in found}, size)


def write_header(header: Header, added: Mapping[str, Entry]) -> bytes:
    """The first bytes of a file that is like another one, with tensors behind its last one: prefix and JSON.

    added: their begin and end are bytes from the first tensor's start.
    """
    if not added:
        return struct.pack("<Q", len(header.raw)) + header.raw
    told = json.loads(header.raw)
    for name, e in added.items():
        told[name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.begin, e.end]}
    raw = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the format's own writer aligns the data so
    return struct.pack("<Q", len(raw)) + raw


def _check_layout(file: str, size: int, data: int, entries: list[Entry]) -> None:
    at = data
    for e in entries:
        if e.begin != at or e.end < e.begin:
            raise InvalidData(f"{file} has a header that does not fit its data: {e.name} begins at byte {e.begin}")
        width = DTYPES[e.dtype].itemsize if e.dtype in DTYPES else None
        if width is not None and e.end - e.begin != math.prod(e.shape) * width:
            raise InvalidData(f"{file}: {e.name} is {e.dtype} {list(e.shape)}, but {e.end - e.begin} bytes long")
        at = e.end
    if at != size:
        last = f"its tensors end at byte {at}"
        raise InvalidData(f"{file} is truncated or has been added to: {last}, the file at {size}")
