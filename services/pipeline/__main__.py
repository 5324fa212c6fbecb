"""`python -m services.pipeline`: runs, artifacts and the front door. FABRICTUNE_ENDPOINTS says where the others are."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from services.common.main import open_house, run_until_stopped, serve_until_stopped, settle
from services.pipeline.channels import SERVICES, open_channels
from services.pipeline.front import FrontDoor
from services.pipeline.host import open_pipeline


async def _serve() -> None:
    async with AsyncExitStack() as stack:
        house = await open_house()
        config = house.config
        ours = open_channels(config.endpoints, config.ca_file, config.token.get_secret_value())
        callers = open_channels(config.endpoints, config.ca_file, token="")
        for channel in [*ours.values(), *callers.values()]:
            stack.push_async_callback(channel.close)
        pipeline = open_pipeline(stack, ours, house.store, house.artifacts)
        await settle(stack, pipeline.jobs)
        door = FrontDoor({SERVICES[kind]: channel for kind, channel in callers.items()})
        await serve_until_stopped(stack, house, [*pipeline.services, *door.services])


if __name__ == "__main__":
    run_until_stopped(lambda: asyncio.run(_serve()))
