"""What this machine's processor can do, by the flags of /proc/cpuinfo, and how programs share it."""

from __future__ import annotations

from collections.abc import Set
from functools import cache
from pathlib import Path

_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})

SHARED_CORES = {"GOMP_SPINCOUNT": "1000"}
"""Environment of programs that compute with torch on cores that others use too: a rollout's old engine, a pod's neighbours.

A thread of GNU OpenMP that waits for the others of its program spins, for milliseconds unless it is told not to, on the
core that those need: two programs of torch side by side take 4 to 6 times as long as one. After 1000 turns (microseconds)
it sleeps (docs/training.md).
"""


@cache
def cpu_flags() -> frozenset[str]:
    """As /proc/cpuinfo names them; empty where there is no such file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return frozenset(found)


def multiplies_bfloat16(flags: Set[str]) -> bool:
    """Whether it multiplies bfloat16 itself: emulated, it is slower than float32."""
    return bool(_BFLOAT16 & flags)
