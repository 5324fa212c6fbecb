"""What this machine has: what its processor can do, GPUs, a port that is free."""

from __future__ import annotations

import socket
from collections.abc import Set
from functools import cache
from pathlib import Path

_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


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


def count_gpus() -> int:
    """NVIDIA GPUs, by their device files."""
    return len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit()])


def free_port() -> int:
    """A TCP port of loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
