"""Adapters beside their base while engines run: in the one engine of this machine, or in all pods of an engine in a cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from services.common.clusters import Phase
from services.common.errors import DeadlineExceeded, Unavailable, WorkerLost
from services.inference.adapters import Adapter, list_models, load_adapter, unload_others
from services.inference.engine import adapter_model, engine_name
from services.inference.launch import Launcher
from services.inference.revisions import Revision

ListAdapters = Callable[[str, str, Sequence[Adapter]], Awaitable[None]]


class Beside(Protocol):
    """The acts. All may raise FabrictuneError."""

    async def expect(self, revision: Revision, adapters: Sequence[Adapter]) -> None:
        """Before an engine starts: these it is to have."""

    async def load(self, revision: Revision, address: str, adapters: Sequence[Adapter]) -> None:
        """Return once a running engine has all of these."""

    async def keep(self, revision: Revision, address: str, adapters: Sequence[Adapter]) -> None:
        """Let all others go."""


class InOneEngine:
    """They are loaded from here."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    async def expect(self, revision: Revision, adapters: Sequence[Adapter]) -> None:
        """Nothing: they are loaded once it answers."""

    async def load(self, revision: Revision, address: str, adapters: Sequence[Adapter]) -> None:
        """Raises FailedPrecondition when the engine refuses one, Unavailable."""
        for adapter in adapters:
            await load_adapter(self._launcher.session, address, revision.deployment, adapter)

    async def keep(self, revision: Revision, address: str, adapters: Sequence[Adapter]) -> None:
        """Raises Unavailable."""
        names = {adapter_model(revision.deployment, a.id, a.digest) for a in adapters}
        await unload_others(self._launcher.session, address, revision.deployment, names)


class InPods:
    """Each pod follows a list (see `follow`)."""

    def __init__(self, launcher: Launcher, list_adapters: ListAdapters) -> None:
        self._launcher, self._list = launcher, list_adapters

    async def expect(self, revision: Revision, adapters: Sequence[Adapter]) -> None:
        """Pods are Ready with all of these only."""
        await self._list(revision.deployment, revision.revision, adapters)

    async def load(self, revision: Revision, address: str, adapters: Sequence[Adapter]) -> None:
        """Raises DeadlineExceeded naming the pods that lack one, WorkerLost."""
        await self._list(revision.deployment, revision.revision, adapters)
        wanted = {adapter_model(revision.deployment, a.id, a.digest) for a in adapters}
        name, limits = engine_name(revision.deployment, revision.revision), self._launcher.limits
        deadline = time.monotonic() + limits.adapters
        while True:
            status = await self._launcher.cluster.get(name)
            if status is None or status.asleep or status.phase in (Phase.SUCCEEDED, Phase.FAILED):
                raise WorkerLost("the engine ended while its adapters changed")
            missing = {pod: gone for pod in status.each if (gone := wanted - await self._models_of(pod))}
            if status.each and not missing:
                return
            if time.monotonic() > deadline:
                lacks = "; ".join(f"{pod} has no {', '.join(sorted(gone))}" for pod, gone in missing.items())
                raise DeadlineExceeded(
                    f"after {limits.adapters:.0f} s {lacks or 'no pod is ready'}; the log of the container `adapters` in "
                    "its pod says why"
                )
            await asyncio.sleep(limits.poll)

    async def keep(self, revision: Revision, address: str, adapters: Sequence[Adapter]) -> None:
        """Each pod sees to it."""
        await self._list(revision.deployment, revision.revision, adapters)

    async def _models_of(self, address: str) -> set[str]:
        try:
            return await list_models(self._launcher.session, address)
        except Unavailable:  # a pod that just went is in the next status no more
            return set()
