"""Drives one run: starts what the graph says is next, writes down what happened, goes on after any restart."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

import grpc

from fabrictune.v1 import job_pb2
from services.common.artifacts import Artifacts
from services.common.errors import Cancelled, FabrictuneError
from services.common.reporter import Reporter
from services.common.store import Store
from services.pipeline.admission import check_stages
from services.pipeline.clients import KINDS, InferenceClient, JobClient
from services.pipeline.graph import is_done, next_stages, plan_stages
from services.pipeline.progress import RunProgress, load_progress, read_stages
from services.pipeline.revisions import Revisions
from services.pipeline.spec import Spec
from services.pipeline.stages import Stages

SUCCEEDED, FAILED, CANCELLED = job_pb2.Execution.SUCCEEDED, job_pb2.Execution.FAILED, job_pb2.Execution.CANCELLED


class Reconciler:
    """Drives runs. channels: by kind, to the services that do the stages."""

    def __init__(self, channels: Mapping[str, grpc.aio.Channel], store: Store, artifacts: Artifacts) -> None:
        self._clients = {kind: JobClient(channels[kind], kind) for kind in KINDS}
        inference = InferenceClient(channels["inference"])
        self._revisions, self._store = Revisions(inference), store
        self._stages = Stages(self._clients, inference, self._revisions, store, artifacts)

    def leave(self) -> None:
        """What is cancelled from now on is cancelled because this process ends: the next one needs the revisions of runs."""
        self._revisions.leave()

    async def check(self, spec: Spec) -> None:
        """Ask every service whether it would accept its stage. Raises InvalidSpec naming all that is wrong."""
        await check_stages(self._clients, spec)

    async def drive(self, name: str, spec: Spec, reporter: Reporter) -> Mapping[str, str]:
        """Carry a run to its end; returns {stage: output}. Raises the error of the stage that failed."""
        run, nodes = await asyncio.to_thread(load_progress, name, spec, self._store, reporter), plan_stages(spec)
        running: dict[asyncio.Task[None], str] = {}
        try:
            while not is_done(nodes, run.states):
                for stage in next_stages(nodes, run.states):
                    run.begin(stage)
                    running[asyncio.create_task(self._stages.do(run, stage))] = stage
                await run.save()
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    await _close_stage(run, running.pop(task), task)
        except asyncio.CancelledError:
            await _end(running)
            await self._release_all(name, reporter)
            raise
        finally:
            await _end(running)
            self._revisions.forget(name)
        return run.outputs

    async def cancel_active(self, name: str) -> None:
        """Ask the jobs that a run waits for to stop."""
        for stage in await asyncio.to_thread(read_stages, name, self._store):
            kind = str(stage["stage"]).partition("-")[0]
            if kind in self._clients and stage.get("job") and stage["execution"]["state"] in ("RUNNING", "QUEUED"):
                await self._clients[kind].cancel(str(stage["job"]).rpartition("/")[2])

    async def _release_all(self, name: str, reporter: Reporter) -> None:
        try:
            await self._revisions.release_all(name)
        except FabrictuneError as error:
            reporter.log(f"a revision without traffic is left; look at `fabrictune deployments`: {error}", "WARNING")


async def _close_stage(run: RunProgress, stage: str, task: asyncio.Task[None]) -> None:
    """Write down how a stage ended. Raises the error with which it did."""
    status, error = run.stages[stage], task.exception()
    status.execution.end_time.GetCurrentTime()
    if error is None:
        status.execution.state = SUCCEEDED
        run.reporter.log(f"{stage}: {'reused' if status.reused else 'made'} {status.output}")
    else:
        status.execution.state = CANCELLED if isinstance(error, Cancelled) else FAILED
        if isinstance(error, FabrictuneError):
            status.execution.error.CopyFrom(error.to_status())
    await run.save()
    if error is not None:
        raise error


async def _end(tasks: Collection[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
