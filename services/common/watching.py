"""Watching a job: its state and what its workers say, from the store, so that any server can serve any watcher."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from fabrictune.v1 import job_pb2
from services.common.events import read_events
from services.common.job_state import ENDED, execution_of
from services.common.jobs import Jobs
from services.common.pauses import pauses
from services.common.store import Store

WATCH_SECONDS = 0.5, 2.0
"""Between looks at a watched job: after news, at most."""


@dataclass(frozen=True)
class Event:
    """One event of a watch. Exactly one of the last four is set."""

    token: str
    time: float
    state: job_pb2.Execution | None = None
    progress: Mapping[str, Any] | None = None
    log: Mapping[str, Any] | None = None
    artifact: Mapping[str, Any] | None = None


async def watch_job(jobs: Jobs, name: str, token: str = "") -> AsyncIterator[Event]:
    """The present state, then events after `token`, until the job has ended and all has been told.

    Raises NotFound, InvalidSpec (a token that is not ours).
    """
    last: bytes | None = None
    pause = pauses(*WATCH_SECONDS)
    while True:
        execution = execution_of(await jobs.get(name))
        seen = _without_progress(execution)
        changed, first, last = seen != last, last is None, seen
        if first or (changed and execution.state not in ENDED):
            yield Event(token, time.time(), state=execution)
        new = await asyncio.to_thread(_read_all_events, jobs.store, name, token)
        for token, event in new:
            parts = {k: v for k, v in event.items() if k in ("progress", "log", "artifact")}
            yield Event(token, float(event["time"]), **parts)
        if execution.state in ENDED:
            yield Event(token, time.time(), state=execution)
            return
        if changed or new:
            pause = pauses(*WATCH_SECONDS)
        await asyncio.sleep(next(pause))


def _without_progress(execution: job_pb2.Execution) -> bytes:
    bare = job_pb2.Execution()
    bare.CopyFrom(execution)
    bare.ClearField("progress")
    return bare.SerializeToString(deterministic=True)


def _read_all_events(store: Store, name: str, token: str) -> list[tuple[str, dict[str, Any]]]:
    return list(read_events(store, name, token))
