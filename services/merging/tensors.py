"""Safetensors files without torch: headers read and written, tensors mapped from disk one at a time.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
Source: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from services.common.errors import InvalidData

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. begin, end: bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file, mapped. Use it in a `with`. Raises InvalidData when it is truncated or no safetensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        self._file = path.open("rb")
        try:
            self.header, self.entries = _read_header(path, self._file.read(8), self._file, size)
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()
        self._file.close()

    def read(self, name: str) -> Array:
        """A copy of a tensor."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise InvalidData(f"{self.path.name}: {name} has the dtype {entry.dtype}, which a merge does not know")
        data = self._map[entry.begin : entry.end]
        return np.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)

    def raw(self, begin: int, end: int) -> bytes:
        """Bytes of the file."""
        return self._map[begin:end]


def open_all(folder: Path) -> dict[str, Path]:
    """Tensor name → its file, for all safetensors of a folder. Raises InvalidData (none, or a name twice)."""
    where: dict[str, Path] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidData(f"{folder} has no *.safetensors weights; pickled weights are never read")
    for path in files:
        with TensorFile(path) as tensors:
            for name in tensors.entries:
                if name in where:
                    raise InvalidData(f"the tensor {name} is in {where[name].name} and in {path.name}")
                where[name] = path
    return where


def _read_header(path: Path, prefix: bytes, data: Any, size: int) -> tuple[bytes, dict[str, Entry]]:
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER + 1
    if length > min(MAX_HEADER, size - 8):
        raise InvalidData(
            f"{path.name} is no safetensors file, or is truncated: its header would be {length} bytes long"
        )
    raw = data.read(length)
    try:
        told = json.loads(raw)
        entries = {
            name: Entry(
                name,
                e["dtype"],
                tuple(e["shape"]),
                8 + length + e["data_offsets"][0],
                8 + length + e["data_offsets"][1],
            )
            for name, e in told.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InvalidData(f"{path.name} has a header that cannot be read: {error}") from None
    short = [e.name for e in entries.values() if e.end > size or e.begin > e.end]
    if short:
        raise InvalidData(f"{path.name} is truncated: {short[0]} ends beyond the file ({size} bytes)")
    return raw, entries
