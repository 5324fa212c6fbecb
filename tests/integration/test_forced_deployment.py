"""A run past a gate that is not met, what a deployment's lineage tells of it, and what a run leaves that ends before. The
stages' servers only say how it went."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import empty_pb2, json_format

from fabrictune.v1 import artifact_pb2, inference_pb2, inference_pb2_grpc, job_pb2
from services.common.artifacts import Artifacts
from services.common.clusters import Workload
from services.common.errors import GateNotMet, NotFound, Unavailable, Violation
from services.common.store import Store
from services.pipeline.artifacts import ArtifactService
from services.pipeline.clients import KINDS, RemoteError
from services.pipeline.lineage import lineage_key
from services.pipeline.reconcile import Reconciler, _is_filled_in
from services.pipeline.runs import RunCluster
from services.pipeline.spec import Spec
from tests.conftest import Recorder

OUTPUTS = {"conversion": "datasets/d", "training": "adapters/a", "merging": "models/m", "evaluation": "reports/r"}
RUN: dict[str, Any] = {
    "conversion": {},
    "training": {"base_model": "models/base"},
    "evaluation": {"gate": {"calls": 0.9}, "targets": [{"address": "http://a/v1", "model": "m"}], "constrained": True},
    "deployment": {"deployment": "deployments/d"},
}
REVISION = "deployments/d/revisions/r-1"


@pytest.fixture
def served(store: Store, artifacts: Artifacts, tmp_path: Path) -> ArtifactService:
    """A deployment that serves models/m."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files/x.safetensors").write_text("x")
    for name in ("models/m", "reports/r"):
        artifacts.publish(tmp_path / "files", name, name.partition("s/")[0])
    store.put_json(
        "deployments/d/deployment.json",
        {"traffic": {"r-1": 100}, "revisions": {"r-1": {"spec": {"model": "models/m"}}}},
    )
    return ArtifactService(store, artifacts)


async def root(service: ArtifactService) -> artifact_pb2.Artifact:
    lineage = await service.GetLineage(artifact_pb2.GetLineageRequest(name="deployments/d"), None)
    return lineage.artifacts[0]


async def test_a_deployment_by_hand_tells_its_model_only(served: ArtifactService) -> None:
    told = await root(served)
    assert [i.name for i in told.created_by.inputs] == ["models/m"]
    assert (told.created_by.job, len(told.metadata)) == ("", 0)


async def test_a_run_is_named_and_a_force_with_the_numbers(served: ArtifactService, store: Store) -> None:
    run: dict[str, Any] = {"run": "pipelineRuns/p"}
    store.put_json(lineage_key(REVISION), run)
    told = await root(served)
    assert (told.created_by.job, len(told.metadata)) == ("pipelineRuns/p", 0)
    report = {"name": "reports/r", "digest": "d" * 64}
    store.put_json(lineage_key(REVISION), {**run, "forced": True, "report": report, "error": {"message": "calls: 1 %"}})
    told = await root(served)
    assert [i.name for i in told.created_by.inputs] == ["models/m", "reports/r"]
    assert told.metadata["forced"] is True
    assert told.metadata["description"] == "deployed by force: the gate of reports/r is not met"
    assert json_format.MessageToDict(told.metadata)["error"] == {"message": "calls: 1 %"}


async def test_what_lies_beside_a_revision_without_traffic_is_not_told(served: ArtifactService, store: Store) -> None:
    store.put_json(lineage_key("deployments/d/revisions/r-2"), {"run": "pipelineRuns/q"})
    assert (await root(served)).created_by.job == ""


def test_only_a_missed_gate_can_be_forced() -> None:
    assert RemoteError(GateNotMet("calls").to_status()).reason_of_status == "GATE_NOT_MET"
    assert RemoteError(NotFound("gone").to_status()).reason_of_status == "NOT_FOUND"


def test_what_a_run_fills_in_is_not_complained_of_but_what_is_named_alike_is() -> None:
    assert _is_filled_in("evaluation", "spec.target")
    assert _is_filled_in("evaluation", "spec.target.address")
    assert not _is_filled_in("evaluation", "spec.targets[0].address")
    assert not _is_filled_in("conversion", "spec.sources")


class JobServer:
    """Jobs of one kind: each has ended at once unless `slow`; an evaluation with a gate has missed it."""

    def __init__(self, kind: str) -> None:
        self.kind, self.jobs, self.slow = kind, dict[str, Any](), False
        self.begun, self.cancelled, self.resumed = asyncio.Event(), list[str](), list[str]()
        self.resource, self.messages = KINDS[kind].resource, KINDS[kind].messages

    async def create(self, request: Any, context: Any) -> Any:
        field = "".join(f"_{c.lower()}" if c.isupper() else c for c in self.resource).lstrip("_")
        job = getattr(request, field)
        if request.validate_only:
            job.plan.digest = f"{len(str(job.spec)):012d}"
            return job
        job.name, job.output = f"{KINDS[self.kind].collection}/{getattr(request, f'{field}_id')}", OUTPUTS[self.kind]
        job.execution.state = job_pb2.Execution.RUNNING if self.slow else job_pb2.Execution.SUCCEEDED
        if self.kind == "evaluation" and job.spec.gate:
            error = GateNotMet("not good enough", {"report": job.output}, [Violation("calls", "1 % of 10 rows")])
            job.execution.state = job_pb2.Execution.FAILED
            job.execution.error.CopyFrom(error.to_status())
        self.jobs[job.name] = job
        self.begun.set()
        return job

    async def get(self, request: Any, context: Any) -> Any:
        if request.name not in self.jobs:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such job")
        return self.jobs[request.name]

    async def cancel(self, request: Any, context: Any) -> Any:
        self.cancelled.append(request.name)
        return self.jobs[request.name]

    async def resume(self, request: Any, context: Any) -> Any:
        self.resumed.append(request.name)
        job = self.jobs[request.name]
        job.execution.state = job_pb2.Execution.SUCCEEDED
        return job

    async def delete(self, request: Any, context: Any) -> Any:
        del self.jobs[request.name]
        return empty_pb2.Empty()

    def handlers(self) -> grpc.GenericRpcHandler:
        """Its gRPC methods."""
        service = next(iter(self.messages.DESCRIPTOR.services_by_name.values()))
        methods: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(
                method,
                request_deserializer=getattr(self.messages, f"{name}Request").FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
            for name, method in self.methods().items()
            if hasattr(self.messages, f"{name}Request")
        }
        return grpc.method_handlers_generic_handler(service.full_name, methods)

    def methods(self) -> dict[str, Any]:
        """Method → what does it; not all kinds have all."""
        verbs = {
            "Create": self.create,
            "Get": self.get,
            "Cancel": self.cancel,
            "Resume": self.resume,
            "Delete": self.delete,
        }
        return {f"{verb}{self.resource}": method for verb, method in verbs.items()}


class RevisionServer(inference_pb2_grpc.InferenceServiceServicer):
    """Revisions that are ready at once."""

    def __init__(self) -> None:
        self.traffic: dict[str, int] = {}
        self.deleted: list[str] = []
        self.full = False
        """Traffic cannot be moved."""

    async def CreateRevision(
        self, request: inference_pb2.CreateRevisionRequest, context: Any
    ) -> inference_pb2.Revision:
        name = f"{request.parent}/revisions/{request.revision_id}"
        return inference_pb2.Revision(name=name, state=inference_pb2.Revision.READY)

    async def DeleteRevision(self, request: inference_pb2.DeleteRevisionRequest, context: Any) -> Any:
        self.deleted.append(request.name)
        return empty_pb2.Empty()

    async def UpdateTraffic(
        self, request: inference_pb2.UpdateTrafficRequest, context: Any
    ) -> inference_pb2.Deployment:
        if self.full:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now")
        self.traffic = dict(request.traffic)
        return inference_pb2.Deployment(name=request.name)


class Stages:
    """All stages' servers, and the reconciler that asks them."""

    def __init__(self, reconciler: Reconciler, jobs: dict[str, JobServer], revisions: RevisionServer) -> None:
        self.reconciler, self.jobs, self.revisions = reconciler, jobs, revisions


@pytest.fixture
async def stages(store: Store, artifacts: Artifacts, tmp_path: Path) -> AsyncIterator[Stages]:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/x.safetensors").write_text("x")
    for name in ("models/m", "models/base", "reports/r"):
        artifacts.publish(tmp_path / "files", name, name.partition("s/")[0])
    jobs, revisions = {kind: JobServer(kind) for kind in OUTPUTS}, RevisionServer()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(tuple(job.handlers() for job in jobs.values()))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(revisions, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        channels = dict.fromkeys([*OUTPUTS, "inference"], channel)
        yield Stages(Reconciler(channels, store, artifacts), jobs, revisions)
    await server.stop(None)


async def test_a_missed_gate_stops_a_run_with_its_numbers_and_its_report(stages: Stages, reporter: Recorder) -> None:
    with pytest.raises(RemoteError) as refused:
        await stages.reconciler.drive("pipelineRuns/p", Spec.model_validate(RUN), reporter)
    assert refused.value.reason_of_status == "GATE_NOT_MET"
    assert [(v.field, v.description) for v in refused.value.violations] == [("calls", "1 % of 10 rows")]
    assert stages.revisions.traffic == {}


async def test_only_the_tuned_model_meets_the_gate_and_the_others(stages: Stages, reporter: Recorder) -> None:
    with pytest.raises(RemoteError):
        await stages.reconciler.drive("pipelineRuns/p", Spec.model_validate(RUN), reporter)
    before, after = (job.spec for job in stages.jobs["evaluation"].jobs.values())
    assert (before.target.label, len(before.gate), len(before.targets), before.constrained) == ("before", 0, 0, False)
    assert (after.target.label, len(after.gate), len(after.targets), after.constrained) == ("after", 1, 1, True)
    assert after.baseline == "reports/r"


async def test_a_force_deploys_and_leaves_the_error_on_record(
    stages: Stages, reporter: Recorder, store: Store, artifacts: Artifacts
) -> None:
    made = await stages.reconciler.drive("pipelineRuns/p", Spec.model_validate({**RUN, "force": True}), reporter)
    assert made["deployment"] == "deployments/d"
    (revision,) = stages.revisions.traffic
    stored = store.get_json("pipelineRuns/p/stages.json")
    assert stored is not None
    judged = next(stage for stage in stored["stages"] if stage["stage"] == "evaluation-after")
    assert judged["execution"]["state"] == "SUCCEEDED"
    assert judged["execution"]["error"]["details"][0]["reason"] == "GATE_NOT_MET"
    told = store.get_json(lineage_key(f"deployments/d/revisions/{revision}"))
    assert told is not None
    assert (told["run"], told["forced"], told["report"]["name"]) == ("pipelineRuns/p", True, "reports/r")
    assert told["report"]["digest"] == artifacts.get("reports/r").digest
    assert any(severity == "WARNING" and "deployed by force" in text for severity, text in reporter.lines)


async def test_a_forced_model_never_serves_without_its_lineage(
    stages: Stages, reporter: Recorder, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(key: str, *_: Any, **__: Any) -> bool:
        raise Unavailable(f"no room for {key}")

    spec = Spec.model_validate({**RUN, "force": True})
    with monkeypatch.context() as patch:
        real = store.put_json
        patch.setattr(store, "put_json", lambda key, *a, **k: (broken if "/lineage/" in key else real)(key, *a, **k))
        with pytest.raises(Unavailable, match="no room for deployments/d/lineage/"):
            await stages.reconciler.drive("pipelineRuns/p", spec, reporter)
    assert stages.revisions.traffic == {}
    stages.revisions.full = True
    with pytest.raises(RemoteError, match="not now"):
        await stages.reconciler.drive("pipelineRuns/p", spec, reporter)
    (key,) = store.list_keys("deployments/d/lineage/")
    assert (store.get_json(key) or {})["forced"] is True


async def test_a_gate_that_is_met_leaves_no_trace_of_the_force(
    stages: Stages, reporter: Recorder, store: Store
) -> None:
    spec = {**RUN, "evaluation": {}, "force": True}
    await stages.reconciler.drive("pipelineRuns/p", Spec.model_validate(spec), reporter)
    (revision,) = stages.revisions.traffic
    assert store.get_json(lineage_key(f"deployments/d/revisions/{revision}")) == {"run": "pipelineRuns/p"}


async def evaluating(stages: Stages, store: Store) -> RunCluster:
    """A run of this process whose first evaluation goes on and on."""
    stages.jobs["evaluation"].slow = True
    store.put_json("pipelineRuns/p/job.json", {"spec": RUN})
    runs = RunCluster(stages.reconciler, store)
    await runs.create(Workload("pipeline", "pipeline-p", (), {"FABRICTUNE_JOB": "pipelineRuns/p"}))
    async with asyncio.timeout(20):
        await stages.jobs["evaluation"].begun.wait()
        while not any("job" in s for s in (store.get_json("pipelineRuns/p/stages.json") or {})["stages"][-1:]):
            await asyncio.sleep(0.05)
    return runs


async def test_a_process_that_ends_leaves_the_revision_that_is_being_evaluated(stages: Stages, store: Store) -> None:
    runs = await evaluating(stages, store)
    await runs.close()
    assert stages.revisions.deleted == [] and stages.jobs["evaluation"].cancelled == []


async def test_a_run_that_a_user_cancels_stops_the_revision_that_was_being_evaluated(
    stages: Stages, store: Store
) -> None:
    runs = await evaluating(stages, store)
    await runs.delete("pipeline-p")
    (revision,) = stages.revisions.deleted
    assert revision.startswith("deployments/d/revisions/r-")
    assert stages.jobs["evaluation"].cancelled == list(stages.jobs["evaluation"].jobs)


@pytest.mark.parametrize("state", [job_pb2.Execution.FAILED, job_pb2.Execution.CANCELLED])
async def test_a_run_that_begins_again_keeps_what_an_evaluation_was_answered(
    stages: Stages, reporter: Recorder, state: job_pb2.Execution.State
) -> None:
    """Deleting the job would delete its answers; a conversion has none to keep."""
    spec = Spec.model_validate({**RUN, "evaluation": {}})
    await stages.reconciler.drive("pipelineRuns/p", spec, reporter)
    for kind in ("evaluation", "conversion"):
        for job in stages.jobs[kind].jobs.values():
            job.execution.state = state
    names = set(stages.jobs["evaluation"].jobs)
    await stages.reconciler.drive("pipelineRuns/q", spec, reporter)
    assert set(stages.jobs["evaluation"].resumed) == names
    assert {job.execution.state for job in stages.jobs["conversion"].jobs.values()} == {job_pb2.Execution.SUCCEEDED}


async def test_a_job_whose_output_is_gone_is_begun_afresh(stages: Stages, reporter: Recorder) -> None:
    """It has succeeded, and only failed and cancelled jobs can be resumed. The store here has no adapter."""
    spec = Spec.model_validate({**RUN, "evaluation": {}})
    await stages.reconciler.drive("pipelineRuns/p", spec, reporter)
    (before,) = stages.jobs["training"].jobs.values()
    await stages.reconciler.drive("pipelineRuns/q", spec, reporter)
    (after,) = stages.jobs["training"].jobs.values()
    assert stages.jobs["training"].resumed == []
    assert (after.name, after is before) == (before.name, False)
