"""Facts about processes of this machine, told apart from later ones that got the same number."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def start_ticks(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot; None when it has gone or is a zombie. Source: proc(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(pid: int, started: int) -> bool:
    """Whether the very process that started at `started` still runs."""
    return start_ticks(pid) == started


def signal_one(pid: int, number: signal.Signals) -> None:
    """Send a signal to one process; nothing happens when it has gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def signal_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to the process group that `pid` leads; nothing happens when it has gone."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return
