"""Servers of all stages that only say how it went, and runs of this process that ask them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import empty_pb2

from fabrictune.v1 import inference_pb2, inference_pb2_grpc, job_pb2
from services.common.artifacts import Artifacts
from services.common.clusters import Workload
from services.common.errors import GateNotMet, Violation
from services.common.store import Store
from services.pipeline.clients import KINDS
from services.pipeline.reconcile import Reconciler
from services.pipeline.runs import RunCluster

OUTPUTS = {"conversion": "datasets/d", "training": "adapters/a", "merging": "models/m", "evaluation": "reports/r"}
RUN: dict[str, Any] = {
    "conversion": {},
    "training": {"base_model": "models/base"},
    "evaluation": {"gate": {"calls": 0.9}, "targets": [{"address": "http://a/v1", "model": "m"}], "constrained": True},
    "deployment": {"deployment": "deployments/d"},
}


class JobServer:
    """Jobs of one kind: each has ended at once unless `slow`; an evaluation with a gate has missed it. `away`: none can be
    cancelled."""

    def __init__(self, kind: str) -> None:
        self.kind, self.jobs, self.slow, self.away = kind, dict[str, Any](), False, False
        self.begun, self.cancelled, self.resumed = asyncio.Event(), list[str](), list[str]()
        self.resource, self.messages = KINDS[kind].resource, KINDS[kind].messages

    async def create(self, request: Any, context: Any) -> Any:
        field = "".join(f"_{c.lower()}" if c.isupper() else c for c in self.resource).lstrip("_")
        job = getattr(request, field)
        if request.validate_only:
            job.plan.digest = hashlib.sha256(str(job.spec).encode()).hexdigest()
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
        if self.away:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")
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
    """Revisions that are ready at once, unless `loading`."""

    def __init__(self) -> None:
        self.traffic: dict[str, int] = {}
        self.deployments: dict[str, set[str]] = {}
        """Names of their revisions."""
        self.started: list[str] = []
        self.deleted: list[str] = []
        self.full = False
        """Traffic cannot be moved."""
        self.busy = False
        """Nor is that said."""
        self.loading = False
        self.called = asyncio.Event()
        """A revision was started."""

    async def CreateRevision(
        self, request: inference_pb2.CreateRevisionRequest, context: Any
    ) -> inference_pb2.Revision:
        name = f"{request.parent}/revisions/{request.revision_id}"
        self.deployments.setdefault(request.parent, set()).add(name)
        self.started.append(name)
        self.called.set()
        return self.revision(name)

    async def GetRevision(self, request: inference_pb2.GetRevisionRequest, context: Any) -> inference_pb2.Revision:
        return self.revision(request.name)

    async def DeleteRevision(self, request: inference_pb2.DeleteRevisionRequest, context: Any) -> Any:
        deployment, _, revision_id = request.name.partition("/revisions/")
        if request.name not in self.deployments.get(deployment, ()):
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such revision")
        if self.traffic.get(revision_id):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "it takes traffic")
        self.deployments[deployment].discard(request.name)
        self.deleted.append(request.name)
        return empty_pb2.Empty()

    async def UpdateTraffic(
        self, request: inference_pb2.UpdateTrafficRequest, context: Any
    ) -> inference_pb2.Deployment:
        if self.full:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now")
        while self.busy:
            await asyncio.sleep(0.05)
        self.traffic = dict(request.traffic)
        return inference_pb2.Deployment(name=request.name)

    async def GetDeployment(
        self, request: inference_pb2.GetDeploymentRequest, context: Any
    ) -> inference_pb2.Deployment:
        if request.name not in self.deployments:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such deployment")
        return inference_pb2.Deployment(name=request.name, revisions=map(self.revision, self.deployments[request.name]))

    async def DeleteDeployment(self, request: inference_pb2.DeleteDeploymentRequest, context: Any) -> empty_pb2.Empty:
        del self.deployments[request.name]
        return empty_pb2.Empty()

    def revision(self, name: str) -> inference_pb2.Revision:
        """As it is now."""
        state = inference_pb2.Revision.LOADING if self.loading else inference_pb2.Revision.READY
        return inference_pb2.Revision(name=name, state=state)


class Stages:
    """All stages' servers, and the reconciler that asks them."""

    def __init__(self, reconciler: Reconciler, jobs: dict[str, JobServer], revisions: RevisionServer) -> None:
        self.reconciler, self.jobs, self.revisions = reconciler, jobs, revisions


@asynccontextmanager
async def serve_stages(store: Store, artifacts: Artifacts, folder: Path) -> AsyncIterator[Stages]:
    """The servers, and what their jobs have made."""
    (folder / "files").mkdir()
    (folder / "files/x.safetensors").write_text("x")
    for name in ("models/m", "models/base", "reports/r"):
        artifacts.publish(folder / "files", name, name.partition("s/")[0])
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


async def begin(stages: Stages, store: Store, spec: dict[str, Any] = RUN, name: str = "p") -> RunCluster:
    """A run of this process."""
    runs = RunCluster(stages.reconciler, store)
    store.put_json(f"pipelineRuns/{name}/job.json", {"spec": spec})
    await runs.create(Workload("pipeline", f"pipeline-{name}", (), {"FABRICTUNE_JOB": f"pipelineRuns/{name}"}))
    return runs


async def evaluating(stages: Stages, store: Store, spec: dict[str, Any] = RUN, name: str = "p") -> RunCluster:
    """A run of this process whose first evaluation goes on and on."""
    stages.jobs["evaluation"].slow = True
    runs = await begin(stages, store, spec, name)
    await until(lambda: job_of(store, name, "evaluation-before") in stages.jobs["evaluation"].jobs)
    return runs


def job_of(store: Store, name: str, stage: str) -> str:
    """The job or revision that a run's stage waits for, or ""."""
    told = (store.get_json(f"pipelineRuns/{name}/stages.json") or {"stages": []})["stages"]
    return next((str(s.get("job", "")) for s in told if s["stage"] == stage), "")


async def until(come: Callable[[], Any], seconds: float = 20) -> None:
    """Wait for something to be so."""
    async with asyncio.timeout(seconds):
        while not come():
            await asyncio.sleep(0.05)
