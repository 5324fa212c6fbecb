"""What is about to end: in tasks of their own, so that a caller that goes away leaves nothing half ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from services.common.errors import FailedPrecondition
from services.common.logs import get_logger

PATIENCE_SECONDS = 30.0
"""What is about to stop may take so long until it is started again; clients wait for 60 s."""


class Endings:
    """By the names of what ends."""

    def __init__(self, longest: float) -> None:
        """longest: seconds that answers in flight are given."""
        self._longest = longest
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._log = get_logger("rollout")

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """Those that have not ended."""
        return list(self._tasks.values())

    def __contains__(self, name: str) -> bool:
        return name in self._tasks

    async def end(self, name: str, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do it, or wait for the task that does."""
        self.begin(name, act)
        await self.wait(name)

    def begin(self, name: str, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Let a task do it, unless one does already."""
        if name not in self._tasks:
            task = self._tasks[name] = asyncio.create_task(act(), name=f"end {name}")
            task.add_done_callback(lambda done: self._ended(name, done))

    async def wait(self, name: str) -> None:
        """Until it has ended."""
        await asyncio.shield(self._tasks[name])

    async def outlast(self, name: str, ending: Awaitable[None]) -> None:
        """Wait for an end, but no longer than a client waits for its answer. Raises FailedPrecondition."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await ending
        except TimeoutError:
            raise FailedPrecondition(
                f"{name} is about to stop and still answers what it has begun; ask again when it has stopped, in "
                f"{self._longest:.0f} s at most"
            ) from None

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        del self._tasks[name]
        if not task.cancelled() and (error := task.exception()):
            self._log.warning("not ended; asking again goes on", name=name, error=str(error))
