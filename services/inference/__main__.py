"""`python -m services.inference`: the inference service and its gateway. Settings: services/common/config.py."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from services.common.main import open_cluster, open_house, run_until_stopped, serve_until_stopped
from services.inference.host import open_inference


async def _serve() -> None:
    async with AsyncExitStack() as stack:
        house = await open_house()
        cluster = await open_cluster(stack, house, "engine")
        inference = await open_inference(
            stack, house.config, house.store, house.artifacts, cluster, house.authenticator
        )
        await inference.restore()
        await serve_until_stopped(stack, house, [inference.service], inference.drain)


if __name__ == "__main__":
    run_until_stopped(lambda: asyncio.run(_serve()))
