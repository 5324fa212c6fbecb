"""Jobs as users meet them: real gRPC over a socket, a real object store, real worker processes; only the stage is a toy."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from fabrictune.v1 import job_pb2, merging_pb2, merging_pb2_grpc
from services.common import jobs as jobs_module
from services.common import metrics, upkeep
from services.common.artifacts import Artifacts
from services.common.clusters import Workload, WorkloadStatus
from services.common.clusters.local import LocalCluster
from services.common.config import ServerConfig, StoreConfig
from services.common.errors import FabrictuneError, PermissionDenied, ResourceExhausted, Unavailable
from services.common.job_api import JobApi
from services.common.jobs import Jobs
from services.common.main import settle
from services.common.server import Server, Service
from services.common.store import Store
from services.common.upkeep import Upkeep
from services.merging.service import MergingService
from tests.toy.worker import STAGE

E = job_pb2.Execution
ROOT = Path(__file__).resolve().parents[2]


class Stack:
    """A server with the toy stage, and a stub that talks to it."""

    def __init__(self, store: Store, object_store: StoreConfig, folder: Path) -> None:
        environment = {
            **os.environ,
            "FABRICTUNE_S3_ENDPOINT": object_store.endpoint,
            "FABRICTUNE_S3_BUCKET": store.bucket,
            "FABRICTUNE_S3_ACCESS_KEY": object_store.access_key,
            "FABRICTUNE_S3_SECRET_KEY": object_store.secret_key.get_secret_value(),
            "FABRICTUNE_DATA_DIR": str(folder),
            "PYTHONPATH": str(ROOT),
        }
        self.cluster = LocalCluster(folder / "cluster", 2, environment)
        self.jobs = Jobs(STAGE, store, Artifacts(store, folder / "cache"), self.cluster)
        api = JobApi(self.jobs, self.cluster, merging_pb2.MergeJob)
        name = "fabrictune.v1.MergingService"
        service = Service(name, MergingService(api), merging_pb2_grpc.add_MergingServiceServicer_to_server)
        self.server = Server([service], ServerConfig(port=0, metrics_port=0, drain_seconds=0), None)
        self.stub: Any = None

    async def start(self, reconciled: bool = True) -> None:
        await self.cluster.start()
        if reconciled:
            await Upkeep(self.jobs).reconcile()
        await self.server.start()
        self._settling = asyncio.create_task(Upkeep(self.jobs).settle_ended())
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.server.port}")
        self.stub = merging_pb2_grpc.MergingServiceStub(self._channel)

    async def close(self, stop_workloads: bool = True) -> None:
        await self._channel.close()
        self._settling.cancel()
        await self.server.close()
        await self.cluster.close(stop_workloads)

    async def create(self, engine: str, job_id: str = "t1", **fields: Any) -> merging_pb2.MergeJob:
        job = merging_pb2.MergeJob(spec=merging_pb2.MergeSpec(engine=engine))
        request = merging_pb2.CreateMergeJobRequest(merge_job=job, merge_job_id=job_id, **fields)
        made: merging_pb2.MergeJob = await self.stub.CreateMergeJob(request)
        return made

    async def get(self) -> merging_pb2.MergeJob:
        found: merging_pb2.MergeJob = await self.stub.GetMergeJob(merging_pb2.GetMergeJobRequest(name="mergeJobs/t1"))
        return found

    async def wait(self, name: str = "mergeJobs/t1") -> list[job_pb2.WatchEvent]:
        stream = self.stub.WatchMergeJob(merging_pb2.WatchMergeJobRequest(name=name))
        return [event async for event in stream]


@pytest.fixture
async def stack(
    store: Store, object_store: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Stack]:
    real = jobs_module.render_workload

    def render(stage: Any, record: Any) -> Workload:
        return replace(real(stage, record), argv=(sys.executable, "-m", "tests.toy.worker"))

    monkeypatch.setattr(jobs_module, "render_workload", render)
    made = Stack(store, object_store, tmp_path / "data")
    await made.start()
    yield made
    await made.close()


async def test_a_job_runs_to_its_end_and_its_events_arrive_in_order(stack: Stack) -> None:
    await stack.create("write")
    events = await stack.wait()
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "state"
    assert events[-1].state.state == E.SUCCEEDED
    assert {"log", "progress", "artifact"} <= set(kinds)
    assert [e.log.text for e in events if e.WhichOneof("event") == "log"] == ["toy: write"]
    job = await stack.stub.GetMergeJob(merging_pb2.GetMergeJobRequest(name="mergeJobs/t1"))
    assert job.output == "models/t1"
    assert job.execution.attempt == 1


async def test_prometheus_has_the_progress_of_running_jobs_only(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "EXPORT_SECONDS", 0.1)
    exporting = asyncio.create_task(Upkeep(stack.jobs).export_progress())
    labels = {"kind": "toy", "job": "t1"}
    await stack.create("sleep")
    async with asyncio.timeout(20):
        while metrics.REGISTRY.get_sample_value("fabrictune_job_loss", labels) is None:
            await asyncio.sleep(0.1)
    assert metrics.REGISTRY.get_sample_value("fabrictune_job_loss", labels) == 0.5
    assert metrics.REGISTRY.get_sample_value("fabrictune_job_total_steps", labels) == 2
    await stack.stub.CancelMergeJob(merging_pb2.CancelMergeJobRequest(name="mergeJobs/t1"))
    async with asyncio.timeout(20):
        while metrics.REGISTRY.get_sample_value("fabrictune_job_loss", labels) is not None:
            await asyncio.sleep(0.1)
    exporting.cancel()


async def test_a_watch_goes_on_after_a_resume_token(stack: Stack) -> None:
    await stack.create("write")
    events = [e for e in await stack.wait() if e.resume_token]
    token = events[0].resume_token
    again = stack.stub.WatchMergeJob(merging_pb2.WatchMergeJobRequest(name="mergeJobs/t1", resume_token=token))
    texts = [e.log.text async for e in again if e.WhichOneof("event") == "log"]
    assert len(texts) < sum(e.WhichOneof("event") == "log" for e in events)


async def test_the_same_request_id_with_another_spec_is_refused_with_a_reason(stack: Stack) -> None:
    first = await stack.create("write", job_id="", request_id="r1")
    same = await stack.create("write", job_id="", request_id="r1")
    assert first.name == same.name
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stack.create("sleep", job_id="", request_id="r1")
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(caught.value)
    assert status is not None and status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("REQUEST_ID_REUSED", "fabrictune.dev")


async def test_every_bad_field_is_named_at_once(stack: Stack) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stack.create("dance", job_id="Bad_Id")
    status = rpc_status.from_call(caught.value)
    bad = error_details_pb2.BadRequest()
    assert status is not None and status.details[1].Unpack(bad)
    assert {v.field for v in bad.field_violations} >= {"id", "spec.engine"}


async def test_validate_only_returns_the_plan_and_starts_nothing(stack: Stack) -> None:
    job = await stack.create("write", validate_only=True)
    assert "tests.toy.worker" in job.plan.manifest
    assert job.plan.commands[0].env["FABRICTUNE_JOB"] == "mergeJobs/t1"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stack.stub.GetMergeJob(merging_pb2.GetMergeJobRequest(name="mergeJobs/t1"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_failure_carries_the_workers_own_words(stack: Stack) -> None:
    await stack.create("fail")
    last = (await stack.wait())[-1].state
    assert last.state == E.FAILED
    assert last.error.message == "row 7 cannot be used"


async def test_a_worker_that_dies_is_started_again(stack: Stack) -> None:
    await stack.create("die-once")
    last = (await stack.wait())[-1].state
    assert (last.state, last.attempt) == (E.SUCCEEDED, 2)


async def test_a_worker_that_always_dies_fails_as_lost(stack: Stack) -> None:
    await stack.create("die")
    last = (await stack.wait())[-1].state
    assert last.state == E.FAILED
    assert "gone without an outcome" in last.error.message


async def test_cancel_ends_the_worker_and_the_state_says_so(stack: Stack) -> None:
    await stack.create("sleep")
    await _until_running(stack)
    await stack.stub.CancelMergeJob(merging_pb2.CancelMergeJobRequest(name="mergeJobs/t1"))
    assert (await stack.wait())[-1].state.state == E.CANCELLED
    while (await stack.cluster.list())[
        0
    ].phase.value != "failed":  # the outcome is written just before the process ends
        await asyncio.sleep(0.05)


async def test_deleting_a_running_job_is_refused_and_an_ended_one_is_forgotten(stack: Stack) -> None:
    await stack.create("write")
    await stack.wait()
    await stack.stub.DeleteMergeJob(merging_pb2.DeleteMergeJobRequest(name="mergeJobs/t1"))
    listed = await stack.stub.ListMergeJobs(merging_pb2.ListMergeJobsRequest())
    assert not listed.merge_jobs


async def test_a_job_whose_output_another_one_has_made_is_refused_before_it_begins(stack: Stack) -> None:
    await stack.create("write")
    await stack.wait()
    await stack.stub.DeleteMergeJob(merging_pb2.DeleteMergeJobRequest(name="mergeJobs/t1"))
    for dry in (True, False):
        with pytest.raises(grpc.aio.AioRpcError, match=r"models/t1 exists.*artifacts rm models/t1") as caught:
            await stack.create("sleep", validate_only=dry)
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    await stack.create("write")  # the same as before: it is there
    assert (await stack.wait())[-1].state.state == E.SUCCEEDED


async def test_a_job_that_the_machine_cannot_run_is_refused_and_nothing_is_left(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_for_gpus(monkeypatch)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.create("write")
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    listed = await stack.stub.ListMergeJobs(merging_pb2.ListMergeJobsRequest())
    assert not listed.merge_jobs


async def test_a_job_that_the_machine_can_run_no_more_fails_and_the_server_starts(
    stack: Stack, store: Store, object_store: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stack.create("sleep")
    await _until_running(stack)
    await stack.close()  # the workload is forgotten, the job is to be begun again
    ask_for_gpus(monkeypatch)
    after = Stack(store, object_store, tmp_path / "data")
    await after.start()
    try:
        job = await after.stub.GetMergeJob(merging_pb2.GetMergeJobRequest(name="mergeJobs/t1"))
    finally:
        await after.close()
    assert job.execution.state == E.FAILED
    assert "this machine is 1 node" in job.execution.error.message


@dataclass
class Hindered:
    """How a cluster takes no workload for a while."""

    error: FabrictuneError | None = None
    """What it says; None: nothing, it does not answer."""
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def hinder(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        real = stack.cluster.create

        async def create(workload: Workload) -> WorkloadStatus:
            if self.error is not None and not self.over.is_set():
                raise self.error
            await self.over.wait()
            return await real(workload)

        monkeypatch.setattr(stack.cluster, "create", create)


@pytest.fixture
async def lost(
    stack: Stack, store: Store, object_store: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Stack]:
    """A server that has started and not looked yet for the job that an earlier one has lost."""
    monkeypatch.setattr(upkeep, "AGAIN_SECONDS", 0.1)
    await stack.create("sleep")
    await _until_running(stack)
    await stack.close()
    after = Stack(store, object_store, tmp_path / "data")
    await after.start(reconciled=False)
    yield after
    await after.close()


@pytest.mark.parametrize("kind", [ResourceExhausted, Unavailable, PermissionDenied])
async def test_a_lost_job_waits_while_its_cluster_refuses_it_for_a_time(
    lost: Stack, kind: type[FabrictuneError], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = Hindered(kind("no jobs today"))
    refusing.hinder(lost, monkeypatch)
    async with AsyncExitStack() as tasks:
        await settle(tasks, lost.jobs)
        await asyncio.sleep(0.5)
        assert (await lost.get()).execution.state == E.QUEUED
        refusing.over.set()
        await _until_running(lost)
        assert (await lost.get()).execution.state == E.RUNNING


async def test_a_server_answers_while_it_looks_for_lost_jobs(lost: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    Hindered().hinder(lost, monkeypatch)
    async with AsyncExitStack() as tasks, asyncio.timeout(5):
        await settle(tasks, lost.jobs)
        assert (await lost.get()).execution.state == E.QUEUED


async def test_a_lost_job_that_is_cancelled_while_it_is_begun_again_is_stopped(
    lost: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    hindered = Hindered()
    hindered.hinder(lost, monkeypatch)
    beginning = asyncio.create_task(Upkeep(lost.jobs).reconcile())
    await asyncio.sleep(0.5)
    cancelled = await lost.stub.CancelMergeJob(merging_pb2.CancelMergeJobRequest(name="mergeJobs/t1"))
    assert cancelled.execution.state == E.CANCELLED
    hindered.over.set()
    await beginning
    assert lost.cluster._entries["toy-t1"].stop_time


async def test_jobs_that_have_ended_cost_a_server_that_starts_next_to_nothing(
    store: Store, object_store: StoreConfig, tmp_path: Path
) -> None:
    for number in range(40):
        for part in ("job", "attempts/0001", "progress", "outcome"):
            store.put_json(f"mergeJobs/j{number}/{part}.json", {})
    asked: list[str] = []

    class CountedStore(Store):
        def _ask(self, key: str, request: Callable[[], Any]) -> Any:
            asked.append(key)
            return super()._ask(key, request)

    counted = CountedStore(object_store.model_copy(update={"bucket": store.bucket}))
    cluster = LocalCluster(tmp_path / "cluster")
    assert await Upkeep(Jobs(STAGE, counted, Artifacts(counted, tmp_path / "cache"), cluster)).reconcile() == []
    assert asked == ["mergeJobs/"]


def ask_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    real = jobs_module.render_workload
    monkeypatch.setattr(jobs_module, "render_workload", lambda stage, record: replace(real(stage, record), gpus=99))


async def test_lists_come_in_pages(stack: Stack) -> None:
    for number in range(3):
        await stack.create("write", job_id=f"p{number}")
    first = await stack.stub.ListMergeJobs(merging_pb2.ListMergeJobsRequest(page_size=2))
    assert [j.name for j in first.merge_jobs] == ["mergeJobs/p0", "mergeJobs/p1"]
    rest = await stack.stub.ListMergeJobs(
        merging_pb2.ListMergeJobsRequest(page_size=2, page_token=first.next_page_token)
    )
    assert [j.name for j in rest.merge_jobs] == ["mergeJobs/p2"]
    assert not rest.next_page_token


async def test_a_worker_outlives_a_server_that_is_killed_and_is_found_again(
    stack: Stack, store: Store, object_store: StoreConfig, tmp_path: Path
) -> None:
    await stack.create("sleep")
    pid = await _until_running(stack)
    await stack.close(stop_workloads=False)  # what is left on disk after a kill -9
    after = Stack(store, object_store, tmp_path / "data")
    await after.start()
    try:
        job = await after.stub.GetMergeJob(merging_pb2.GetMergeJobRequest(name="mergeJobs/t1"))
        assert job.execution.state == E.RUNNING
        os.kill(pid, signal.SIGKILL)  # lost: it is tried again, by the new server
        await _until_second_attempt(after)
    finally:
        await after.close()


async def test_a_stranger_with_the_number_of_a_lost_process_is_left_alone(
    stack: Stack, store: Store, object_store: StoreConfig, tmp_path: Path
) -> None:
    await stack.create("sleep")
    pid = await _until_running(stack)
    await stack.close(stop_workloads=False)
    os.kill(pid, signal.SIGKILL)
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    journal = tmp_path / "data/cluster/journal/toy-t1.json"
    journal.write_text(json.dumps({**json.loads(journal.read_text()), "pid": stranger.pid}))
    after = Stack(store, object_store, tmp_path / "data")
    await after.start()
    try:
        await _until_second_attempt(after)
        assert stranger.poll() is None
    finally:
        await after.close()
        stranger.kill()
        stranger.wait()


async def _until_second_attempt(stack: Stack) -> None:
    for _ in range(100):
        job = await stack.stub.GetMergeJob(merging_pb2.GetMergeJobRequest(name="mergeJobs/t1"))
        if job.execution.attempt == 2:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"attempt {job.execution.attempt}")


async def _until_running(stack: Stack) -> int:
    for _ in range(200):
        entry = stack.cluster._entries.get("toy-t1")
        keys = list(stack.jobs._store.list_keys("events/mergeJobs/t1/"))
        if entry and entry.pid and keys:
            return entry.pid
        await asyncio.sleep(0.05)
    raise AssertionError("the worker did not start")
