"""After the merge: the files are what the plan says, and some merged rows are what the definition says, computed anew.

The definition is evaluated in float64 and shares no arithmetic with the merge, so a wrong sign, scale, order or offset cannot
hide; how the last bit is rounded is the tests' matter, beside peft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import ml_dtypes
import numpy as np

from services.common.errors import DataLoss
from services.merging.blas import Array
from services.merging.merge import Piece, split_entry
from services.merging.mixture import Mixture
from services.merging.plan import Plan, Step
from services.merging.tensors import DTYPES, Entry, Header, Read, read_header

CHECKED = 8
"""Tensors of a model that are read back."""
ROWS = 4
"""Of each of them."""
ReadFile = Callable[[str, int, int], bytes]
"""(file, begin, end) → bytes."""


def verify(plan: Plan, mixture: Mixture, read_base: ReadFile, read_merged: ReadFile, sizes: dict[str, int]) -> None:
    """Raises DataLoss. sizes: of the merged files."""
    merged = {}
    for header in plan.headers:
        found = read_header(header.file, sizes[header.file], partial(read_merged, header.file))
        _check_layout(header, plan, found)
        merged[header.file] = found
    names = [(h, e) for h in plan.headers for name, e in h.entries.items() if name in plan.steps]
    for header, entry in names[:: max(1, len(names) // CHECKED)]:
        target = merged[header.file].entries[entry.name]
        for piece in _sample(entry):
            before = _read(partial(read_base, header.file), piece.begin, piece.end, entry)
            begin = target.begin + piece.begin - entry.begin
            after = _read(partial(read_merged, header.file), begin, begin + piece.end - piece.begin, entry)
            _check_rows(plan.steps[entry.name], mixture, piece, before, after)


def _check_layout(header: Header, plan: Plan, found: Header) -> None:
    wanted = {**header.entries, **plan.added.get(header.file, {})}
    for name, entry in wanted.items():
        there = found.entries.get(name)
        if there is None or (there.dtype, there.shape) != (entry.dtype, entry.shape):
            raise DataLoss(f"{header.file}: {name} was not written as {entry.dtype} {entry.shape}")
    if len(found.entries) != len(wanted):
        raise DataLoss(f"{header.file} has {len(found.entries)} tensors, not {len(wanted)}")


def _sample(entry: Entry) -> list[Piece]:
    """The first rows and the last ones."""
    pieces = list(split_entry(entry, is_touched=True, step=ROWS))
    return pieces[:1] + pieces[-1:]


def _check_rows(steps: Sequence[Step], mixture: Mixture, piece: Piece, before: Array, after: Array) -> None:
    wanted, size = before.astype(np.float64), np.abs(before.astype(np.float64))
    for step in steps:
        if step.saved:
            stored = step.adapter.read(step.saved)[piece.first : piece.first + len(before)]
            wanted = stored.astype(np.float64)
            size = np.abs(wanted)
            continue
        change = mixture.low_rank(step.module, step.is_transposed, after.dtype)
        if change.magnitude is not None and change.is_transposed:
            return  # its norms need the whole tensor
        left, right = change.left.astype(np.float64), change.right.astype(np.float64)
        rows = slice(piece.first, piece.first + len(before))
        delta = change.scale * (left[rows] @ right)
        size = size + np.abs(change.scale) * (np.abs(left[rows]) @ np.abs(right))
        wanted = wanted + delta
        if change.magnitude is not None:
            factor = (change.magnitude[rows] / np.linalg.norm(wanted, axis=1))[:, None]
            wanted, size = wanted * factor, size * np.abs(factor)
    unit = float(ml_dtypes.finfo(after.dtype).eps)
    smallest = float(ml_dtypes.finfo(after.dtype).smallest_subnormal)
    if not (np.abs(after.astype(np.float64) - wanted) <= 4 * unit * size + smallest).all():
        raise DataLoss(f"{piece.entry.name} was not written as the definition says; the merge is thrown away")


def _read(read: Read, begin: int, end: int, entry: Entry) -> Array:
    return np.frombuffer(read(begin, end), dtype=DTYPES[entry.dtype]).reshape(-1, *entry.shape[1:])
