"""`python -m services.pipeline`: runs and artifacts. FABRICTUNE_ENDPOINT says where the stages' services are."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import grpc

from services.common.errors import InvalidSpec
from services.common.main import open_house, run_until_stopped, serve_until_stopped, settle
from services.pipeline.host import open_pipeline


async def _serve() -> None:
    async with AsyncExitStack() as stack:
        house = await open_house(stack, "pipeline")
        if not house.config.endpoint:
            raise InvalidSpec("FABRICTUNE_ENDPOINT must say where the other services are, such as fabrictune:8470")
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(house.config.endpoint))
        pipeline = open_pipeline(stack, channel, house.store, house.artifacts)
        await settle(stack, pipeline.jobs)
        await serve_until_stopped(stack, house, pipeline.services)


if __name__ == "__main__":
    run_until_stopped(lambda: asyncio.run(_serve()))
