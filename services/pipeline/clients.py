"""What the pipeline asks of the other services, over gRPC: they meet in artifact names and proto messages only."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import grpc
from google.protobuf import json_format
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from fabrictune.v1 import (
    conversion_pb2,
    conversion_pb2_grpc,
    evaluation_pb2,
    evaluation_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    job_pb2,
    merging_pb2,
    merging_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)
from services.common.errors import FabrictuneError, InvalidSpec, Violation
from services.common.pauses import pauses

POLL_SECONDS = 0.5
"""Between looks at a revision that starts; its server has it in memory."""
WAIT_SECONDS = 0.5, 2.0
"""Between looks at a job: at first, at most."""
AWAY_SECONDS = 0.2, 5.0
"""Between calls of a server that is away: at first, at most."""
ENDED = (job_pb2.Execution.SUCCEEDED, job_pb2.Execution.FAILED, job_pb2.Execution.CANCELLED)

RESUMED = ("TrainingJob", "EvaluationJob")
"""Kinds whose failed or cancelled jobs can be resumed."""


@dataclass(frozen=True)
class JobKind:
    """Where one kind of job is asked for. messages: the generated module; resource: such as "TrainingJob"."""

    messages: ModuleType
    stub: Any
    resource: str
    collection: str


KINDS: Mapping[str, JobKind] = {
    "conversion": JobKind(conversion_pb2, conversion_pb2_grpc.ConversionServiceStub, "ConversionJob", "conversionJobs"),
    "training": JobKind(training_pb2, training_pb2_grpc.TrainingServiceStub, "TrainingJob", "trainingJobs"),
    "merging": JobKind(merging_pb2, merging_pb2_grpc.MergingServiceStub, "MergeJob", "mergeJobs"),
    "evaluation": JobKind(evaluation_pb2, evaluation_pb2_grpc.EvaluationServiceStub, "EvaluationJob", "evaluationJobs"),
}


class RemoteError(FabrictuneError):
    """Another service's error, passed on as it came."""

    def __init__(self, status: status_pb2.Status) -> None:
        self.status = status
        super().__init__(status.message, violations=_violations(status))

    def to_status(self) -> status_pb2.Status:
        """The status as it came."""
        return self.status

    @property
    def reason_of_status(self) -> str:
        """The reason of its ErrorInfo, such as "GATE_NOT_MET"; "" without one."""
        info = error_details_pb2.ErrorInfo()
        return next((str(info.reason) for detail in self.status.details if detail.Unpack(info)), "")


class JobClient:
    """The jobs of one kind."""

    def __init__(self, channel: grpc.aio.Channel, kind: str) -> None:
        self._kind = KINDS[kind]
        self._stub = self._kind.stub(channel)

    def message(self, spec: Mapping[str, Any]) -> Any:
        """A resource with this spec. Raises InvalidSpec on a field that the API does not have."""
        resource = getattr(self._kind.messages, self._kind.resource)()
        try:
            json_format.ParseDict(dict(spec), resource.spec)
        except json_format.ParseError as error:
            raise InvalidSpec(f"the {self._kind.resource}'s spec is wrong: {error}") from None
        return resource

    async def plan(self, spec: Mapping[str, Any]) -> str:
        """The plan's digest; nothing is started. Raises RemoteError, InvalidSpec."""
        job = await self._call("Create", **{_field(self._kind.resource): self.message(spec), "validate_only": True})
        return str(job.plan.digest)

    async def create(self, spec: Mapping[str, Any], job_id: str, labels: Mapping[str, str]) -> Any:
        """Start it, or find it."""
        job = self.message(spec)
        job.labels.update(labels)
        field = _field(self._kind.resource)
        return await self._call("Create", **{field: job, f"{field}_id": job_id})

    async def find(self, job_id: str) -> Any | None:
        """The job, or None."""
        try:
            return await self._call("Get", name=self.name(job_id))
        except RemoteError as error:
            if error.status.code == code_pb2.NOT_FOUND:
                return None
            raise

    async def restart(self, job: Any, spec: Mapping[str, Any], labels: Mapping[str, str]) -> Any:
        """Begin an ended job again: training and evaluation go on with what they have kept, others start afresh."""
        job_id = str(job.name).rpartition("/")[2]
        # One that has succeeded is begun again because its output is gone; it has nothing to go on with.
        if self._kind.resource in RESUMED and job.execution.state != job_pb2.Execution.SUCCEEDED:
            return await self._call("Resume", name=job.name)
        await self._call("Delete", name=job.name)
        return await self.create(spec, job_id, labels)

    async def cancel(self, job_id: str) -> None:
        """Ask it to stop."""
        await self._call("Cancel", name=self.name(job_id))

    async def wait(self, job_id: str) -> Any:
        """The job once it has ended; a server that is away for a while is waited for."""
        pause = pauses(*WAIT_SECONDS)
        while True:
            job = await self._call("Get", name=self.name(job_id))
            if job.execution.state in ENDED:
                return job
            await asyncio.sleep(next(pause))

    def name(self, job_id: str) -> str:
        """The job's resource name."""
        return f"{self._kind.collection}/{job_id}"

    async def _call(self, verb: str, **fields: Any) -> Any:
        method = f"{verb}{self._kind.resource}"
        return await call(getattr(self._stub, method), getattr(self._kind.messages, f"{method}Request")(**fields))


class InferenceClient:
    """Deployments and their revisions."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)

    async def start_revision(
        self, deployment: str, revision_id: str, spec: Mapping[str, Any]
    ) -> inference_pb2.Revision:
        """Start a revision without traffic, or find it; returns when it is ready. Raises RemoteError when it fails."""
        wanted = inference_pb2.Revision()
        try:
            json_format.ParseDict(dict(spec), wanted.spec)
        except json_format.ParseError as error:
            raise InvalidSpec(f"the revision's spec is wrong: {error}") from None
        revision = await call(
            self._stub.CreateRevision,
            inference_pb2.CreateRevisionRequest(parent=deployment, revision=wanted, revision_id=revision_id),
        )
        while revision.state != inference_pb2.Revision.READY:
            if revision.state in (inference_pb2.Revision.FAILED, inference_pb2.Revision.STOPPED):
                raise RemoteError(revision.error)
            await asyncio.sleep(POLL_SECONDS)
            revision = await call(self._stub.GetRevision, inference_pb2.GetRevisionRequest(name=revision.name))
        ready: inference_pb2.Revision = revision
        return ready

    async def delete_revision(self, name: str) -> None:
        """Stop a revision; one that has gone is fine."""
        try:
            await call(self._stub.DeleteRevision, inference_pb2.DeleteRevisionRequest(name=name))
        except RemoteError as error:
            if error.status.code != code_pb2.NOT_FOUND:
                raise

    async def take_traffic(self, deployment: str, revision_id: str) -> inference_pb2.Deployment:
        """Move all traffic to one revision."""
        request = inference_pb2.UpdateTrafficRequest(name=deployment, traffic={revision_id: 100})
        told: inference_pb2.Deployment = await call(self._stub.UpdateTraffic, request)
        return told

    async def delete_empty(self, deployment: str) -> None:
        """Forget a deployment without revisions; one that has some stays, one that has gone is fine."""
        try:
            found = await call(self._stub.GetDeployment, inference_pb2.GetDeploymentRequest(name=deployment))
            if not found.revisions:
                await call(self._stub.DeleteDeployment, inference_pb2.DeleteDeploymentRequest(name=deployment))
        except RemoteError as error:
            if error.status.code != code_pb2.NOT_FOUND:
                raise


async def call(method: Any, request: Any) -> Any:
    """Call until the server can be reached; its own errors come as RemoteError."""
    pause = pauses(*AWAY_SECONDS, growth=2)
    while True:
        try:
            return await method(request, timeout=60)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise RemoteError(rpc_status.from_call(error) or _bare(error)) from None
            await asyncio.sleep(next(pause))


def _field(resource: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in resource).lstrip("_")


def _bare(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    return status_pb2.Status(code=error.code().value[0], message=error.details() or "")


def _violations(status: status_pb2.Status) -> list[Violation]:
    bad = error_details_pb2.BadRequest()
    found = [Violation(v.field, v.description) for d in status.details if d.Unpack(bad) for v in bad.field_violations]
    return found
