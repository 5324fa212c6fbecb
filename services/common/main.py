"""The main functions of servers: `python -m services.<x>`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from services.common.artifacts import Artifacts
from services.common.auth import Authenticator, load_authenticator
from services.common.clusters.local import LocalCluster
from services.common.config import ServerConfig, load_server, load_store
from services.common.errors import FabrictuneError
from services.common.job_api import Offer
from services.common.jobs import Jobs
from services.common.logs import configure
from services.common.server import Server, Service, wait_for_stop
from services.common.store import Store, open_store


@dataclass(frozen=True)
class House:
    """What every server process has."""

    config: ServerConfig
    authenticator: Authenticator | None
    store: Store
    artifacts: Artifacts
    cluster: LocalCluster


def serve_jobs(offer: Offer) -> None:
    """Serve one kind of job until told to stop; exits non-zero with one clear error when that is impossible."""
    run_until_stopped(lambda: asyncio.run(_serve_jobs(offer)))


def run_until_stopped(serve: Callable[[], None]) -> None:
    """Call it; one of our errors becomes a line and an exit status."""
    try:
        serve()
    except FabrictuneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


async def open_house(stack: AsyncExitStack, kind: str) -> House:
    """Settings, store and a started cluster from the environment. The stack closes them."""
    config = load_server()
    configure(config.log_format, config.log_level)
    store = await asyncio.to_thread(open_store, load_store())
    data_dir = config.data_dir.absolute()
    cluster = LocalCluster(data_dir / kind, config.max_concurrent_jobs)
    await cluster.start()
    stack.push_async_callback(cluster.close)
    return House(config, load_authenticator(config), store, Artifacts(store, data_dir / "cache"), cluster)


async def settle(stack: AsyncExitStack, jobs: Jobs) -> None:
    """Go on with the jobs of an earlier process, and note the end of each from now on."""
    task = asyncio.create_task(jobs.settle_ended())
    stack.callback(task.cancel)
    await jobs.reconcile()


async def serve_until_stopped(stack: AsyncExitStack, house: House, services: Sequence[Service]) -> None:
    """Serve these; returns once told to stop."""
    server = Server(services, house.config, house.authenticator)
    await server.start()
    stack.push_async_callback(server.close)
    await wait_for_stop()


async def _serve_jobs(offer: Offer) -> None:
    async with AsyncExitStack() as stack:
        house = await open_house(stack, offer.stage.kind)
        jobs = Jobs(offer.stage, house.store, house.artifacts, house.cluster)
        await settle(stack, jobs)
        await serve_until_stopped(stack, house, [offer.serve(jobs, house.cluster)])
