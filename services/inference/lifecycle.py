"""What runs for each revision: a task that drives it (see `drive`), a clock while it is kept warm, and in the end its drain.

A revision that has lost its traffic stays warm for a while, so that going back to it needs no loading. Nothing here moves
traffic; `rollout` does, and says when a revision has lost its own or has some again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from services.common.logs import get_logger
from services.inference.drive import Driver
from services.inference.endings import Endings
from services.inference.engine import engine_name
from services.inference.revisions import COMING, ENDED, Deployment, Revision, State, move
from services.inference.routes import RouteTable


@dataclass
class Lifecycle:
    """Of all revisions of a rollout. Close it at the end."""

    driver: Driver
    routes: RouteTable

    def __post_init__(self) -> None:
        """Nothing runs yet."""
        self.launcher, self.publish = self.driver.launcher, self.driver.publish
        self.endings = Endings(self.launcher.limits.drain)
        self._drives: dict[str, asyncio.Task[None]] = {}
        self._clocks: dict[str, asyncio.Task[None]] = {}
        self._log = get_logger("rollout")

    def start(self, owner: Deployment, revision: Revision) -> None:
        """Bring one up that is new or has ended."""
        if revision.state is not State.PENDING:
            move(revision, State.PENDING)
        revision.take_traffic, revision.restarts, revision.warm_since, revision.parity = False, 0, 0, {}
        revision.model_digest = revision.engine_digest = ""
        self._drive(owner, revision)

    def resume(self, owner: Deployment, revision: Revision) -> None:
        """Go on with what an earlier process left."""
        if revision.state is State.DRAINING:
            self.endings.begin(revision.name, partial(self._drain_late, owner, revision))
        elif revision.state in COMING or revision.state is State.READY:
            adopt = revision.state is State.READY
            revision.state = State.PENDING
            self._drive(owner, revision, adopt)

    def drives(self, revision: Revision) -> bool:
        """Whether it is looked after: not while it drains, or when it could not be stopped."""
        return revision.name in self._drives

    def keep_warm(self, owner: Deployment, revision: Revision) -> None:
        """Let one that has lost its traffic stop in time, and one that has some again go on."""
        if clock := self._clocks.pop(revision.name, None):
            clock.cancel()
        if self.drives(revision) and revision.warm_since:
            self._clocks[revision.name] = asyncio.create_task(self._cool(owner, revision))

    async def stop(self, owner: Deployment, revision: Revision) -> None:
        """Drain and stop it, which goes on when the caller goes away; from now on it can be given no traffic."""
        if revision.name not in self.endings:
            if revision.state is State.READY:
                move(revision, State.DRAINING, "finishes what it has begun")
            tasks = [t for of in (self._drives, self._clocks) if (t := of.pop(revision.name, None))]
            for task in tasks:
                task.cancel()
            self.endings.begin(revision.name, partial(self._drain, owner, revision, tasks))
        await self.endings.wait(revision.name)

    async def close(self) -> None:
        """Change nothing from now on; engines are left as they are."""
        tasks = [*self._drives.values(), *self._clocks.values(), *self.endings.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _drive(self, owner: Deployment, revision: Revision, adopt: bool = False) -> None:
        before = self._drives.get(revision.name)
        task = asyncio.create_task(self._drive_after(before, owner, revision, adopt), name=revision.name)
        self._drives[revision.name] = task
        self.keep_warm(owner, revision)

    async def _drive_after(
        self, before: asyncio.Task[None] | None, owner: Deployment, revision: Revision, adopt: bool
    ) -> None:
        """before: has told that the revision failed, and may not have removed its engine yet."""
        if before is not None:
            try:
                await asyncio.wait({before})
            finally:
                before.cancel()
        await self.driver.drive(owner, revision, adopt)

    async def _cool(self, owner: Deployment, revision: Revision) -> None:
        await asyncio.sleep(revision.warm_since + self.launcher.limits.keep_warm - time.time())
        await self.stop(owner, revision)

    async def _drain(self, owner: Deployment, revision: Revision, tasks: Sequence[asyncio.Task[None]] = ()) -> None:
        """tasks: of the revision; they have been cancelled."""
        await asyncio.gather(*tasks, return_exceptions=True)
        if revision.state is State.DRAINING:
            await self.publish(owner)
            if not await self.routes.drained(owner.id, revision.revision, self.launcher.limits.drain):
                self._log.warning(
                    "answers are cut off", revision=revision.name, after_seconds=self.launcher.limits.drain
                )
        await self.launcher.remove(engine_name(owner.id, revision.revision))
        self.driver.addresses.pop(revision.name, None)
        if revision.state not in ENDED:
            move(revision, State.STOPPED)
            await self.publish(owner)

    async def _drain_late(self, owner: Deployment, revision: Revision) -> None:
        """As `_drain`, of what an earlier process began: its gateway may still hand on answers, which nobody here counts."""
        gone = asyncio.create_task(self.launcher.watch(engine_name(owner.id, revision.revision)))
        try:
            ended, _ = await asyncio.wait({gone}, timeout=self.launcher.limits.drain)
            await asyncio.gather(*ended)
        finally:
            gone.cancel()
        await self._drain(owner, revision)
