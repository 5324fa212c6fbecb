"""The merging service: a base model and an adapter become one model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from google.protobuf import empty_pb2

from fabrictune.v1 import job_pb2, merging_pb2, merging_pb2_grpc
from services.common.job_api import JobApi, Offer
from services.merging.worker import STAGE


class MergingService(merging_pb2_grpc.MergingServiceServicer):
    """Serves fabrictune.v1.MergingService."""

    def __init__(self, api: JobApi[merging_pb2.MergeJob]) -> None:
        self._api = api

    async def CreateMergeJob(self, request: merging_pb2.CreateMergeJobRequest, context: Any) -> merging_pb2.MergeJob:
        """Accept a job."""
        return await self._api.create(request.merge_job, request.merge_job_id, request)

    async def GetMergeJob(self, request: merging_pb2.GetMergeJobRequest, context: Any) -> merging_pb2.MergeJob:
        """One job."""
        return await self._api.get(request.name)

    async def ListMergeJobs(
        self, request: merging_pb2.ListMergeJobsRequest, context: Any
    ) -> merging_pb2.ListMergeJobsResponse:
        """A page of jobs."""
        return await self._api.list(request, merging_pb2.ListMergeJobsResponse(), "merge_jobs")

    async def CancelMergeJob(self, request: merging_pb2.CancelMergeJobRequest, context: Any) -> merging_pb2.MergeJob:
        """Ask a job to stop."""
        return await self._api.cancel(request.name)

    async def DeleteMergeJob(self, request: merging_pb2.DeleteMergeJobRequest, context: Any) -> empty_pb2.Empty:
        """Forget an ended job."""
        return await self._api.delete(request.name)

    async def WatchMergeJob(
        self, request: merging_pb2.WatchMergeJobRequest, context: Any
    ) -> AsyncIterator[job_pb2.WatchEvent]:
        """Events of a job."""
        async for event in self._api.watch(request):
            yield event


OFFER = Offer(STAGE, merging_pb2.MergeJob, MergingService, merging_pb2_grpc.add_MergingServiceServicer_to_server)
