"""Saves deployments, and again until the store takes them: while it is away, engines are looked after and traffic moves.

The one thing that surprises: what a caller was told may be unsaved for a while. `check` says so to those who must know.
"""

from __future__ import annotations

import asyncio

from services.common.errors import FabrictuneError, Unavailable
from services.common.logs import get_logger
from services.inference.launch import Artifacts
from services.inference.revisions import Deployment

WAIT_SECONDS = 5.0
"""A store that hangs holds nobody up for longer."""
RETRY_SECONDS = 2.0


class Saver:
    """One for all deployments of a rollout. Close it at the end."""

    def __init__(self, artifacts: Artifacts) -> None:
        self._artifacts = artifacts
        self._unsaved: dict[
            str, tuple[Deployment]
        ] = {}  # a tuple for each wish: a later one is not done with an earlier
        self._one_at_a_time = asyncio.Lock()
        self._attempts: set[asyncio.Task[None]] = set()
        self._again: asyncio.Task[None] | None = None
        self._log = get_logger("saver")

    async def save(self, deployment: Deployment) -> None:
        """Return once it is saved, or once that has failed or takes long; then it is saved as soon as that is possible."""
        self._unsaved[deployment.id] = (deployment,)
        attempt = asyncio.create_task(self._attempt(deployment.id), name=f"save {deployment.id}")
        self._attempts.add(attempt)
        attempt.add_done_callback(self._attempts.discard)
        await asyncio.wait({attempt}, timeout=WAIT_SECONDS)

    def check(self, deployment: str) -> None:
        """Raises Unavailable when its last change is not saved yet."""
        if deployment in self._unsaved:
            raise Unavailable(
                f"deployments/{deployment} is changed, but the object store has not taken that yet. It is saved as soon "
                "as the store answers; a restart of the service before that would undo it. Asking again does no harm"
            )

    async def forget(self, deployment: str) -> None:
        """Delete what is saved of it. Raises what the store raises."""
        async with self._one_at_a_time:
            self._unsaved.pop(deployment, None)
            await self._artifacts.forget(deployment)

    async def close(self) -> None:
        """Give up what is not saved yet."""
        tasks = [*self._attempts, *([self._again] if self._again else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _attempt(self, deployment: str) -> None:
        async with self._one_at_a_time:
            wish = self._unsaved.get(deployment)
            if wish is None:  # an earlier attempt has saved this state, too
                return
            try:
                await self._artifacts.save(wish[0])
            except FabrictuneError as error:
                if self._again is None or self._again.done():
                    self._log.warning("not saved; tried again", deployment=deployment, error=error.message)
                    self._again = asyncio.create_task(self._try_again(), name="save again")
                return
            if self._unsaved.get(deployment) is wish:
                del self._unsaved[deployment]

    async def _try_again(self) -> None:
        while self._unsaved:
            await asyncio.sleep(RETRY_SECONDS)
            for deployment in list(self._unsaved):
                await self._attempt(deployment)
        self._log.info("all is saved")
