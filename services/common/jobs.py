"""Jobs of one kind: accepted into the store, run by a cluster, remembered by the store.

    {job}/job.json         what was asked for; written once (If-None-Match), then the workload is created
    {job}/cancel.json      somebody asked it to stop
    {job}/attempts/NNNN    a worker began; it took the number by writing it first
    {job}/progress.json    the newest progress
    {job}/outcome.json     how it ended; written once, by the worker or, when that has gone, by the server
    events/{job}/…         see services.common.events

A server holds nothing else, so any of them can be killed at any time. A job whose workload the cluster has forgotten
and that has no outcome is begun again: a stage is a pure function, and an artifact that exists ends it at once.
"""

from __future__ import annotations

import asyncio
import builtins
import hashlib
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from fabrictune.v1 import job_pb2
from services.common import metrics
from services.common.artifacts import Artifacts
from services.common.clusters import Cluster, Workload, WorkloadStatus
from services.common.errors import NEVER_RETRY, FabrictuneError, FailedPrecondition, InvalidSpec, NotFound
from services.common.job_state import JobRecord, JobView, execution_of, outcome_of
from services.common.records import accept_record, plan_record, read_record
from services.common.resources import ID_PATTERN, Resources
from services.common.stage import Stage
from services.common.store import Store

RETRIES = 2
"""More attempts for a worker that was lost or says "try again" (exit code 75)."""


class Jobs:
    """The jobs of one stage."""

    def __init__(self, stage: Stage[Any], store: Store, artifacts: Artifacts, cluster: Cluster) -> None:
        self._stage, self._store, self._artifacts, self._cluster = stage, store, artifacts, cluster

    @property
    def stage(self) -> Stage[Any]:
        """What they do."""
        return self._stage

    @property
    def store(self) -> Store:
        """Where they are remembered."""
        return self._store

    @property
    def cluster(self) -> Cluster:
        """What runs them."""
        return self._cluster

    @property
    def artifacts(self) -> Artifacts:
        """Where their inputs and outputs are."""
        return self._artifacts

    async def create(
        self,
        spec: Mapping[str, Any],
        *,
        job_id: str = "",
        request_id: str = "",
        output: str = "",
        labels: Mapping[str, str] | None = None,
        validate_only: bool = False,
    ) -> tuple[JobView, Workload]:
        """Accept a job and hand it to the cluster. The same id or request_id with the same spec: the job that is there.

        Raises InvalidSpec, NotFound (inputs), AlreadyExists (reason REQUEST_ID_REUSED), FailedPrecondition (cluster).
        """
        record = await asyncio.to_thread(
            plan_record,
            self._stage,
            self._artifacts,
            spec,
            job_id or _make_id(self._stage.kind, request_id),
            output=output,
            request_id=request_id,
            labels=labels,
        )
        workload = render_workload(self._stage, record)
        if validate_only:
            return JobView(record), workload
        record, is_new = await asyncio.to_thread(accept_record, self._store, record)
        if is_new:
            metrics.jobs_started.labels(self._stage.kind).inc()
        view = JobView(record) if is_new else await self.get(record.name)
        if view.outcome is None and view.status is None:
            try:
                status = await self._cluster.create(workload)
            except FabrictuneError as error:
                if is_new and error.exit_code in NEVER_RETRY:  # else the job would wait for ever
                    await asyncio.to_thread(self._store.delete, f"{record.name}/job.json")
                raise
            view = replace(view, status=status)
        return view, workload

    async def get(self, name: str) -> JobView:
        """All that is known of a job. Raises NotFound."""
        record = await self._record(name)
        # The cluster first: a worker writes its outcome before it ends.
        status = await self._cluster.get(workload_name(self._stage.kind, record.id))
        return await self._settle(await asyncio.to_thread(self._read_view, record, status))

    async def list(self, page_size: int, page_token: str) -> tuple[builtins.list[JobView], str]:
        """A page of jobs by id, and the next page's token ("" at the end)."""
        size = min(page_size or 50, 1000)
        ids = await asyncio.to_thread(self._ids, page_token, size + 1)
        found = await asyncio.gather(*(self.find(f"{self._stage.collection}/{i}") for i in ids[:size]))
        views = [view for view in found if view is not None]
        return views, ids[size - 1] if len(ids) > size else ""

    async def cancel(self, name: str) -> JobView:
        """Ask it to stop. One that has ended stays as it is. Raises NotFound."""
        view = await self.get(name)
        if view.outcome is None:
            cancel = {"time": _now()}
            await asyncio.to_thread(self._store.put_json, f"{name}/cancel.json", cancel)
            await self._cluster.stop(workload_name(self._stage.kind, view.record.id))
            view = await self.get(name)
        return view

    async def delete(self, name: str) -> None:
        """Forget an ended job, its events and its checkpoints. Raises NotFound, FailedPrecondition while it runs."""
        view = await self.get(name)
        if view.outcome is None:
            raise FailedPrecondition(f"{name} has not ended; cancel it first")
        await self._cluster.delete(workload_name(self._stage.kind, view.record.id))
        kept = name.replace("/", "-")  # by workers, for another attempt
        prefixes = [f"checkpoints/{kept}/", f"shares/{kept}/", f"events/{name}/", f"{name}/"]
        # The record goes last: until then the job can be seen, and deleted again.
        await asyncio.to_thread(self._delete_all, prefixes, f"{name}/job.json")

    async def resume(self, name: str) -> JobView:
        """Begin a failed or cancelled job again; its worker goes on from what the last attempt has kept."""
        view = await self.get(name)
        if view.outcome is None or view.outcome["state"] == "SUCCEEDED":
            state = job_pb2.Execution.State.Name(execution_of(view).state)
            raise FailedPrecondition(f"{name} is {state}; only a failed or cancelled job can be resumed")
        await self._cluster.delete(workload_name(self._stage.kind, view.record.id))
        for part in ("cancel.json", "outcome.json"):
            await asyncio.to_thread(self._store.delete, f"{name}/{part}")
        await self.begin(view.record)
        return await self.get(name)

    async def begin(self, record: JobRecord) -> None:
        """Give a job that was accepted to the cluster. Raises what that refuses it for."""
        await self._cluster.create(render_workload(self._stage, record))

    async def find(self, name: str) -> JobView | None:
        """The job, or None: some stores (SeaweedFS) go on listing a folder when its objects are gone."""
        try:
            return await self.get(name)
        except NotFound:
            return None

    async def _record(self, name: str) -> JobRecord:
        if not re.fullmatch(f"{self._stage.collection}/{ID_PATTERN}", name):
            raise InvalidSpec(f"{name!r} is no job's name; it looks like {self._stage.collection}/an-id")
        return await asyncio.to_thread(read_record, self._store, name)

    def _read_view(self, record: JobRecord, status: WorkloadStatus | None) -> JobView:
        keys = {k.removeprefix(f"{record.name}/") for k in self._store.list_keys(f"{record.name}/")}
        read = {
            n: self._store.get_json(f"{record.name}/{n}.json") for n in ("outcome", "progress") if f"{n}.json" in keys
        }
        begun = [self._store.get_json(f"{record.name}/{k}") or {} for k in sorted(keys) if k.startswith("attempts/")]
        times = tuple(float(b.get("time", 0)) for b in begun)
        return JobView(record, read.get("outcome"), "cancel.json" in keys, times, read.get("progress"), status)

    async def _settle(self, view: JobView) -> JobView:
        outcome = outcome_of(view)
        if outcome is None:
            return view
        key = f"{view.record.name}/outcome.json"
        await asyncio.to_thread(self._store.put_json, key, outcome, only_if_absent=True)
        return replace(view, outcome=await asyncio.to_thread(self._store.get_json, key) or outcome)

    def _ids(self, after: str, limit: int) -> builtins.list[str]:
        prefix = f"{self._stage.collection}/"
        return self._store.list_folders(prefix, start_after=f"{prefix}{after}/" if after else "", limit=limit)

    def _delete_all(self, prefixes: builtins.list[str], last: str) -> None:
        for prefix in prefixes:
            for key in list(self._store.list_keys(prefix)):
                if key != last:
                    self._store.delete(key)
        self._store.delete(last)


def render_workload(stage: Stage[Any], record: JobRecord) -> Workload:
    """The workload that does a job; a pure function of the record."""
    resources = Resources.model_validate(record.spec.get("resources", {}))
    return Workload(
        kind=stage.kind,
        name=workload_name(stage.kind, record.id),
        argv=(sys.executable, "-m", f"services.{stage.kind}.worker"),
        env={"FABRICTUNE_JOB": record.name},
        digest=record.digest,
        labels=record.labels,
        gpus=resources.gpus,
        nodes=resources.nodes,
        cpu=resources.cpu,
        memory=resources.memory,
        queue_timeout_seconds=resources.queue_timeout,
        run_timeout_seconds=resources.run_timeout,
        retries=RETRIES,
    )


def workload_name(kind: str, job_id: str) -> str:
    """The workload of a job: a DNS label, the same whoever asks."""
    return f"{kind}-{job_id}"


def _make_id(kind: str, request_id: str) -> str:
    tail = hashlib.sha256(request_id.encode()).hexdigest()[:16] if request_id else secrets.token_hex(5)
    return f"{kind[:5].rstrip('-')}-{tail}"


def _now() -> float:
    return round(datetime.now(UTC).timestamp(), 3)
