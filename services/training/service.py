"""The training service: ms-swift turns a base model and a dataset into an adapter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf import empty_pb2, json_format
from pydantic import ValidationError

from fabrictune.v1 import job_pb2, training_pb2, training_pb2_grpc
from services.common.artifacts import Artifacts
from services.common.errors import InvalidSpec, NotFound
from services.common.job_api import JobApi, Offer, spec_dict
from services.common.validation import violations_of
from services.training.dataset_size import SAMPLE_BYTES, measure_dataset
from services.training.estimate import estimate_training, to_plain
from services.training.shapes import HEADER_BYTES, make_shape
from services.training.spec import Spec
from services.training.worker import STAGE


class TrainingService(training_pb2_grpc.TrainingServiceServicer):
    """Serves fabrictune.v1.TrainingService."""

    def __init__(self, api: JobApi[training_pb2.TrainingJob]) -> None:
        self._api = api

    async def CreateTrainingJob(
        self, request: training_pb2.CreateTrainingJobRequest, context: Any
    ) -> training_pb2.TrainingJob:
        """Accept a job."""
        return await self._api.create(request.training_job, request.training_job_id, request)

    async def GetTrainingJob(
        self, request: training_pb2.GetTrainingJobRequest, context: Any
    ) -> training_pb2.TrainingJob:
        """One job."""
        return await self._api.get(request.name)

    async def ListTrainingJobs(
        self, request: training_pb2.ListTrainingJobsRequest, context: Any
    ) -> training_pb2.ListTrainingJobsResponse:
        """A page of jobs."""
        return await self._api.list(request, training_pb2.ListTrainingJobsResponse(), "training_jobs")

    async def CancelTrainingJob(
        self, request: training_pb2.CancelTrainingJobRequest, context: Any
    ) -> training_pb2.TrainingJob:
        """Ask a job to stop."""
        return await self._api.cancel(request.name)

    async def DeleteTrainingJob(self, request: training_pb2.DeleteTrainingJobRequest, context: Any) -> empty_pb2.Empty:
        """Forget an ended job."""
        return await self._api.delete(request.name)

    async def ResumeTrainingJob(
        self, request: training_pb2.ResumeTrainingJobRequest, context: Any
    ) -> training_pb2.TrainingJob:
        """Begin a failed or cancelled job again, from its newest checkpoint."""
        return await self._api.resume(request.name)

    async def WatchTrainingJob(
        self, request: training_pb2.WatchTrainingJobRequest, context: Any
    ) -> AsyncIterator[job_pb2.WatchEvent]:
        """Events of a job."""
        async for event in self._api.watch(request):
            yield event

    async def EstimateTraining(
        self, request: training_pb2.EstimateTrainingRequest, context: Any
    ) -> training_pb2.EstimateTrainingResponse:
        """Memory, time and cost of a job that is not started."""
        return await asyncio.to_thread(estimate_artifacts, request, self._api.artifacts)


def estimate_artifacts(
    request: training_pb2.EstimateTrainingRequest, artifacts: Artifacts
) -> training_pb2.EstimateTrainingResponse:
    """The estimate for artifacts: only heads of their files are read. Raises InvalidSpec, NotFound, InvalidData."""
    try:
        spec = Spec.model_validate(spec_dict(request.spec))
    except ValidationError as error:
        raise InvalidSpec("the training cannot be estimated", violations=violations_of(error, "spec")) from None
    model, dataset = artifacts.get(spec.base_model), artifacts.get(spec.dataset)
    weights = [file.path for file in model.files if file.path.endswith(".safetensors")]
    shape = make_shape(
        artifacts.read_head(model, "config.json", 1 << 20),
        [artifacts.read_head(model, path, HEADER_BYTES) for path in weights],
    )
    train = next((file for file in dataset.files if file.path == "train.jsonl"), None)
    if train is None:
        raise NotFound(f"{dataset.name} has no train.jsonl")
    report = next(
        (artifacts.read_head(dataset, f.path, f.size) for f in dataset.files if f.path == "report.json"), None
    )
    size = measure_dataset(report, artifacts.read_head(dataset, train.path, SAMPLE_BYTES), train.size)
    estimate = estimate_training(spec, shape, size, request.gpu, request.price_per_hour)
    return json_format.ParseDict(to_plain(estimate, size), training_pb2.EstimateTrainingResponse())


OFFER = Offer(STAGE, training_pb2.TrainingJob, TrainingService, training_pb2_grpc.add_TrainingServiceServicer_to_server)
