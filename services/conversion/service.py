"""The conversion service: ms_agent rows become AgentFabric training rows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from google.protobuf import empty_pb2

from fabrictune.v1 import conversion_pb2, conversion_pb2_grpc, job_pb2
from services.common.job_api import JobApi, Offer
from services.conversion.worker import STAGE


class ConversionService(conversion_pb2_grpc.ConversionServiceServicer):
    """Serves fabrictune.v1.ConversionService."""

    def __init__(self, api: JobApi[conversion_pb2.ConversionJob]) -> None:
        self._api = api

    async def CreateConversionJob(
        self, request: conversion_pb2.CreateConversionJobRequest, context: Any
    ) -> conversion_pb2.ConversionJob:
        """Accept a job."""
        return await self._api.create(request.conversion_job, request.conversion_job_id, request)

    async def GetConversionJob(
        self, request: conversion_pb2.GetConversionJobRequest, context: Any
    ) -> conversion_pb2.ConversionJob:
        """One job."""
        return await self._api.get(request.name)

    async def ListConversionJobs(
        self, request: conversion_pb2.ListConversionJobsRequest, context: Any
    ) -> conversion_pb2.ListConversionJobsResponse:
        """A page of jobs."""
        return await self._api.list(request, conversion_pb2.ListConversionJobsResponse(), "conversion_jobs")

    async def CancelConversionJob(
        self, request: conversion_pb2.CancelConversionJobRequest, context: Any
    ) -> conversion_pb2.ConversionJob:
        """Ask a job to stop."""
        return await self._api.cancel(request.name)

    async def DeleteConversionJob(
        self, request: conversion_pb2.DeleteConversionJobRequest, context: Any
    ) -> empty_pb2.Empty:
        """Forget an ended job."""
        return await self._api.delete(request.name)

    async def WatchConversionJob(
        self, request: conversion_pb2.WatchConversionJobRequest, context: Any
    ) -> AsyncIterator[job_pb2.WatchEvent]:
        """Events of a job."""
        async for event in self._api.watch(request):
            yield event


OFFER = Offer(
    STAGE, conversion_pb2.ConversionJob, ConversionService, conversion_pb2_grpc.add_ConversionServiceServicer_to_server
)
