"""What a server does for its jobs beside answering: lost ones are begun again, ends noted, progress exported.

Each is a task that runs as long as the server does; what goes wrong in it is logged and tried again.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

from services.common import metrics
from services.common.clusters import Phase
from services.common.errors import NEVER_RETRY, FabrictuneError, PermissionDenied
from services.common.job_state import JobView, failed_outcome
from services.common.jobs import Jobs, workload_name
from services.common.logs import get_logger
from services.common.resources import ID_PATTERN

AGAIN_SECONDS = 30.0
"""Between two attempts to begin a lost job again, while its cluster has no room for it or does not answer."""
SIDE_BY_SIDE = 8
"""Jobs that are reconciled at the same time; each of them asks the store a few things."""
HOPELESS = NEVER_RETRY - {PermissionDenied.exit_code}
"""Exit codes of a cluster that refuses a job for ever; a right that a Role lacks now is given back by `helm upgrade`."""
EXPORT_SECONDS = 5.0
"""Between two looks at the progress of running jobs for Prometheus, which asks every 15 to 60 s."""


class Upkeep:
    """Of the jobs of one stage."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs, self._stage, self._store, self._cluster = jobs, jobs.stage, jobs.store, jobs.cluster
        self._log = get_logger(jobs.stage.kind)

    async def begin_lost(self) -> None:
        """Reconcile until nothing is left to begin again. Run it as a task when a server starts."""
        left: list[str] | None = None
        while True:
            try:
                left = await self.reconcile(left)
            except FabrictuneError as error:
                self._log.warning("lost jobs cannot be looked for now", error=str(error))
            if left == []:
                return
            await asyncio.sleep(AGAIN_SECONDS)

    async def reconcile(self, names: Sequence[str] | None = None) -> list[str]:
        """Begin again what has neither an outcome nor a workload; returns what cannot be begun now, to be tried again.

        names: the jobs to look at; all that have no outcome when absent. Raises Unavailable when the store is away.
        """
        found = await asyncio.to_thread(self._without_outcome) if names is None else names
        free = asyncio.Semaphore(SIDE_BY_SIDE)

        async def look_at(name: str) -> bool:
            async with free:
                return await self._begin_if_lost(name)

        done = await asyncio.gather(*(look_at(name) for name in found))
        return [name for name, is_done in zip(found, done, strict=True) if not is_done]

    def _without_outcome(self) -> list[str]:
        """By their keys alone, a thousand in a request: most jobs that ever were have ended."""
        keys = list(self._store.list_keys(f"{self._stage.collection}/"))
        ended = {key.removesuffix("/outcome.json") for key in keys if key.endswith("/outcome.json")}
        record = re.compile(f"({self._stage.collection}/{ID_PATTERN})/job.json")
        return [m[1] for key in keys if (m := record.fullmatch(key)) and m[1] not in ended]

    async def _begin_if_lost(self, name: str) -> bool:
        """False when it is to be tried again."""
        try:
            view = await self._jobs.find(name)
            if view is not None and view.outcome is None and view.status is None:
                await self._begin_again(view)
        except FabrictuneError as error:  # a full quota, a webhook or a store that is away: none of them for ever
            self._log.warning("cannot begin again now", job=name, error=str(error))
            return False
        return True

    async def _begin_again(self, view: JobView) -> None:
        name = view.record.name
        try:
            await self._jobs.begin(view.record)
        except FabrictuneError as error:
            if error.exit_code not in HOPELESS:
                raise
            # Such as GPUs that this machine has no more. The job's failure, not the server's.
            self._log.warning("cannot begin again", job=name, error=str(error))
            outcome = failed_outcome(view, error.to_status())
            await asyncio.to_thread(self._store.put_json, f"{name}/outcome.json", outcome, only_if_absent=True)
            return
        self._log.info("begun again", job=name)
        now = await self._jobs.find(name)
        if now is not None and now.cancel_requested:  # since we looked, by somebody who found nothing to stop
            await self._cluster.stop(workload_name(self._stage.kind, view.record.id))

    async def settle_ended(self) -> None:
        """Write down the outcomes of workloads that end without one, for ever. Run it as a task."""
        prefix = f"{self._stage.kind}-"
        async for status in self._cluster.watch():
            if status.kind != self._stage.kind or status.phase not in (Phase.SUCCEEDED, Phase.FAILED):
                continue
            try:
                view = await self._jobs.find(f"{self._stage.collection}/{status.name.removeprefix(prefix)}")
            except FabrictuneError as error:  # the store is away; whoever asks for the job next writes it down
                self._log.warning("an outcome cannot be written down", workload=status.name, error=str(error))
                continue
            if view is not None and view.outcome:
                metrics.jobs_ended.labels(self._stage.kind, view.outcome["state"]).inc()

    async def export_progress(self) -> None:
        """Keep the gauges of running jobs (services.common.metrics) up to date, for ever. Run it as a task."""
        prefix = f"{self._stage.kind}-"
        while True:
            running = [s for s in await self._cluster.list(self._stage.kind) if s.phase is Phase.RUNNING]
            ids = [status.name.removeprefix(prefix) for status in running]
            try:
                found = await asyncio.gather(*(asyncio.to_thread(self._read_progress, job_id) for job_id in ids))
                metrics.show_progress(self._stage.kind, {i: p for i, p in zip(ids, found, strict=True) if p})
            except FabrictuneError as error:  # the store is away; the figures wait
                self._log.warning("progress cannot be read", error=str(error))
            await asyncio.sleep(EXPORT_SECONDS)

    def _read_progress(self, job_id: str) -> dict[str, Any] | None:
        return self._store.get_json(f"{self._stage.collection}/{job_id}/progress.json")
