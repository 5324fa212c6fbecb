"""The inference service's parts put together: rollout, gateway, servicer. `up` and `python -m services.inference` use it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from fabrictune.v1 import inference_pb2_grpc
from services.common.artifacts import Artifacts
from services.common.auth import Authenticator
from services.common.clusters import Cluster
from services.common.config import ServerConfig, load_record
from services.common.server import Service, service
from services.common.store import Store
from services.common.tls import http_context
from services.inference.engine import detect_hardware, read_hardware
from services.inference.gateway import Gateway
from services.inference.launch import Limits
from services.inference.recorder import open_recorder
from services.inference.rollout import Rollout
from services.inference.routes import RouteTable
from services.inference.service import InferenceService, Traffic
from services.inference.stored import stored_artifacts, stored_deployments


@dataclass(frozen=True)
class Inference:
    """The running service."""

    service: Service
    url: str
    """The gateway's address, without /v1."""
    rollout: Rollout
    store: Store
    gateway: Gateway

    async def drain(self) -> None:
        """Let the answers in flight end. The next process may drive the deployments already, so we do no more."""
        await self.rollout.stop_driving()
        await self.gateway.close()

    async def restore(self) -> None:
        """Go on with the deployments of an earlier process."""
        await self.rollout.restore(await asyncio.to_thread(stored_deployments, self.store))


async def open_inference(
    stack: AsyncExitStack,
    config: ServerConfig,
    store: Store,
    artifacts: Artifacts,
    cluster: Cluster,
    authenticator: Authenticator | None,
) -> Inference:
    """Start the gateway and all behind it; the stack closes them. Raises FailedPrecondition, Unavailable."""
    routes = RouteTable()
    remote = config.cluster == "kubernetes"
    hardware = read_hardware(config.engine_hardware) if remote else detect_hardware()
    limits = Limits(start=config.engine_start_seconds, shutdown=max(config.engine_grace_seconds - 5, 1))
    rollout = Rollout(cluster, routes, stored_artifacts(store, artifacts, remote), hardware, limits)
    stack.push_async_callback(rollout.close)
    record = load_record()
    recorder = open_recorder(stack, record, store)
    gateway = Gateway(routes, _authorize(authenticator), recorder=recorder, drain_seconds=config.drain_seconds)
    port = await gateway.start(config.host, config.gateway_port, _tls(config))
    stack.push_async_callback(gateway.close)
    # In a cluster the gateway listens everywhere, and is reached under its Service's name.
    url = config.gateway_url or f"{'https' if config.tls_certificate else 'http'}://{config.host}:{port}"
    traffic = Traffic(None if record.record_folder else store, recorder)
    servicer = InferenceService(rollout, routes, artifacts, f"{url}/v1", traffic)
    offered = service(servicer, inference_pb2_grpc.add_InferenceServiceServicer_to_server)
    return Inference(offered, url, rollout, store, gateway)


def _authorize(authenticator: Authenticator | None) -> Callable[[str, str], Awaitable[None]] | None:
    if authenticator is None:
        return None

    async def ask(token: str, path: str) -> None:
        await asyncio.to_thread(authenticator.allow, token, path)

    return ask


def _tls(config: ServerConfig) -> ssl.SSLContext | None:
    if not (config.tls_certificate and config.tls_key):
        return None
    return http_context(config.tls_certificate, config.tls_key)
