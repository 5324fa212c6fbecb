"""Streamed LoRA merge: base shards in, shards of the same names, order and dtypes out; one tensor in memory at a time.

W' = round(W + scale · B @ A), summed in float32 and rounded once to the base's dtype, as peft's `merge_and_unload` does
(peft 0.20, tuners/lora/layer.py). Headers are kept byte for byte, so tensors stay where they were; untouched bytes are
copied by the kernel.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from services.common.errors import DataLoss, InvalidData, ResourceExhausted, Violation
from services.merging.adapter import WEIGHTS, Adapter
from services.merging.tensors import DTYPES, Array, TensorFile, open_all

CHUNK = 64 << 20
CHECKED = 8
"""Merged tensors that are read back and compared after writing."""
FLOATS = ("F64", "F32", "F16", "BF16")
OnTensor = Callable[[int, int], None]


@dataclass(frozen=True)
class Merged:
    """What a merge has done."""

    tensors: int
    merged: int
    replaced: int
    bytes: int


def merge_folder(base: Path, adapter: Adapter, output: Path, on_tensor: OnTensor = lambda done, total: None) -> Merged:
    """Write base + adapter into `output`. Raises InvalidData before a byte is written when they do not fit together."""
    where = open_all(base)
    check_fit(base, adapter, where)
    files = sorted(set(where.values()))
    needed, free = sum(f.stat().st_size for f in files), shutil.disk_usage(output).free
    if needed > free:
        raise ResourceExhausted(
            f"the merged model needs {needed / 1e9:.1f} GB at {output}; {free / 1e9:.1f} GB are free"
        )
    done = 0
    with TensorFile(adapter.folder / WEIGHTS) as deltas:
        for path in files:
            with TensorFile(path) as tensors:
                try:
                    done = _merge_file(tensors, deltas, adapter, output / path.name, done, len(where), on_tensor)
                except OSError as error:
                    raise ResourceExhausted(
                        f"writing {path.name} failed: {error.strerror}; is the disk full?"
                    ) from None
        verify(base, adapter, output, deltas)
    return Merged(len(where), len(adapter.pairs), len(adapter.saved), needed)


def merge_tensor(weight: Array, adapter: Adapter, deltas: TensorFile, name: str) -> Array:
    """One merged tensor, in the base's dtype. weight: (out, in), or (in, out) with fan_in_fan_out."""
    if name in adapter.saved:
        return deltas.read(adapter.saved[name]).astype(weight.dtype)
    return (weight.astype(np.float32) + adapter.delta(deltas, name).weight()).astype(weight.dtype)


def check_fit(base: Path, adapter: Adapter, where: dict[str, Path]) -> None:
    """Raises InvalidData naming the tensors of the adapter that the base does not have, or has in another shape."""
    wrong: list[Violation] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(where.values())):
        with TensorFile(path) as tensors:
            shapes |= {name: e.shape for name, e in tensors.entries.items()}
    flip = bool(adapter.config.get("fan_in_fan_out"))
    for weight, (name_a, name_b) in adapter.pairs.items():
        made = (adapter.entries[name_b].shape[0], adapter.entries[name_a].shape[-1])
        made = made[::-1] if flip else made
        if shapes.get(weight) != made:
            wrong.append(
                Violation(weight, f"is {shapes.get(weight, 'not there')} in the base model, {made} in the adapter")
            )
    for weight, name in adapter.saved.items():
        if shapes.get(weight) != adapter.entries[name].shape:
            there = shapes.get(weight, "not there (tied?)")
            wrong.append(
                Violation(weight, f"is {there} in the base model, {adapter.entries[name].shape} in modules_to_save")
            )
    if wrong:
        raise InvalidData(f"the adapter was made for another base model than {base.name}", violations=wrong[:5])


def verify(base: Path, adapter: Adapter, output: Path, deltas: TensorFile) -> None:
    """Read some merged tensors back and compare them with the definition. Raises DataLoss."""
    names = sorted([*adapter.pairs, *adapter.saved])
    where = open_all(base)
    for name in names[:: max(1, len(names) // CHECKED)]:
        with TensorFile(where[name]) as before, TensorFile(output / where[name].name) as after:
            found = after.read(name)
            if not np.array_equal(found, merge_tensor(before.read(name), adapter, deltas, name)):
                raise DataLoss(f"{name} was not written as it should be")


def _merge_file(
    tensors: TensorFile, deltas: TensorFile, adapter: Adapter, target: Path, done: int, total: int, on_tensor: OnTensor
) -> int:
    touched = adapter.pairs.keys() | adapter.saved.keys()
    with tensors.path.open("rb") as source, target.open("wb") as out:
        out.write(struct.pack("<Q", len(tensors.header)) + tensors.header)
        at = 8 + len(tensors.header)
        for entry in sorted(tensors.entries.values(), key=lambda e: e.begin):
            if entry.name in touched:
                _copy(source, out, at, entry.begin)
                if entry.dtype not in FLOATS:
                    raise InvalidData(
                        f"{entry.name} is {entry.dtype}; only {', '.join(FLOATS)} can be merged (quantized base?)"
                    )
                merged = merge_tensor(tensors.read(entry.name), adapter, deltas, entry.name)
                if not np.isfinite(merged.astype(np.float32)).all():
                    raise InvalidData(f"{entry.name} would have NaN or infinite values")
                out.write(np.ascontiguousarray(merged, dtype=DTYPES[entry.dtype]).tobytes())
                at = entry.end
            done += 1
            on_tensor(done, total)
        _copy(source, out, at, tensors.path.stat().st_size)
    return done


def _copy(source: BinaryIO, out: BinaryIO, begin: int, end: int) -> None:
    """Copy bytes begin..end within the kernel (reflinked where the file system can)."""
    out.flush()
    source.seek(begin)
    out.seek(begin)
    left = end - begin
    while left > 0:
        try:
            count = os.copy_file_range(source.fileno(), out.fileno(), min(left, CHUNK))
        except OSError:
            count = 0  # another file system, or one that cannot: through user space then
        if not count:
            source.seek(end - left)
            out.seek(end - left)
            while data := source.read(min(left, CHUNK)):
                left -= out.write(data)
            out.flush()
            break
        left -= count
    out.seek(end)
