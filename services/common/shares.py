"""What the nodes of a job hand to its first one, where each works apart: folders in the object store, until the job is done.

A share is sealed like any artifact, so a half one is never seen, and an attempt that comes after a lost node finds those of
the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from services.common.artifacts import Artifacts
from services.common.pauses import pauses
from services.common.reporter import Progress, Reporter

PAUSE_SECONDS = 0.5, 5.0
"""Between looks: at first, at most."""


class Shares:
    """The shares of one job."""

    def __init__(self, artifacts: Artifacts, job: str, nodes: int) -> None:
        self._artifacts, self._job, self._nodes = artifacts, job, nodes
        self._prefix = f"shares/{job.replace('/', '-')}/"

    def give(self, node: int, scratch: Path, make: Callable[[Path], None]) -> None:
        """Keep what `make` leaves in the empty folder `scratch`, unless an earlier attempt has given this node's share."""
        if not self._artifacts.exists(self._name(node)):
            make(scratch)
            self._artifacts.publish(scratch, self._name(node), "share", created_by={"job": self._job})

    def wait(self, reporter: Reporter) -> dict[str, Path]:
        """{"shares/0": folder, …} once all are there. The Job fails as a whole when a node cannot do its share."""
        for pause in pauses(*PAUSE_SECONDS):
            there = [self._artifacts.exists(self._name(node)) for node in range(self._nodes)]
            reporter.progress(Progress("shares", sum(there), self._nodes, phase="waiting for shares"))
            if all(there):
                break
            time.sleep(pause)
        return {f"shares/{node}": self._artifacts.cached(self._name(node)) for node in range(self._nodes)}

    def forget(self) -> None:
        """Delete them."""
        for name in self._artifacts.names(self._prefix):
            self._artifacts.delete(name)

    def _name(self, node: int) -> str:
        return f"{self._prefix}node-{node:04d}"
