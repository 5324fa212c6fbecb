"""The client library: one `Client` for all services of an endpoint.

    with Client() as client:                       # FABRICTUNE_ENDPOINT, or the `fabrictune up` of this folder
        job = client.training.create({"dataset": "datasets/d1", "base_model": "models/m1"})
        for event in client.training.watch(job.name): ...

Specs are plain dicts in the API's own field names; answers are protobuf messages. Errors are `ApiError`.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from google.protobuf import json_format

from fabrictune.channel import DEADLINE_SECONDS, from_rpc, from_status, open_channel
from fabrictune.connection import find_endpoint
from fabrictune.errors import ApiError
from fabrictune.names import CANCELLED, FAILED
from fabrictune.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    conversion_pb2,
    conversion_pb2_grpc,
    evaluation_pb2,
    evaluation_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    job_pb2,
    merging_pb2,
    merging_pb2_grpc,
    pipeline_pb2,
    pipeline_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)


class Kind(NamedTuple):
    """One kind of job: its generated module, stub, resource and collection."""

    messages: Any
    stub: Any
    resource: str
    collection: str


KINDS: Mapping[str, Kind] = {
    "conversion": Kind(conversion_pb2, conversion_pb2_grpc.ConversionServiceStub, "ConversionJob", "conversionJobs"),
    "training": Kind(training_pb2, training_pb2_grpc.TrainingServiceStub, "TrainingJob", "trainingJobs"),
    "merging": Kind(merging_pb2, merging_pb2_grpc.MergingServiceStub, "MergeJob", "mergeJobs"),
    "evaluation": Kind(evaluation_pb2, evaluation_pb2_grpc.EvaluationServiceStub, "EvaluationJob", "evaluationJobs"),
    "pipeline": Kind(pipeline_pb2, pipeline_pb2_grpc.PipelineServiceStub, "PipelineRun", "pipelineRuns"),
}


class Client:
    """A connection to a fabrictune server. Thread-safe. Close it, or use it in a `with`."""

    def __init__(
        self, endpoint: str = "", token: str = "", ca_file: Path | None = None, timeout: float = DEADLINE_SECONDS
    ) -> None:
        self.endpoint = endpoint or find_endpoint()
        self._channel = open_channel(self.endpoint, token, ca_file, timeout)
        self.conversion = Jobs(self, "conversion")
        self.training = Jobs(self, "training")
        self.merging = Jobs(self, "merging")
        self.evaluation = Jobs(self, "evaluation")
        self.pipelines = Jobs(self, "pipeline")
        self.artifacts = Artifacts(self)
        self.inference = Inference(self)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def jobs_of(self, name: str) -> Jobs:
        """The API of the job that `name` names. Raises ApiError when it names none."""
        for api in (self.conversion, self.training, self.merging, self.evaluation, self.pipelines):
            if name.startswith(api.kind.collection + "/"):
                return api
        known = ", ".join(k.collection for k in KINDS.values())
        raise ApiError(f"{name!r} names no job: it must begin with one of {known}", "INVALID_ARGUMENT")

    def call(self, method: Any, request: Any) -> Any:
        """Call a stub's method. Raises ApiError."""
        try:
            return method(request)
        except grpc.RpcError as error:
            raise from_rpc(error, self.endpoint) from None

    def stream(self, method: Any, request: Any, seconds: float | None = None) -> Iterator[Any]:
        """Call a streaming method, at most for so many seconds. Raises ApiError."""
        answers = method(request, timeout=seconds)
        try:
            yield from answers
        except grpc.RpcError as error:
            if seconds is not None and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return
            raise from_rpc(error, self.endpoint) from None
        finally:
            answers.cancel()

    def stub(self, stub: Any) -> Any:
        """A generated stub on this connection."""
        return stub(self._channel)


class Jobs:
    """Jobs of one kind."""

    def __init__(self, client: Client, kind: str) -> None:
        self.kind, self._client = KINDS[kind], client
        self._stub = client.stub(self.kind.stub)
        self._field = "".join(f"_{c.lower()}" if c.isupper() else c for c in self.kind.resource).lstrip("_")

    def create(
        self,
        spec: Mapping[str, Any],
        job_id: str = "",
        output: str = "",
        request_id: str = "",
        validate_only: bool = False,
    ) -> Any:
        """Start a job; with validate_only, return its plan instead. Raises ApiError naming every bad field."""
        resource = getattr(self.kind.messages, self.kind.resource)()
        try:
            json_format.ParseDict(dict(spec), resource.spec)
        except json_format.ParseError as error:
            raise ApiError(f"the spec is wrong: {error}", "INVALID_ARGUMENT") from None
        resource.spec.SetInParent()
        if output:
            resource.output = output
        fields = {
            self._field: resource,
            f"{self._field}_id": job_id,
            "request_id": request_id,
            "validate_only": validate_only,
        }
        return self._call("Create", **fields)

    def get(self, name: str) -> Any:
        """One job."""
        return self._call("Get", name=name)

    def list(self) -> Iterator[Any]:
        """All jobs, page by page."""
        token = ""
        plural = f"{self._field}s"
        while True:
            request = getattr(self.kind.messages, f"List{self.kind.resource}sRequest")(page_token=token)
            page = self._client.call(getattr(self._stub, f"List{self.kind.resource}s"), request)
            yield from getattr(page, plural)
            token = page.next_page_token
            if not token:
                return

    def cancel(self, name: str) -> Any:
        """Ask it to stop."""
        return self._call("Cancel", name=name)

    def delete(self, name: str) -> None:
        """Forget an ended job."""
        self._call("Delete", name=name)

    def resume(self, name: str) -> Any:
        """Begin a failed or cancelled training job again, from its newest checkpoint."""
        return self._call("Resume", name=name)

    def preview(self, spec: Mapping[str, Any], rows: int = 0) -> conversion_pb2.PreviewConversionResponse:
        """The first rows of a conversion's first source before and after; nothing is started."""
        request = conversion_pb2.PreviewConversionRequest(rows=rows)
        try:
            json_format.ParseDict(dict(spec), request.spec)
        except json_format.ParseError as error:
            raise ApiError(f"the spec is wrong: {error}", "INVALID_ARGUMENT") from None
        answer: conversion_pb2.PreviewConversionResponse = self._client.call(self._stub.PreviewConversion, request)
        return answer

    def estimate(
        self, spec: Mapping[str, Any], gpu: str = "", price_per_hour: float = 0.0
    ) -> training_pb2.EstimateTrainingResponse:
        """Memory, time and cost of a training job; nothing is started. gpu: such as "a100-80gb" or "24GiB"."""
        request = training_pb2.EstimateTrainingRequest(gpu=gpu, price_per_hour=price_per_hour)
        try:
            json_format.ParseDict(dict(spec), request.spec)
        except json_format.ParseError as error:
            raise ApiError(f"the spec is wrong: {error}", "INVALID_ARGUMENT") from None
        answer: training_pb2.EstimateTrainingResponse = self._client.call(self._stub.EstimateTraining, request)
        return answer

    def watch(self, name: str, resume_token: str = "", seconds: float | None = None) -> Iterator[job_pb2.WatchEvent]:
        """Events until the job has ended, or for so many seconds."""
        request = getattr(self.kind.messages, f"Watch{self.kind.resource}Request")(name=name, resume_token=resume_token)
        yield from self._client.stream(getattr(self._stub, f"Watch{self.kind.resource}"), request, seconds)

    def wait(self, name: str) -> Any:
        """The job once it has succeeded. Raises ApiError when it fails or is cancelled."""
        for _ in self.watch(name):
            continue
        job = self.get(name)
        if job.execution.state == CANCELLED:
            raise ApiError(f"{name} was cancelled", "CANCELLED")
        if job.execution.state == FAILED:
            raise from_status(job.execution.error)
        return job

    def _call(self, verb: str, **fields: Any) -> Any:
        method = f"{verb}{self.kind.resource}"
        return self._client.call(getattr(self._stub, method), getattr(self.kind.messages, f"{method}Request")(**fields))


class Artifacts:
    """Datasets, models, adapters and reports."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._stub = client.stub(artifact_pb2_grpc.ArtifactServiceStub)

    def get(self, name: str) -> artifact_pb2.Artifact:
        """One artifact."""
        artifact: artifact_pb2.Artifact = self._client.call(
            self._stub.GetArtifact, artifact_pb2.GetArtifactRequest(name=name)
        )
        return artifact

    def list(self, collection: str) -> Iterator[artifact_pb2.Artifact]:
        """All artifacts of a collection, page by page."""
        token = ""
        while True:
            request = artifact_pb2.ListArtifactsRequest(collection=collection, page_token=token)
            page = self._client.call(self._stub.ListArtifacts, request)
            yield from page.artifacts
            token = page.next_page_token
            if not token:
                return

    def delete(self, name: str) -> None:
        """Delete an artifact."""
        self._client.call(self._stub.DeleteArtifact, artifact_pb2.DeleteArtifactRequest(name=name))

    def lineage(self, name: str) -> builtins.list[artifact_pb2.Artifact]:
        """The artifact and all that it was made from, breadth first."""
        return list(self._client.call(self._stub.GetLineage, artifact_pb2.GetLineageRequest(name=name)).artifacts)

    def begin_download(self, name: str) -> artifact_pb2.Download:
        """Signed addresses of an artifact's files."""
        download: artifact_pb2.Download = self._client.call(
            self._stub.CreateDownload, artifact_pb2.CreateDownloadRequest(name=name)
        )
        return download

    def begin_upload(self, request: artifact_pb2.CreateUploadRequest) -> artifact_pb2.Upload:
        """Signed addresses to send files to."""
        upload: artifact_pb2.Upload = self._client.call(self._stub.CreateUpload, request)
        return upload

    def seal(self, upload_id: str) -> artifact_pb2.Artifact:
        """Make an uploaded artifact exist."""
        artifact: artifact_pb2.Artifact = self._client.call(
            self._stub.SealUpload, artifact_pb2.SealUploadRequest(upload_id=upload_id)
        )
        return artifact


class Inference:
    """Deployments and their revisions."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._stub = client.stub(inference_pb2_grpc.InferenceServiceStub)

    def deploy(
        self, deployment_id: str, spec: Mapping[str, Any], validate_only: bool = False
    ) -> inference_pb2.Deployment:
        """Make a deployment with a first revision."""
        wanted = inference_pb2.Deployment()
        try:
            json_format.ParseDict(dict(spec), wanted.spec)
        except json_format.ParseError as error:
            raise ApiError(f"the revision's spec is wrong: {error}", "INVALID_ARGUMENT") from None
        request = inference_pb2.CreateDeploymentRequest(
            deployment=wanted, deployment_id=deployment_id, validate_only=validate_only
        )
        deployment: inference_pb2.Deployment = self._client.call(self._stub.CreateDeployment, request)
        return deployment

    def get(self, name: str) -> inference_pb2.Deployment:
        """One deployment."""
        deployment: inference_pb2.Deployment = self._client.call(
            self._stub.GetDeployment, inference_pb2.GetDeploymentRequest(name=name)
        )
        return deployment

    def list(self) -> builtins.list[inference_pb2.Deployment]:
        """All deployments."""
        return list(self._client.call(self._stub.ListDeployments, inference_pb2.ListDeploymentsRequest()).deployments)

    def delete(self, name: str) -> None:
        """Stop a deployment and forget it."""
        self._client.call(self._stub.DeleteDeployment, inference_pb2.DeleteDeploymentRequest(name=name))

    def update_traffic(
        self, name: str, traffic: Mapping[str, int], canary: Mapping[str, Any] | None = None
    ) -> inference_pb2.Deployment:
        """Move traffic between ready revisions. canary: by steps, with these limits ({} takes the defaults)."""
        request = inference_pb2.UpdateTrafficRequest(name=name, traffic=traffic)
        if canary is not None:
            try:
                json_format.ParseDict(dict(canary), request.canary)
            except json_format.ParseError as error:
                raise ApiError(f"the canary is wrong: {error}", "INVALID_ARGUMENT") from None
            request.canary.SetInParent()
        deployment: inference_pb2.Deployment = self._client.call(self._stub.UpdateTraffic, request)
        return deployment

    def update_adapters(self, revision: str, adapters: Sequence[str]) -> inference_pb2.Revision:
        """Load and unload adapters in a running revision: these are what it serves from then on."""
        wanted = inference_pb2.Revision(name=revision, spec=inference_pb2.RevisionSpec(adapters=adapters))
        request = inference_pb2.UpdateRevisionRequest(revision=wanted)
        found: inference_pb2.Revision = self._client.call(self._stub.UpdateRevision, request)
        return found

    def export_traffic(self, name: str, since: datetime | None = None) -> Iterator[inference_pb2.TrafficFile]:
        """The files of what was recorded of a deployment since a day, page by page."""
        request = inference_pb2.ExportTrafficRequest(name=name)
        if since is not None:
            request.start_time.FromDatetime(since)
        while True:
            page = self._client.call(self._stub.ExportTraffic, request)
            yield from page.files
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    def watch(self, name: str) -> Iterator[inference_pb2.Deployment]:
        """The deployment now, and at every change."""
        request = inference_pb2.WatchDeploymentRequest(name=name)
        for event in self._client.stream(self._stub.WatchDeployment, request):
            yield event.deployment

    def generate(
        self,
        deployment: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str = "",
        constrain_tools: bool | None = None,
        **sampling: Any,
    ) -> Iterator[inference_pb2.GenerateResponse]:
        """Answer a conversation in pieces. sampling: temperature, top_p, max_tokens, stop, seed.

        messages and tools: OpenAI's objects. tool_choice: auto, none, required, or a tool's name.
        """
        request = inference_pb2.GenerateRequest(
            deployment=deployment,
            messages=[_chat_message(m) for m in messages],
            sampling=inference_pb2.Sampling(**sampling),
            tools=[_tool(tool) for tool in tools],
            tool_choice=tool_choice,
        )
        if constrain_tools is not None:
            request.constrain_tools = constrain_tools
        yield from self._client.stream(self._stub.Generate, request)


def _chat_message(told: Mapping[str, Any]) -> inference_pb2.Message:
    calls = [
        inference_pb2.ToolCall(
            id=call["id"], name=call["function"]["name"], arguments=call["function"].get("arguments") or "{}"
        )
        for call in told.get("tool_calls") or ()
    ]
    content, identity = told.get("content") or "", told.get("tool_call_id") or ""
    return inference_pb2.Message(role=told["role"], content=content, tool_calls=calls, tool_call_id=identity)


def _tool(told: Mapping[str, Any]) -> inference_pb2.Tool:
    """Its schema goes as text: a message of JSON would lose the order of the properties, which the prompt keeps."""
    function = told.get("function", told)
    parameters = function.get("parameters")
    return inference_pb2.Tool(
        name=function["name"],
        description=function.get("description") or "",
        parameters=json.dumps(parameters, ensure_ascii=False) if parameters else "",
        strict=function.get("strict"),
    )
