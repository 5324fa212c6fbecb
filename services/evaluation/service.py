"""The evaluation service: a served model's tool calls are scored."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from google.protobuf import empty_pb2

from fabrictune.v1 import evaluation_pb2, evaluation_pb2_grpc, job_pb2
from services.common.job_api import JobApi, Offer
from services.evaluation.worker import STAGE


class EvaluationService(evaluation_pb2_grpc.EvaluationServiceServicer):
    """Serves fabrictune.v1.EvaluationService."""

    def __init__(self, api: JobApi[evaluation_pb2.EvaluationJob]) -> None:
        self._api = api

    async def CreateEvaluationJob(
        self, request: evaluation_pb2.CreateEvaluationJobRequest, context: Any
    ) -> evaluation_pb2.EvaluationJob:
        """Accept a job."""
        return await self._api.create(request.evaluation_job, request.evaluation_job_id, request)

    async def GetEvaluationJob(
        self, request: evaluation_pb2.GetEvaluationJobRequest, context: Any
    ) -> evaluation_pb2.EvaluationJob:
        """One job."""
        return await self._api.get(request.name)

    async def ListEvaluationJobs(
        self, request: evaluation_pb2.ListEvaluationJobsRequest, context: Any
    ) -> evaluation_pb2.ListEvaluationJobsResponse:
        """A page of jobs."""
        return await self._api.list(request, evaluation_pb2.ListEvaluationJobsResponse(), "evaluation_jobs")

    async def CancelEvaluationJob(
        self, request: evaluation_pb2.CancelEvaluationJobRequest, context: Any
    ) -> evaluation_pb2.EvaluationJob:
        """Ask a job to stop."""
        return await self._api.cancel(request.name)

    async def DeleteEvaluationJob(
        self, request: evaluation_pb2.DeleteEvaluationJobRequest, context: Any
    ) -> empty_pb2.Empty:
        """Forget an ended job."""
        return await self._api.delete(request.name)

    async def ResumeEvaluationJob(
        self, request: evaluation_pb2.ResumeEvaluationJobRequest, context: Any
    ) -> evaluation_pb2.EvaluationJob:
        """Begin a failed or cancelled job again, with what it has been answered."""
        return await self._api.resume(request.name)

    async def WatchEvaluationJob(
        self, request: evaluation_pb2.WatchEvaluationJobRequest, context: Any
    ) -> AsyncIterator[job_pb2.WatchEvent]:
        """Events of a job."""
        async for event in self._api.watch(request):
            yield event


OFFER = Offer(
    STAGE, evaluation_pb2.EvaluationJob, EvaluationService, evaluation_pb2_grpc.add_EvaluationServiceServicer_to_server
)
