"""The conversion service: rows of several forms become AgentFabric training rows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import PurePosixPath
from typing import Any

from google.protobuf import empty_pb2, json_format
from pydantic import ValidationError

from fabrictune.v1 import conversion_pb2, conversion_pb2_grpc, job_pb2
from services.common.artifacts import Artifacts
from services.common.errors import InvalidSpec, Violation
from services.common.job_api import JobApi, Offer, spec_dict
from services.common.validation import violations_of
from services.conversion.preview import HEAD_BYTES, MOST_ROWS, ROWS, preview_head, to_plain
from services.conversion.sources import choose_files
from services.conversion.spec import Spec
from services.conversion.worker import STAGE

ANSWER_BYTES = 3 << 20
"""Of a preview: gRPC's clients take 4 MB in one message."""


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

    async def PreviewConversion(
        self, request: conversion_pb2.PreviewConversionRequest, context: Any
    ) -> conversion_pb2.PreviewConversionResponse:
        """The first rows before and after."""
        return await asyncio.to_thread(preview_conversion, request, self._api.artifacts)


def preview_conversion(
    request: conversion_pb2.PreviewConversionRequest, artifacts: Artifacts
) -> conversion_pb2.PreviewConversionResponse:
    """The first rows of the first source, an artifact. Raises InvalidSpec, NotFound, InvalidData: it has no rows."""
    if request.rows < 0:
        raise InvalidSpec("there is nothing to preview", violations=[Violation("rows", "must be positive")])
    try:
        spec = Spec.model_validate(spec_dict(request.spec))
    except ValidationError as error:
        raise InvalidSpec("the conversion cannot be previewed", violations=violations_of(error, "spec")) from None
    manifest = artifacts.get(spec.sources[0].uri)
    # The first rows file is the one that a worker would read first.
    names = [PurePosixPath(file.path) for file in manifest.files]
    path = choose_files(manifest.name, names, spec.sources[0].files)[0].as_posix()
    head = artifacts.read_head(manifest, path, HEAD_BYTES)
    whole = any(f.path == path and f.size <= HEAD_BYTES for f in manifest.files)
    answer, size = conversion_pb2.PreviewConversionResponse(), 0
    for shown in preview_head(head, whole, PurePosixPath(path).name, spec, min(request.rows or ROWS, MOST_ROWS)):
        row = json_format.ParseDict(to_plain(shown), conversion_pb2.PreviewedRow())
        if row.ByteSize() > ANSWER_BYTES:
            row.after_left_out += len(row.after)
            row.ClearField("after")
            row.ClearField("before")
        size += row.ByteSize()
        if size > ANSWER_BYTES:
            break
        answer.rows.append(row)
    return answer


OFFER = Offer(
    STAGE, conversion_pb2.ConversionJob, ConversionService, conversion_pb2_grpc.add_ConversionServiceServicer_to_server
)
