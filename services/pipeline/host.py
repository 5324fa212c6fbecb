"""The pipeline service's parts put together. `up` and `python -m services.pipeline` use it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass

import grpc

from fabrictune.v1 import artifact_pb2_grpc, pipeline_pb2_grpc
from services.common.artifacts import Artifacts
from services.common.jobs import Jobs
from services.common.server import Service, service
from services.common.store import Store
from services.pipeline.artifacts import ArtifactService
from services.pipeline.reconcile import Reconciler
from services.pipeline.runs import STAGE, RunCluster
from services.pipeline.service import PipelineService


@dataclass(frozen=True)
class Pipeline:
    """Runs, and the artifact service beside them."""

    services: tuple[Service, ...]
    jobs: Jobs


def open_pipeline(
    stack: AsyncExitStack, channels: Mapping[str, grpc.aio.Channel], store: Store, artifacts: Artifacts
) -> Pipeline:
    """channels: by kind, where the stages' services are. The stack ends the driving of runs."""
    reconciler = Reconciler(channels, store, artifacts)
    runs = RunCluster(reconciler, store)
    stack.push_async_callback(runs.close)
    jobs = Jobs(STAGE, store, artifacts, runs)
    offered = (
        service(PipelineService(jobs, reconciler, store), pipeline_pb2_grpc.add_PipelineServiceServicer_to_server),
        service(ArtifactService(store, artifacts), artifact_pb2_grpc.add_ArtifactServiceServicer_to_server),
    )
    return Pipeline(offered, jobs)
