"""What one adapter does to one weight: W + scale · B @ A, or DoRA's m · (W + scale · B @ A) / ‖W + scale · B @ A‖.

Rows of the stored weight are merged in blocks, so memory does not depend on a tensor's size. Sums and roundings come in
peft's order (0.20, tuners/lora/layer.py and variants.py), on a CPU and with autocast_adapter_dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from services.merging.blas import Array, multiply
from services.merging.rounding import narrow, widen

BLOCK = 1 << 16
"""Elements that are computed at once: all steps find them in a core's cache."""
DORA_BLOCK = 1 << 19
"""With norms of rows more at once pays: they are summed in as many steps as a row has vectors."""

LANES = 8


@dataclass(frozen=True)
class LowRank:
    """A weight's difference, left @ right · scale, in the weight's own layout.

    left: (rows, rank) and right: (rank, columns), float32: B and A of a linear layer, whose weight is (out, in), and Aᵀ and Bᵀ
    of an embedding or a Conv1D (fan_in_fan_out), whose weight is (in, out).
    """

    left: Array
    right: Array
    scale: float
    is_rounded: bool = False
    """peft rounds the difference to the weight's dtype before it adds it: an embedding's, and that of a concatenation."""
    magnitude: Array | None = None
    """DoRA's m, float32, one for each output."""
    is_transposed: bool = False
    """The weight is (in, out): DoRA's norms are those of columns."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it fits."""
        return self.left.shape[0], self.right.shape[1]

    def merge(self, weight: Array, first: int, norms: Array | None) -> Array:
        """Merged rows of the weight, in its dtype. weight: the rows from `first` on; norms: see `column_norms`."""
        merged = np.empty_like(weight)
        for begin, end in _blocks(weight, BLOCK if self.magnitude is None else DORA_BLOCK):
            total = self._add(weight[begin:end], first + begin)
            if self.magnitude is not None:
                rows = slice(first + begin, first + end)
                if self.is_transposed:
                    total *= (self.magnitude / norms)[None, :]
                else:
                    total *= (self.magnitude[rows] / row_norms(total))[:, None]
            merged[begin:end] = narrow(total, weight.dtype)
        return merged

    def column_norms(self, blocks: Iterable[tuple[int, Array]]) -> Array | None:
        """Norms over the whole of a weight that DoRA needs before its first row. blocks: (first row, rows) of it all."""
        if self.magnitude is None or not self.is_transposed:
            return None
        squares = np.zeros(self.shape[1], np.float32)
        for first, weight in blocks:
            for begin, end in _blocks(weight, DORA_BLOCK):
                for row in self._add(weight[begin:end], first + begin):
                    squares += row * row
        return np.sqrt(squares)

    def _add(self, weight: Array, first: int) -> Array:
        delta = multiply(self.left[first : first + len(weight)], self.right)
        delta *= np.float32(self.scale)
        if self.is_rounded and self.magnitude is None:
            delta = widen(narrow(delta, weight.dtype))
        total = widen(weight)
        total += delta
        return total


def row_norms(values: Array) -> Array:
    """The 2-norm of each row, float32, summed as torch does: vector by vector, then the lanes, then what is left.

    Source: ATen/native/cpu/ReduceOpsKernel.cpp, norm_kernel_tensor_iterator_impl, which torch 2.13 has for vectors of 8 only.
    """
    squares = values * values
    whole = values.shape[1] - values.shape[1] % LANES
    sums = np.zeros((len(values), LANES), np.float32)
    for at in range(0, whole, LANES):
        sums += squares[:, at : at + LANES]
    total = sums[:, 0].copy()
    for lane in range(1, LANES):
        total += sums[:, lane]
    for at in range(whole, values.shape[1]):
        total += squares[:, at]
    norms: Array = np.sqrt(total)
    return norms


def _blocks(weight: Array, elements: int) -> Iterable[tuple[int, int]]:
    rows = max(1, elements // max(1, weight.shape[1]))
    if rows > 16:
        rows -= rows % 16
    return ((begin, min(begin + rows, len(weight))) for begin in range(0, len(weight), rows))
