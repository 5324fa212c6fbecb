"""Ends processes of the local cluster: its own when it closes, and those that an earlier one has left."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

from services.common.clusters import Phase, Workload
from services.common.clusters.journal import Entry, read_entry
from services.common.clusters.processes import is_alive, signal_group
from services.common.config import load_server


def leftovers(folder: Path) -> int:
    """End the processes in a journal that nobody looks after any more; returns how many. Blocks until they are gone."""
    entries = [e for f in (folder / "journal").glob("*.json") if (e := read_entry(f)) is not None]
    running = [e for e in entries if e.phase is Phase.RUNNING and is_alive(e.pid, e.started)]
    end_all(running)
    for entry in entries:
        if entry.phase in (Phase.PENDING, Phase.RUNNING):
            (folder / "journal" / f"{entry.workload.name}.json").unlink(missing_ok=True)
    return len(running)


def end_all(entries: Sequence[Entry]) -> None:
    """SIGTERM, then SIGKILL to what has outlived its grace. Blocks until all are gone."""
    for entry in entries:
        if is_alive(entry.pid, entry.started):
            signal_group(entry.pid, signal.SIGTERM)
    begin = time.monotonic()
    while left := [e for e in entries if is_alive(e.pid, e.started)]:
        for entry in left:
            if time.monotonic() - begin > grace_seconds(entry.workload):
                signal_group(entry.pid, signal.SIGKILL)
        time.sleep(0.05)
    for entry in entries:
        signal_group(entry.pid, signal.SIGKILL)  # whatever its children left behind


def grace_seconds(workload: Workload) -> float:
    """Seconds from SIGTERM to SIGKILL. A training saves a checkpoint once its step is done; an engine has nothing to save, and
    vLLM is deaf to SIGTERM while it loads.
    """
    config = load_server()
    return config.engine_grace_seconds if workload.port else config.grace_seconds
