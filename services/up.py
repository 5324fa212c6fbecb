"""Every service in one process, with a local cluster and an embedded object store: what `fabrictune up` runs.

The same servicers and the same API as one per pod. Jobs and engines are child processes; they and the object store
outlive a killed `up`, and the next one goes on with them. A `up` that is told to stop ends them all.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import ssl
import sys
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from fabrictune.v1 import (
    artifact_pb2_grpc,
    conversion_pb2,
    conversion_pb2_grpc,
    evaluation_pb2,
    evaluation_pb2_grpc,
    inference_pb2_grpc,
    merging_pb2,
    merging_pb2_grpc,
    pipeline_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)
from services.common.artifacts import Artifacts
from services.common.auth import Authenticator, load_authenticator
from services.common.clusters.local import LocalCluster, leftovers
from services.common.clusters.processes import start_ticks
from services.common.config import ServerConfig, StoreConfig, load_server, load_store
from services.common.errors import FabrictuneError, FailedPrecondition
from services.common.job_api import JobApi
from services.common.jobs import Jobs
from services.common.logs import configure
from services.common.server import Server, service, wait_for_stop
from services.common.store import Store, open_store
from services.common.weed import EmbeddedStore
from services.conversion.service import ConversionService
from services.conversion.worker import STAGE as CONVERSION
from services.evaluation.service import EvaluationService
from services.evaluation.worker import STAGE as EVALUATION
from services.inference.engine import detect_hardware
from services.inference.gateway import Gateway
from services.inference.rollout import Rollout
from services.inference.routes import RouteTable
from services.inference.service import InferenceService, stored_artifacts, stored_deployments
from services.merging.service import MergingService
from services.merging.worker import STAGE as MERGING
from services.pipeline.artifacts import ArtifactService
from services.pipeline.reconcile import Reconciler
from services.pipeline.runs import STAGE as PIPELINE
from services.pipeline.runs import RunCluster
from services.pipeline.service import PipelineService
from services.training.service import TrainingService
from services.training.worker import STAGE as TRAINING

# (stage, its resource, its servicer, how it is added)
STAGES: tuple[tuple[Any, Any, Any, Any], ...] = (
    (
        CONVERSION,
        conversion_pb2.ConversionJob,
        ConversionService,
        conversion_pb2_grpc.add_ConversionServiceServicer_to_server,
    ),
    (TRAINING, training_pb2.TrainingJob, TrainingService, training_pb2_grpc.add_TrainingServiceServicer_to_server),
    (MERGING, merging_pb2.MergeJob, MergingService, merging_pb2_grpc.add_MergingServiceServicer_to_server),
    (
        EVALUATION,
        evaluation_pb2.EvaluationJob,
        EvaluationService,
        evaluation_pb2_grpc.add_EvaluationServiceServicer_to_server,
    ),
)


def serve(announce: bool) -> None:
    """Run until told to stop. Raises errors of services.common.errors when it cannot start."""
    config = load_server()
    configure(config.log_format, config.log_level)
    data_dir = config.data_dir.absolute()
    data_dir.mkdir(parents=True, exist_ok=True)
    embedded = None
    named = load_store()
    if not named.endpoint:
        embedded = EmbeddedStore(data_dir / "store")
        named = embedded.start()
    _hand_on(named, data_dir)
    try:
        asyncio.run(_serve(config, open_store(named), data_dir, announce))
    finally:
        if embedded is not None:
            embedded.stop()
        (data_dir / "up.json").unlink(missing_ok=True)


def end_leftovers(data_dir: Path) -> int:
    """End the workers, engines and object store that a killed `up` has left; returns how many."""
    ended = leftovers(data_dir.absolute() / "cluster")
    return ended + EmbeddedStore(data_dir / "store").stop()


@dataclass
class _Inside:
    """A socket that only this user can reach: services of this process talk to each other there, asking no token."""

    folder: Path

    @property
    def address(self) -> str:
        """For grpc."""
        return f"unix:{self.folder}/inside.sock"


async def _serve(config: ServerConfig, store: Store, data_dir: Path, announce: bool) -> None:
    authenticator = load_authenticator(config)
    async with AsyncExitStack() as stack:
        cluster = LocalCluster(data_dir / "cluster", config.max_concurrent_jobs)
        await cluster.start()
        stack.push_async_callback(cluster.close)
        artifacts = Artifacts(store, data_dir / "cache")
        inside = _Inside(Path(tempfile.mkdtemp(prefix="fabrictune-")))
        stack.callback(shutil.rmtree, inside.folder, ignore_errors=True)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(inside.address))
        kinds = [(Jobs(stage, store, artifacts, cluster), *rest) for stage, *rest in STAGES]

        routes = RouteTable()
        gateway_url: list[str] = []
        rollout = Rollout(
            cluster, routes, stored_artifacts(store, artifacts, data_dir / "cluster" / "logs"), detect_hardware()
        )
        stack.push_async_callback(rollout.close)
        gateway = Gateway(routes, _authorize(authenticator))
        gateway_port = await gateway.start(config.host, config.gateway_port, _tls(config))
        stack.push_async_callback(gateway.close)
        gateway_url.append(f"{'https' if config.tls_certificate else 'http'}://{config.host}:{gateway_port}")
        os.environ["FABRICTUNE_GATEWAY_URL"] = config.gateway_url or gateway_url[0]
        cluster.set_environment("FABRICTUNE_GATEWAY_URL", os.environ["FABRICTUNE_GATEWAY_URL"])

        reconciler = Reconciler(channel, store, artifacts)
        runs = RunCluster(reconciler, store)
        stack.push_async_callback(runs.close)
        run_jobs = Jobs(PIPELINE, store, artifacts, runs)
        inference = InferenceService(rollout, routes, artifacts, lambda: f"{gateway_url[0]}/v1")
        pipeline = PipelineService(run_jobs, reconciler, store)
        services = [
            service(servicer(JobApi(jobs, cluster, resource)), add) for jobs, resource, servicer, add in kinds
        ] + [
            service(inference, inference_pb2_grpc.add_InferenceServiceServicer_to_server),
            service(pipeline, pipeline_pb2_grpc.add_PipelineServiceServicer_to_server),
            service(ArtifactService(store, artifacts), artifact_pb2_grpc.add_ArtifactServiceServicer_to_server),
        ]
        server = Server(services, config, authenticator, inside.address)
        await server.start()
        stack.push_async_callback(server.close)
        for jobs in [k[0] for k in kinds] + [run_jobs]:
            task = asyncio.create_task(jobs.settle_ended())
            stack.callback(task.cancel)
            await jobs.reconcile()
        await rollout.restore(await asyncio.to_thread(stored_deployments, store))
        said = _write_up_file(config, data_dir, server, gateway_url[0], store.endpoint)
        if announce:
            print(
                f"fabrictune is up\n  gRPC      {said['endpoint']}\n  OpenAI    {gateway_url[0]}/v1\n"
                f"  metrics   http://{config.host}:{server.metrics_port}/metrics\n  S3        {store.endpoint}\n"
                f"  data      {data_dir}\nCtrl-C ends it.",
                flush=True,
            )
        await wait_for_stop()
        (data_dir / "up.json").unlink(missing_ok=True)


def _write_up_file(config: ServerConfig, data_dir: Path, server: Server, gateway: str, s3: str) -> dict[str, Any]:
    said = {
        "pid": os.getpid(),
        "started": start_ticks(os.getpid()),
        "endpoint": f"{config.host}:{server.port}",
        "gateway": gateway,
        "metrics": f"http://{config.host}:{server.metrics_port}/metrics",
        "s3": s3,
    }
    draft = data_dir / "up.tmp"
    draft.write_text(json.dumps(said, indent=1))
    draft.replace(data_dir / "up.json")
    return said


def _hand_on(store: StoreConfig, data_dir: Path) -> None:
    """Workers read the same settings as we do: from the environment, where only this user can see them."""
    os.environ |= {
        "FABRICTUNE_S3_ENDPOINT": store.endpoint,
        "FABRICTUNE_S3_BUCKET": store.bucket,
        "FABRICTUNE_S3_REGION": store.region,
        "FABRICTUNE_S3_ACCESS_KEY": store.access_key,
        "FABRICTUNE_S3_SECRET_KEY": store.secret_key.get_secret_value(),
        "FABRICTUNE_DATA_DIR": str(data_dir),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    }


def _authorize(authenticator: Authenticator | None) -> Any:
    if authenticator is None:
        return None

    async def ask(token: str) -> None:
        await asyncio.to_thread(authenticator.allow, token, "/v1/chat/completions")

    return ask


def _tls(config: ServerConfig) -> ssl.SSLContext | None:
    if not (config.tls_certificate and config.tls_key):
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.tls_certificate, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise FailedPrecondition(f"the TLS files cannot be used: {error}") from None
    return context


def main() -> None:
    """`python -m services.up`."""
    try:
        serve(announce=True)
    except FabrictuneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
