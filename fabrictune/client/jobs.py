"""Jobs: conversions, trainings, merges, evaluations and pipeline runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fabrictune.channel import from_status
from fabrictune.client.calls import Calls, fill
from fabrictune.errors import ApiError
from fabrictune.names import CANCELLED, FAILED
from fabrictune.v1 import (
    conversion_pb2,
    conversion_pb2_grpc,
    evaluation_pb2,
    evaluation_pb2_grpc,
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


class Jobs:
    """Jobs of one kind."""

    def __init__(self, calls: Calls, kind: str) -> None:
        self.kind, self._calls = KINDS[kind], calls
        self._stub = calls.stub(self.kind.stub)
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
        fill(resource.spec, spec, "the spec")
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
            page = self._calls.call(getattr(self._stub, f"List{self.kind.resource}s"), request)
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
        """Begin a failed or cancelled training or evaluation again, with what it has kept. Raises ApiError for other kinds."""
        if not hasattr(self._stub, f"Resume{self.kind.resource}"):
            raise ApiError(
                f"{name} cannot be resumed; only trainings and evaluations keep what they have done. Start it again",
                "INVALID_ARGUMENT",
            )
        return self._call("Resume", name=name)

    def preview(self, spec: Mapping[str, Any], rows: int = 0) -> conversion_pb2.PreviewConversionResponse:
        """The first rows of a conversion's first source before and after; nothing is started."""
        request = conversion_pb2.PreviewConversionRequest(rows=rows)
        fill(request.spec, spec, "the spec")
        answer: conversion_pb2.PreviewConversionResponse = self._calls.call(self._stub.PreviewConversion, request)
        return answer

    def estimate(
        self, spec: Mapping[str, Any], gpu: str = "", price_per_hour: float = 0.0
    ) -> training_pb2.EstimateTrainingResponse:
        """Memory, time and cost of a training job; nothing is started. gpu: such as "a100-80gb" or "24GiB"."""
        request = training_pb2.EstimateTrainingRequest(gpu=gpu, price_per_hour=price_per_hour)
        fill(request.spec, spec, "the spec")
        answer: training_pb2.EstimateTrainingResponse = self._calls.call(self._stub.EstimateTraining, request)
        return answer

    def watch(self, name: str, resume_token: str = "", seconds: float | None = None) -> Iterator[job_pb2.WatchEvent]:
        """Events until the job has ended, or for so many seconds."""
        request = getattr(self.kind.messages, f"Watch{self.kind.resource}Request")(name=name, resume_token=resume_token)
        yield from self._calls.stream(getattr(self._stub, f"Watch{self.kind.resource}"), request, seconds)

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
        return self._calls.call(getattr(self._stub, method), getattr(self.kind.messages, f"{method}Request")(**fields))
