"""Where workloads run. One Protocol for the local machine and for Kubernetes.

A Workload is a printable value made by a pure function (see `services.common.jobs.render_workload`); a Cluster acts on
it. Names are derived from the job, so creating the same workload twice means "already accepted". A cluster knows only
live and recently ended workloads: what must be remembered for ever is in the object store.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Protocol

from google.rpc import status_pb2

ADAPTERS_OF = "FABRICTUNE_ADAPTERS_OF"
"""In an engine's environment: whose adapters it is to have, "deployment/revision"; see services.inference.follow."""


@dataclass(frozen=True)
class Workload:
    """Something to run: a job that ends (port == 0) or a server that stays (port != 0)."""

    kind: str
    """Of which template: "conversion", "training", "merging", "evaluation", "reference", "engine"."""
    name: str
    """Unique in the cluster: "{kind}-{job id}"; a DNS label of at most 63 characters."""
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """No secrets: those are handed over by the cluster (a Secret; the parent's environment)."""
    digest: str = ""
    """sha256 of what it was made from; the same name with another digest is another workload."""
    labels: Mapping[str, str] = field(default_factory=dict)
    gpus: int = 0
    nodes: int = 1
    cpu: str = ""
    memory: str = ""
    queue_timeout_seconds: float = 0
    """0: no limit."""
    run_timeout_seconds: float = 0
    """0: no limit."""
    retries: int = 0
    """How many more attempts a lost or failed-but-retryable worker gets."""
    port: int = 0
    """A server's port; "{port}" in argv is replaced by the one it got (the local cluster picks a free one)."""
    health_path: str = ""
    """HTTP path that answers 200 once a server is ready."""


class Phase(Enum):
    """A workload's phase in its cluster."""

    PENDING = "pending"
    """Accepted; waits for a place to run."""
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True)
class WorkloadStatus:
    """What a cluster knows of a workload now."""

    name: str
    kind: str
    digest: str
    phase: Phase
    attempt: int = 1
    message: str = ""
    """One sentence with the fix, when it waits or has failed."""
    error: status_pb2.Status | None = None
    address: str = ""
    """A server's "http://host:port" once it runs."""
    start_time: datetime | None = None
    end_time: datetime | None = None
    stopping: bool = False
    """Told to stop and not yet gone."""
    each: tuple[str, ...] = ()
    """Addresses of all its pods that are ready, where a cluster runs several behind one address."""
    asleep: bool = False
    """A server that somebody has scaled to no pod at all: it is PENDING until it is scaled up again."""


class Cluster(Protocol):
    """The acts. All raise errors of services.common.errors."""

    async def create(self, workload: Workload) -> WorkloadStatus:
        """Start it. Same name and digest: the present status. Same name, other digest: AlreadyExists."""

    async def get(self, name: str) -> WorkloadStatus | None:
        """Its status, or None when the cluster does not know it (any more)."""

    async def list(self, kind: str = "") -> list[WorkloadStatus]:
        """All that the cluster knows, of one kind or of every kind."""

    async def stop(self, name: str) -> None:
        """Ask it to end (SIGTERM, then SIGKILL after the grace period). Unknown or ended: nothing happens."""

    async def delete(self, name: str) -> None:
        """Stop it and forget it."""

    def watch(self) -> AsyncIterator[WorkloadStatus]:
        """Every change of any workload from now on."""

    async def read_log(self, name: str) -> str:
        """The end of what its processes wrote to stdout and stderr; "" when there is nothing."""

    def render(self, workload: Workload) -> str:
        """The cluster's own form of the workload as YAML; for validate_only and --dry-run."""
