"""A gRPC server for any set of services: health, reflection, the interceptor, TLS, metrics, graceful drain.

`fabrictune up` puts every service into one Server; in the cluster each service's `__main__` makes a Server of one.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from services.common import metrics
from services.common.auth import Authenticator, check_exposure
from services.common.config import ServerConfig
from services.common.errors import Unavailable
from services.common.interceptors import CallInterceptor
from services.common.logs import get_logger
from services.common.tls import grpc_credentials

OPTIONS = (
    ("grpc.max_receive_message_length", 16 * 2**20),
    ("grpc.so_reuseport", 0),  # a second server on our port must fail, not take half of the calls
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
)


@dataclass(frozen=True)
class Service:
    """A servicer and how to put it into a server."""

    name: str
    """Full name, such as "fabrictune.v1.TrainingService"."""
    servicer: Any
    add: Callable[[Any, grpc.aio.Server], None]
    """The generated add_…Servicer_to_server."""


def service(servicer: Any, add: Callable[[Any, grpc.aio.Server], None]) -> Service:
    """A Service, named after its generated add_…Servicer_to_server."""
    return Service(
        f"fabrictune.v1.{add.__name__.removeprefix('add_').removesuffix('Servicer_to_server')}", servicer, add
    )


class Server:
    """A running gRPC server. Await `start`, then `wait` or `close`."""

    def __init__(
        self, services: Sequence[Service], config: ServerConfig, authenticator: Authenticator | None, inside: str = ""
    ) -> None:
        """inside: one more address, a Unix socket in a folder of this user, where no token is asked."""
        check_exposure(config)
        self._config = config
        self._services, self._inside = services, inside
        self._log = get_logger("server")
        self._server = grpc.aio.server(interceptors=[CallInterceptor(authenticator)], options=OPTIONS)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for service in services:
            service.add(service.servicer, self._server)
        names = [s.name for s in services]
        reflection.enable_server_reflection(
            [*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME], self._server
        )
        self._serving = False
        self.port = 0
        self.metrics_port = 0

    async def start(self) -> None:
        """Bind and serve. Raises Unavailable when the address is taken."""
        config, address = self._config, f"{self._config.host}:{self._config.port}"
        try:
            if config.tls_certificate and config.tls_key:
                credentials = grpc_credentials(config.tls_certificate, config.tls_key)
                self.port = self._server.add_secure_port(address, credentials)
            else:
                self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            raise Unavailable(
                f"cannot listen on {address}: is another server running there? "
                "Stop it, or choose FABRICTUNE_PORT (0 takes a free one)"
            ) from None
        if self._inside:
            self._server.add_insecure_port(self._inside)
        await self._server.start()
        try:
            self.metrics_port = metrics.serve(config.host, config.metrics_port, self._answers())
        except OSError as error:
            await self._server.stop(0)
            raise Unavailable(
                f"cannot serve metrics on port {config.metrics_port}: {error.strerror}; choose FABRICTUNE_METRICS_PORT"
            ) from None
        for name in ["", *(s.name for s in self._services)]:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._serving = True
        self._log.info("serving", address=f"{config.host}:{self.port}", services=[s.name for s in self._services])

    async def close(self) -> None:
        """Say NOT_SERVING, let calls in flight end, stop."""
        self._serving = False
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._config.drain_seconds)

    def _answers(self) -> Callable[[], bool]:
        """For other threads: whether it serves. Raises TimeoutError when the event loop is stuck."""
        loop = asyncio.get_running_loop()

        async def ask() -> bool:
            return self._serving

        return lambda: asyncio.run_coroutine_threadsafe(ask(), loop).result(5)


async def wait_for_stop() -> signal.Signals:
    """Return when the process is told to end (SIGTERM or Ctrl-C)."""
    told: asyncio.Future[signal.Signals] = asyncio.get_running_loop().create_future()

    def tell(number: signal.Signals) -> None:
        if not told.done():
            told.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, tell, number)
    return await told
