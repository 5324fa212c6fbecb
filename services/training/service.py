"""The training service: ms-swift turns a base model and a dataset into an adapter."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from google.protobuf import empty_pb2

from fabrictune.v1 import job_pb2, training_pb2, training_pb2_grpc
from services.common.job_api import JobApi, Offer
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


OFFER = Offer(STAGE, training_pb2.TrainingJob, TrainingService, training_pb2_grpc.add_TrainingServiceServicer_to_server)
