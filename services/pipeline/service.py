"""The pipeline service: runs from rows to a deployment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from google.protobuf import empty_pb2, json_format
from pydantic import ValidationError

from fabrictune.v1 import job_pb2, pipeline_pb2, pipeline_pb2_grpc
from services.common.errors import InvalidSpec
from services.common.job_api import event_message, spec_dict
from services.common.job_state import JobView, execution_of
from services.common.jobs import Jobs
from services.common.store import Store
from services.common.validation import violations_of
from services.common.watching import watch_job
from services.pipeline.progress import read_stages
from services.pipeline.reconcile import Reconciler
from services.pipeline.runs import stage_names
from services.pipeline.spec import Spec


class PipelineService(pipeline_pb2_grpc.PipelineServiceServicer):
    """Serves fabrictune.v1.PipelineService."""

    def __init__(self, jobs: Jobs, reconciler: Reconciler, store: Store) -> None:
        self._jobs, self._reconciler, self._store = jobs, reconciler, store

    async def CreatePipelineRun(
        self, request: pipeline_pb2.CreatePipelineRunRequest, context: Any
    ) -> pipeline_pb2.PipelineRun:
        """Accept a run once every stage's service would accept its part."""
        if not request.pipeline_run.HasField("spec"):
            raise InvalidSpec("the request carries no spec")
        plain = spec_dict(request.pipeline_run.spec)
        spec = _parse(plain)
        await self._reconciler.check(spec)
        view, workload = await self._jobs.create(
            plain,
            job_id=request.pipeline_run_id,
            request_id=request.request_id,
            labels=dict(request.pipeline_run.labels),
            validate_only=request.validate_only,
        )
        message = await self._message(view)
        if request.validate_only:
            message.ClearField("execution")
            message.plan.digest = workload.digest
            message.stages.extend(pipeline_pb2.StageStatus(stage=name) for name in stage_names(spec))
        return message

    async def GetPipelineRun(
        self, request: pipeline_pb2.GetPipelineRunRequest, context: Any
    ) -> pipeline_pb2.PipelineRun:
        """One run with its stages."""
        return await self._message(await self._jobs.get(request.name))

    async def ListPipelineRuns(
        self, request: pipeline_pb2.ListPipelineRunsRequest, context: Any
    ) -> pipeline_pb2.ListPipelineRunsResponse:
        """A page of runs."""
        views, token = await self._jobs.list(request.page_size, request.page_token)
        runs = [await self._message(view) for view in views]
        return pipeline_pb2.ListPipelineRunsResponse(pipeline_runs=runs, next_page_token=token)

    async def CancelPipelineRun(
        self, request: pipeline_pb2.CancelPipelineRunRequest, context: Any
    ) -> pipeline_pb2.PipelineRun:
        """Stop a run and the job that it waits for."""
        return await self._message(await self._jobs.cancel(request.name))

    async def DeletePipelineRun(self, request: pipeline_pb2.DeletePipelineRunRequest, context: Any) -> empty_pb2.Empty:
        """Forget an ended run. Its jobs and artifacts stay."""
        await self._jobs.delete(request.name)
        return empty_pb2.Empty()

    async def WatchPipelineRun(
        self, request: pipeline_pb2.WatchPipelineRunRequest, context: Any
    ) -> AsyncIterator[job_pb2.WatchEvent]:
        """Events of a run; those of its jobs are watched at their own services."""
        async for event in watch_job(self._jobs, request.name, request.resume_token):
            yield event_message(event)

    async def _message(self, view: JobView) -> pipeline_pb2.PipelineRun:
        record = view.record
        message = pipeline_pb2.PipelineRun(name=record.name, labels=dict(record.labels))
        json_format.ParseDict(dict(record.spec), message.spec)
        message.execution.CopyFrom(execution_of(view))
        for stage in await asyncio.to_thread(read_stages, record.name, self._store):
            json_format.ParseDict(stage, message.stages.add())
        return message


def _parse(plain: Mapping[str, Any]) -> Spec:
    try:
        return Spec.model_validate(plain)
    except ValidationError as error:
        raise InvalidSpec("the run cannot be accepted", violations=violations_of(error, "spec")) from None
