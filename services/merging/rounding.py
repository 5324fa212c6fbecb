"""Between a base's dtype and float32, in passes that numpy does with vector instructions (ml_dtypes rounds one by one)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from services.merging.blas import Array

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_EXPONENTS: Mapping[int, tuple[Any, int]] = {
    2: (np.uint16, 0x7F80),
    4: (np.uint32, 0x7F800000),
    8: (np.uint64, 0x7FF0000000000000),
}
"""Bytes of a float → its unsigned twin, and the bits of its exponent; float16 has an own pattern."""
_HALF_EXPONENT = 0x7C00


def widen(values: Array) -> Array:
    """float32 of bfloat16, float16 and float32; float64 stays, as torch adds a float32 to it in float64. A new array."""
    if values.dtype == BFLOAT16:
        wide = values.view(np.uint16).astype(np.uint32)
        np.left_shift(wide, 16, out=wide)
        return wide.view(np.float32)
    return values.astype(np.float64 if values.dtype == np.float64 else np.float32)


def narrow(values: Array, dtype: np.dtype[np.generic]) -> Array:
    """Rounded to nearest, ties to even. values: float32 or float64; those of float32 are overwritten."""
    if dtype == BFLOAT16 and values.dtype == np.float32:
        bits = values.view(np.uint32)
        carry = np.right_shift(bits, 16)
        np.bitwise_and(carry, 1, out=carry)
        np.add(carry, 0x7FFF, out=carry)
        np.add(bits, carry, out=bits)
        np.right_shift(bits, 16, out=bits)
        return bits.astype(np.uint16).view(BFLOAT16)
    return values.astype(dtype)


def is_finite(values: Array) -> bool:
    """Whether there is no NaN and no infinity; by the bits of the exponent, which costs one look at the memory."""
    if values.dtype.kind not in "fV" or not values.size:
        return True
    unsigned, exponent = _EXPONENTS[values.dtype.itemsize]
    mask = np.array(_HALF_EXPONENT if values.dtype == np.float16 else exponent, unsigned)
    return bool(np.bitwise_and(values.view(unsigned), mask).max() != mask)
