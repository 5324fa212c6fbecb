"""Kubernetes' objects as the API gives them (dicts), and how they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Seen:
    """A workload's objects."""

    main: Object
    """The Job or the Deployment."""
    pods: Sequence[Object] = ()
    warnings: Mapping[str, str] = field(default_factory=dict)
    """The newest Warning event of each object, by its name: "reason: message"."""


def phase_of(pod: Object) -> str:
    """A pod's phase."""
    return str((pod.get("status") or {}).get("phase", ""))


def is_going(thing: Object) -> bool:
    """Whether it was told to go."""
    return bool(thing["metadata"].get("deletionTimestamp"))


def conditions_of(pod: Object) -> Sequence[Object]:
    """A pod's conditions."""
    return (pod.get("status") or {}).get("conditions") or []


def containers_of(pod: Object) -> Sequence[Object]:
    """The statuses of its containers, those that initialise first."""
    state = pod.get("status") or {}
    return [*(state.get("initContainerStatuses") or []), *(state.get("containerStatuses") or [])]


def pods_of(job: Object) -> int:
    """How many pods a Job has at a time: one a node."""
    return int(job["spec"].get("parallelism") or 1)


def started_at(pod: Object) -> datetime | None:
    """When its first container that runs began to."""
    return next(
        (
            t
            for c in containers_of(pod)
            if (t := parse_time(((c.get("state") or {}).get("running") or {}).get("startedAt")))
        ),
        None,
    )


def ended_at(pod: Object) -> str:
    """When its last container ended, or, when none did, when it was made; texts that sort in time's order."""
    ends = [((c.get("state") or {}).get("terminated") or {}).get("finishedAt") or "" for c in containers_of(pod)]
    return max(ends, default="") or str(pod["metadata"].get("creationTimestamp", ""))


def parse_time(text: str | None) -> datetime | None:
    """A time as Kubernetes writes it."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None
