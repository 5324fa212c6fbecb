"""The main functions of servers: `python -m services.<x>`."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from services.common.artifacts import Artifacts
from services.common.auth import Authenticator, load_authenticator
from services.common.clusters import Cluster
from services.common.config import ServerConfig, StoreConfig, load_server, load_store
from services.common.errors import FabrictuneError, Unavailable
from services.common.job_api import Offer
from services.common.jobs import Jobs
from services.common.logs import configure, get_logger
from services.common.server import Server, Service, wait_for_stop
from services.common.store import Store, open_store
from services.common.upkeep import Upkeep

STORE_PATIENCE_SECONDS = 60.0
"""A store that starts beside the servers, as with `helm install`, is waited for so long: half of what a startup probe gives."""


@dataclass(frozen=True)
class House:
    """What every server process has."""

    config: ServerConfig
    data_dir: Path
    authenticator: Authenticator | None
    store: Store
    artifacts: Artifacts


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


async def open_house() -> House:
    """Settings and store from the environment. Raises InvalidSpec, PermissionDenied, Unavailable."""
    config = load_server()
    configure(config.log_format, config.log_level)
    store = await wait_for_store(load_store())
    data_dir = config.data_dir.absolute()
    return House(config, data_dir, load_authenticator(config), store, Artifacts(store, data_dir / "cache"))


async def wait_for_store(config: StoreConfig) -> Store:
    """The store, once it answers. Raises Unavailable when it does not for a minute; InvalidSpec, PermissionDenied at once."""
    begin = time.monotonic()
    while True:
        try:
            return await asyncio.to_thread(open_store, config)
        except Unavailable as error:
            if time.monotonic() - begin > STORE_PATIENCE_SECONDS:
                raise
            get_logger("server").warning("waits for the object store", error=error.message)
        await asyncio.sleep(1)


async def open_cluster(stack: AsyncExitStack, house: House, kind: str) -> Cluster:
    """The started cluster for one kind of work: Kubernetes, or this machine. The stack closes it."""
    config = house.config
    if config.cluster == "kubernetes":
        from services.common.clusters.kubernetes import KubernetesCluster, Place

        there = KubernetesCluster(Place(config.namespace, config.release, config.templates, config.owner), [kind])
        stack.push_async_callback(there.close)
        await there.start()
        return there
    from services.common.clusters.local import LocalCluster

    here = LocalCluster(house.data_dir / kind, config.max_concurrent_jobs)
    await here.start()
    stack.push_async_callback(here.close)
    return here


async def settle(stack: AsyncExitStack, jobs: Jobs) -> None:
    """Go on with the jobs of an earlier process, and note the end of each from now on, beside serving.

    A server answers at once, however many jobs there are: one that has not been begun again yet is QUEUED.
    """
    upkeep = Upkeep(jobs)
    for work in (upkeep.settle_ended(), upkeep.export_progress(), upkeep.begin_lost()):
        task = asyncio.create_task(work)
        task.add_done_callback(_tell_why_it_broke)
        stack.callback(task.cancel)


def _tell_why_it_broke(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        get_logger("server").error("a task of the server broke", exc_info=error)


async def serve_until_stopped(
    stack: AsyncExitStack, house: House, services: Sequence[Service], drain: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Serve these; returns once told to stop. drain: what else has calls in flight, given the same time to end."""
    server = Server(services, house.config, house.authenticator)
    await server.start()
    stack.push_async_callback(server.close)
    await wait_for_stop()
    if drain is not None:
        await asyncio.gather(server.close(), drain())


async def _serve_jobs(offer: Offer) -> None:
    async with AsyncExitStack() as stack:
        house = await open_house()
        cluster = await open_cluster(stack, house, offer.stage.kind)
        jobs = Jobs(offer.stage, house.store, house.artifacts, cluster)
        await settle(stack, jobs)
        await serve_until_stopped(stack, house, [offer.serve(jobs, cluster)])
