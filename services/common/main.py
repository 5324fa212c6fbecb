"""The main function of a server that offers jobs of one kind: `python -m services.<x>`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

from services.common.artifacts import Artifacts
from services.common.auth import load_authenticator
from services.common.clusters.local import LocalCluster
from services.common.config import load_server, load_store
from services.common.errors import FabrictuneError
from services.common.job_api import JobApi
from services.common.jobs import Jobs
from services.common.logs import configure
from services.common.server import Server, service, wait_for_stop
from services.common.stage import Stage
from services.common.store import open_store


def serve_jobs(
    stage: Stage[Any], resource: type[Any], servicer: Callable[[JobApi[Any]], Any], add: Callable[..., None]
) -> None:
    """Serve one kind of job until told to stop; exits non-zero with one clear error when that is impossible."""
    try:
        asyncio.run(_serve(stage, resource, servicer, add))
    except FabrictuneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


async def _serve(
    stage: Stage[Any], resource: type[Any], servicer: Callable[[JobApi[Any]], Any], add: Callable[..., None]
) -> None:
    config = load_server()
    configure(config.log_format, config.log_level)
    store = await asyncio.to_thread(open_store, load_store())
    cluster = LocalCluster(config.data_dir.absolute() / stage.kind, config.max_concurrent_jobs)
    jobs = Jobs(stage, store, Artifacts(store, config.data_dir.absolute() / "cache"), cluster)
    await cluster.start()
    offered = service(servicer(JobApi(jobs, cluster, resource)), add)
    server = Server([offered], config, load_authenticator(config))
    settling = asyncio.create_task(jobs.settle_ended())
    try:
        await jobs.reconcile()
        await server.start()
        await wait_for_stop()
        await server.close()
    finally:
        settling.cancel()
        await cluster.close()
