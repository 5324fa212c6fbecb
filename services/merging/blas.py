"""B @ A in float32, summed in one order on every machine: a chain of fused multiply-adds from k = 0 up, as MKL does it.

peft's result on a CPU is MKL's, and the digest of a merged model should not depend on the machine that merged it. OpenBLAS
(numpy's) keeps this order in its kernels for AVX-512, while those for AVX2 split sums of 8 and more into two (0.3.30,
sgemm_kernel_8x4_haswell). So the better kernels are asked for before numpy is loaded, then a probe looks how many terms the
loaded ones sum in order, and what is beyond that is added by hand, a term at a time.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from services.common.machine import cpu_flags


def _ask_for_kernels() -> None:
    """OpenBLAS takes a new AMD CPU with AVX-512 for a Haswell; and its threads are in the way of ours, one a core."""
    if "numpy" in sys.modules:
        return
    wanted = {"OPENBLAS_NUM_THREADS": "1"}
    if has_avx512():
        wanted["OPENBLAS_CORETYPE"] = "SkylakeX"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: value for name, value in wanted.items() if before[name] is None})
    import numpy  # noqa: F401 - OpenBLAS reads its environment when it is loaded, and children shall not inherit it

    for name, value in before.items():
        if value is None:
            del os.environ[name]


@functools.cache
def has_avx512() -> bool:
    """Whether torch would take its AVX-512 kernels here (ATen/Version.cpp: F, BW, DQ and VL)."""
    return cpu_flags() >= {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


_ask_for_kernels()

import numpy as np  # noqa: E402 - after the kernels were asked for

Array = np.ndarray[Any, np.dtype[Any]]
PROBED = (64, 7, 3)
"""Lengths of sums that are tried, longest first. What holds for 64 holds for more: kernels repeat what they unroll."""
TILE = 16
"""Kernels for what is left beside whole tiles sum in other orders, so matrices are filled up with zeros."""


def multiply(b: Array, a: Array) -> Array:
    """B @ A. b: (m, k), a: (k, n), float32; float32 (m, n)."""
    rows, columns = b.shape[0], a.shape[1]
    if rows % TILE:
        b = np.pad(b, ((0, -rows % TILE), (0, 0)))
    if columns % TILE:
        a = np.pad(a, ((0, 0), (0, -columns % TILE)))
    most = longest_ordered_sum()
    product: Array = b[:, :most] @ a[:most]
    for k in range(most, b.shape[1]):
        product = add_product(b[:, k : k + 1], a[k : k + 1], product)
    return product[:rows, :columns]


def add_product(x: Array, y: Array, total: Array) -> Array:
    """X · y + total rounded once to float32: the product of two float32 is exact in float64."""
    exact = np.multiply(x, y, dtype=np.float64)
    exact += total
    return exact.astype(np.float32)


@functools.cache
def longest_ordered_sum() -> int:
    """How many terms numpy's matrix product sums in order here; sys.maxsize: any number."""
    for length in PROBED:
        if all(_is_ordered(rows, length, columns) for rows in (64, 48, 16) for columns in (512, 96, 16)):
            return sys.maxsize if length == PROBED[0] else length
    return 1  # one product, rounded once


def _is_ordered(rows: int, length: int, columns: int) -> bool:
    random = np.random.default_rng(length)
    b = random.normal(size=(rows, length)).astype(np.float32)
    a = random.normal(size=(length, columns)).astype(np.float32)
    wanted = np.zeros((rows, columns), np.float32)
    for k in range(length):
        wanted = add_product(b[:, k : k + 1], a[k : k + 1], wanted)
    return bool(np.array_equal(b @ a, wanted))
