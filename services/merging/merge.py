"""Streamed merge: a file of the base in, one of the same name, order and dtypes out, piece by piece in the order of the bytes.

W' = round(W + scale · B @ A), summed in float32 and rounded once to the base's dtype, as peft's `merge_and_unload` does
(peft 0.20, tuners/lora/layer.py). Several workers compute ahead of the one that writes; memory is a few pieces each.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from services.common.errors import InvalidData
from services.merging.blas import Array
from services.merging.low_rank import LowRank
from services.merging.mixture import Mixture
from services.merging.plan import Plan, Step
from services.merging.rounding import is_finite
from services.merging.tensors import DTYPES, FLOATS, Entry, Header, Read, write_header

PIECE = 4 << 20
"""Bytes of a piece, about: some rows of a tensor."""
AHEAD = 2
"""Pieces that each worker may be ahead of the writer."""


@dataclass(frozen=True)
class Piece:
    """Whole rows of one tensor. begin, end: their bytes in the base's file; first: the first row."""

    entry: Entry
    begin: int
    end: int
    first: int
    is_touched: bool


@dataclass(frozen=True)
class Chunk:
    """Bytes of the merged file that come next. piece: where they come from; None for the header. source: as they were."""

    data: Any
    piece: Piece | None = None
    source: Any = b""


class Merge:
    """A planned merge, file by file. Threads may share it."""

    def __init__(self, plan: Plan, mixture: Mixture, workers: int = 0) -> None:
        self.plan, self._mixture = plan, mixture
        self._workers = workers or len(os.sched_getaffinity(0))
        self._lock = threading.Lock()
        self._changes: dict[str, list[_Change]] = {}
        self._done = 0

    @property
    def done(self) -> int:
        """Tensors whose last bytes have been handed out."""
        return self._done

    def chunks(self, header: Header, read: Read) -> Iterator[Chunk]:
        """The merged file, in order. read: of the base's file. Raises InvalidData (NaN or infinite values)."""
        yield Chunk(write_header(header, self.plan.added.get(header.file, {})))
        waiting: deque[tuple[Piece, Future[Chunk]]] = deque()
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                for piece in self._pieces(header):
                    waiting.append((piece, pool.submit(self.compute, piece, read)))
                    if len(waiting) > AHEAD * self._workers:
                        yield self._next(waiting)
                while waiting:
                    yield self._next(waiting)
            finally:
                pool.shutdown(cancel_futures=True)

    def compute(self, piece: Piece, read: Read) -> Chunk:
        """A piece, merged. Raises InvalidData."""
        data = read(piece.begin, piece.end)
        entry = piece.entry
        if entry.dtype not in FLOATS:
            return Chunk(data, piece, data)
        values = _rows(data, entry)
        if piece.is_touched:
            with np.errstate(all="ignore"):  # what is no number in the end is refused below, by name
                for change in self._changes_of(entry, read):
                    values = change.apply(values, piece.first)
        if not is_finite(values):
            what = "would have" if piece.is_touched and is_finite(_rows(data, entry)) else "has"
            raise InvalidData(f"{entry.name} {what} NaN or infinite values, so the merged model could not be used")
        merged = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data if piece.is_touched else data
        return Chunk(merged, piece, data)

    def _next(self, waiting: deque[tuple[Piece, Future[Chunk]]]) -> Chunk:
        piece, future = waiting.popleft()
        chunk = future.result()
        if piece.end == piece.entry.end:  # its matrices are not needed any more
            self._done += 1
            with self._lock:
                self._changes.pop(piece.entry.name, None)
        return chunk

    def _pieces(self, header: Header) -> Iterator[Piece]:
        for entry in header.entries.values():
            yield from split_entry(entry, entry.name in self.plan.steps)
        for name, entry in self.plan.added.get(header.file, {}).items():
            source = header.entries[self.plan.copied[name]]
            for piece in split_entry(source, is_touched=True):
                yield replace(piece, entry=replace(entry, begin=source.begin, end=source.end))

    def _changes_of(self, entry: Entry, read: Read) -> list[_Change]:
        """Made once for all pieces of a tensor, by the worker that comes first."""
        with self._lock:
            if entry.name not in self._changes:
                self._changes[entry.name] = self._prepare(entry, read)
            return self._changes[entry.name]

    def _low_rank(self, step: Step, entry: Entry) -> LowRank:
        return self._mixture.low_rank(step.module, step.is_transposed, DTYPES[entry.dtype])

    def _prepare(self, entry: Entry, read: Read) -> list[_Change]:
        made: list[_Change] = []
        for step in self.plan.steps.get(entry.name, ()):
            change = _Change(step, self._low_rank(step, entry) if step.module else None)
            if change.low_rank and change.low_rank.magnitude is not None and change.low_rank.is_transposed:
                before = _before(entry, read, list(made))
                change = replace(change, norms=change.low_rank.column_norms(before))
            made.append(change)
        return made


@dataclass(frozen=True)
class _Change:
    step: Step
    low_rank: LowRank | None
    norms: Array | None = None

    def apply(self, values: Array, first: int) -> Array:
        if self.low_rank is not None:
            return self.low_rank.merge(values, first, self.norms)
        entry = self.step.adapter.entries[self.step.saved]
        width = (entry.end - entry.begin) // (entry.shape[0] if entry.shape else 1)
        at = entry.begin + first * width
        part = replace(entry, begin=at, end=at + len(values) * width, shape=(len(values), *entry.shape[1:]))
        return self.step.adapter.read_part(part).reshape(values.shape).astype(values.dtype)


def split_entry(entry: Entry, is_touched: bool, step: int = 0) -> Iterator[Piece]:
    """A tensor in pieces of whole rows; one that has no rows is one piece. step: rows; those of about PIECE bytes when 0."""
    rows = entry.shape[0] if entry.shape else 1
    size = entry.end - entry.begin
    if not size:
        return
    width = size // rows
    step = step or max(1, PIECE // width)
    step -= step % 16 if step > 16 else 0
    for first in range(0, rows, step):
        end = min(first + step, rows)
        yield Piece(entry, entry.begin + first * width, entry.begin + end * width, first, is_touched)


def _before(entry: Entry, read: Read, changes: Sequence[_Change]) -> Iterator[tuple[int, Array]]:
    for piece in split_entry(entry, is_touched=True):
        values = _rows(read(piece.begin, piece.end), entry)
        for change in changes:
            values = change.apply(values, piece.first)
        yield piece.first, values


def _rows(data: Any, entry: Entry) -> Array:
    return np.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(-1, *entry.shape[1:])
