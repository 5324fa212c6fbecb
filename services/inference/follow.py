"""Beside an engine in its pod: gives it the adapters that a list in the store names, whenever that list changes.

    python -m services.inference.follow

The inference service says whose list in FABRICTUNE_ADAPTERS_OF ("deployment/revision"), and changes it while the engine runs.
Each pod follows it by itself: one that takes the place of a lost one and one of several, too. The file READY, for which the
pod's readiness probe looks, is there once the engine has had all of them since it started. The engine itself needs no
credentials of the store.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from services.common.artifacts import Artifacts
from services.common.clusters import ADAPTERS_OF
from services.common.config import load_store
from services.common.errors import DataLoss, FabrictuneError, FailedPrecondition, InvalidSpec
from services.common.store import Store, open_store
from services.inference.adapters import Adapter, list_models, load_adapter, unload_others
from services.inference.engine import adapter_model
from services.inference.prepare import MODELS

ENGINE = "http://127.0.0.1:8000"
READY = Path("/tmp/adapters-are-there")
PAUSE_SECONDS = 1.0
TIMEOUT = aiohttp.ClientTimeout(total=300, sock_connect=5)


def adapters_key(deployment: str, revision: str) -> str:
    """Where a revision's list is."""
    return f"deployments/{deployment}/adapters/{revision}.json"


def write_list(store: Store, deployment: str, revision: str, adapters: Sequence[Adapter]) -> None:
    """Say which adapters the engines of a revision are to have."""
    store.put_json(adapters_key(deployment, revision), {"adapters": {a.name: a.digest for a in adapters}})


def read_list(store: Store, deployment: str, revision: str) -> dict[str, str]:
    """Adapters → their digests; {} where nothing was said yet. Raises DataLoss."""
    key = adapters_key(deployment, revision)
    told = store.get_json(key)
    if told is None:
        return {}
    try:
        return {str(name): str(digest) for name, digest in told["adapters"].items()}
    except (KeyError, TypeError, AttributeError):
        raise DataLoss(f"{key} is no list of adapters") from None


class Follower:
    """Keeps one engine's adapters those of a list. models: the pod's folder, its cache is the engine's too."""

    def __init__(self, store: Store, deployment: str, revision: str, models: Path, engine: str, ready: Path) -> None:
        self._store, self._artifacts = store, Artifacts(store, models / "cache")
        self._deployment, self._revision, self._engine, self._ready = deployment, revision, engine, ready

    async def follow(self) -> None:
        """Until it is cancelled. What goes wrong is printed when it changes, and tried again.

        Raises FailedPrecondition when the engine refuses an adapter before it has had all of them: it has to be told.
        """
        told = ""
        async with aiohttp.ClientSession(timeout=TIMEOUT) as session:
            while True:
                try:
                    await self._sync(session)
                    told = ""
                except FabrictuneError as error:
                    if isinstance(error, FailedPrecondition) and not self._ready.exists():
                        raise
                    if error.message != told:
                        print(f"not now: {error.message}", file=sys.stderr, flush=True)
                    told = error.message
                await asyncio.sleep(PAUSE_SECONDS)

    async def _sync(self, session: aiohttp.ClientSession) -> None:
        try:
            there = await list_models(session, self._engine)
        except FabrictuneError:
            self._ready.unlink(missing_ok=True)  # it starts, or starts again, and then has none
            raise
        listed = await asyncio.to_thread(read_list, self._store, self._deployment, self._revision)
        wanted = {adapter_model(self._deployment, n.rpartition("/")[2], d): (n, d) for n, d in listed.items()}
        failed: list[FabrictuneError] = []
        for model in wanted.keys() - there:
            try:
                await self._load(session, *wanted[model])
            except FabrictuneError as error:  # the others are loaded all the same
                failed.append(error)
        for model in await unload_others(session, self._engine, self._deployment, wanted):
            print(f"{model} is gone", flush=True)
        if failed:
            raise failed[0]
        self._ready.touch()

    async def _load(self, session: aiohttp.ClientSession, name: str, digest: str) -> None:
        folder = await asyncio.to_thread(self._artifacts.cached, name, digest)
        await load_adapter(session, self._engine, self._deployment, Adapter(name, digest, folder, 0, {}, {}))
        print(f"{name} is there", flush=True)


def main() -> int:
    """Entry of the process; the exit status is that of the error."""
    try:
        deployment, _, revision = os.environ.get(ADAPTERS_OF, "").partition("/")
        if not revision:
            raise InvalidSpec(f"{ADAPTERS_OF} must be deployment/revision; the inference service sets it")
        READY.unlink(missing_ok=True)  # of a container before this one
        follower = Follower(open_store(load_store()), deployment, revision, MODELS, ENGINE, READY)
        # The first process of a container is not ended by a signal that it does not handle.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        asyncio.run(follower.follow())
    except FabrictuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
