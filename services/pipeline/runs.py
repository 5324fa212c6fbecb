"""Where pipeline runs live: tasks of this process, behind the same Cluster Protocol as jobs.

So runs are accepted, watched, cancelled and begun again after a restart by the code that does it for every job.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import yaml
from google.protobuf import json_format

from services.common.attempts import claim_attempt
from services.common.clusters import Phase, Workload, WorkloadStatus
from services.common.errors import Cancelled, FabrictuneError, FailedPrecondition, internal_status
from services.common.events import EventWriter
from services.common.logs import get_logger
from services.common.stage import Stage
from services.common.store import Store
from services.pipeline.graph import plan_stages
from services.pipeline.reconcile import Reconciler
from services.pipeline.spec import Spec


class RunCluster:
    """Runs pipelines as tasks. Close it before the event loop ends."""

    def __init__(self, reconciler: Reconciler, store: Store) -> None:
        self._reconciler, self._store = reconciler, store
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._workloads: dict[str, Workload] = {}
        self._watchers: set[asyncio.Queue[WorkloadStatus]] = set()
        self._stopping: set[str] = set()
        self._log = get_logger("pipeline")

    async def create(self, workload: Workload) -> WorkloadStatus:
        """Begin to drive a run, or go on with it."""
        if workload.name not in self._tasks:
            self._workloads[workload.name] = workload
            task = asyncio.create_task(self._drive(workload))
            task.add_done_callback(lambda _: self._tell(workload.name))
            self._tasks[workload.name] = task
        return self._status(workload.name)

    async def get(self, name: str) -> WorkloadStatus | None:
        """Its status, or None."""
        return self._status(name) if name in self._tasks else None

    async def list(self, kind: str = "") -> list[WorkloadStatus]:
        """All runs of this process."""
        return [self._status(name) for name in self._tasks]

    async def stop(self, name: str) -> None:
        """Stop driving it, and ask the job that it waits for to stop."""
        task = self._tasks.get(name)
        if task is None or task.done() or name in self._stopping:
            return
        self._stopping.add(name)
        try:
            await self._reconciler.cancel_active(self._workloads[name].env["FABRICTUNE_JOB"])
        except asyncio.CancelledError:
            self._log.warning("the service of the stage is away: its job may go on", run=name)
            raise
        finally:
            task.cancel()  # also when the caller gives up on a service that is away

    async def delete(self, name: str) -> None:
        """Stop it and forget it."""
        await self.stop(name)
        task = self._tasks.pop(name, None)
        if task is not None:
            await asyncio.gather(task, return_exceptions=True)
        self._workloads.pop(name, None)
        self._stopping.discard(name)

    async def watch(self) -> AsyncIterator[WorkloadStatus]:
        """Every end of a run from now on."""
        queue: asyncio.Queue[WorkloadStatus] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)

    async def read_log(self, name: str) -> str:
        """Nothing: a run has no process; its words are events."""
        return ""

    def render(self, workload: Workload) -> str:
        """The run's name and digest as YAML."""
        return str(yaml.safe_dump({"kind": "PipelineRun", "name": workload.name, "digest": workload.digest}))

    async def close(self) -> None:
        """Leave all runs as they are; the next process goes on with them."""
        self._reconciler.leave()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _drive(self, workload: Workload) -> None:
        name = workload.env["FABRICTUNE_JOB"]
        record = await asyncio.to_thread(self._store.get_json, f"{name}/job.json")
        if record is None:
            raise FailedPrecondition(f"the object store has no {name}")
        attempt, begin = await asyncio.to_thread(claim_attempt, self._store, name), time.time()
        events = await asyncio.to_thread(EventWriter, self._store, name, attempt)
        outcome = {"state": "SUCCEEDED", "attempt": attempt, "start_time": begin}
        try:
            await self._reconciler.drive(name, Spec.model_validate(record["spec"]), events)
        except Cancelled:
            outcome["state"] = "CANCELLED"
        except asyncio.CancelledError:
            # Cancelled by a user: Jobs writes that down. Else this process ends and the next one goes on.
            outcome = {}
            raise
        except Exception as error:  # noqa: BLE001 - the process's rim: what nobody knew of becomes INTERNAL
            if not isinstance(error, FabrictuneError):
                self._log.error("unexpected", run=name, exc_info=error)
            status = error.to_status() if isinstance(error, FabrictuneError) else internal_status(name)
            events.log(str(error), "ERROR")
            outcome |= {"state": "FAILED", "error": json_format.MessageToDict(status)}
        finally:
            with contextlib.suppress(FabrictuneError):
                await asyncio.shield(asyncio.to_thread(events.close))
            if outcome:
                outcome["end_time"] = time.time()
                key = f"{name}/outcome.json"
                await asyncio.to_thread(self._store.put_json, key, outcome, only_if_absent=True)

    def _status(self, name: str) -> WorkloadStatus:
        task, workload = self._tasks[name], self._workloads[name]
        phase = Phase.RUNNING
        if task.done():
            phase = Phase.FAILED if task.cancelled() or task.exception() else Phase.SUCCEEDED
        return WorkloadStatus(name, workload.kind, workload.digest, phase, stopping=name in self._stopping)

    def _tell(self, name: str) -> None:
        if name in self._tasks:
            for queue in self._watchers:
                queue.put_nowait(self._status(name))


def _never(*_: object) -> dict[str, str]:
    raise FailedPrecondition("a pipeline run is driven by the pipeline service, not by a worker")


STAGE: Stage[Spec] = Stage(
    kind="pipeline",
    collection="pipelineRuns",
    output_kind="run",
    output_collection="pipelineRuns",
    spec=Spec,
    inputs=lambda _: {},
    run=_never,
)


def stage_names(spec: Spec) -> list[str]:
    """The stages of a run, in order."""
    return [node.name for node in plan_stages(spec)]
