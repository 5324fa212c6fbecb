"""A model deployed as "weather" by the real inference service, and how its user calls commands."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from services.common.artifacts import Artifacts
from services.common.clusters.local import LocalCluster
from services.common.config import ServerConfig, StoreConfig
from services.common.server import Server
from services.common.store import open_store
from services.inference.engine import describe_model, detect_hardware, reference_dtype
from services.inference.host import open_inference
from services.inference.reference import Reference, reference_key, reference_to_json
from services.inference.revisions import Revision, State
from services.inference.spec import parse_spec


@dataclass
class House:
    """A deployment "weather" and how to call the command."""

    folder: Path
    endpoint: str
    gateway: str
    revision: Revision

    async def call(self, *argv: str, status: int = 0) -> str:
        """Run a program of this environment; its stdout, or stderr when it is to fail."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("FABRICTUNE_")}
        env |= {"FABRICTUNE_ENDPOINT": self.endpoint, "COLUMNS": "200"}
        done = await asyncio.to_thread(
            subprocess.run, argv, cwd=self.folder, env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == status, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
        return done.stdout if status == 0 else done.stderr

    async def fabrictune(self, *arguments: str, status: int = 0) -> str:
        return await self.call(sys.executable, "-m", "fabrictune", *arguments, status=status)

    def lines(self, name: str) -> list[Any]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]


@asynccontextmanager
async def open_house(
    folder: Path, object_store: StoreConfig, cluster: LocalCluster, reference: Reference | None = None,
    **spec: Any,
) -> AsyncIterator[House]:  # fmt: skip
    """Serve `folder/model` as the deployment "weather", recording. reference: what its engine repeats, if that is scripted."""
    store = open_store(object_store.model_copy(update={"bucket": f"test-{secrets.token_hex(6)}"}))
    artifacts = Artifacts(store, folder / "cache")
    digest = (await asyncio.to_thread(artifacts.publish, folder / "model", "models/m", "model")).digest
    if reference is not None:
        dtype = reference_dtype(describe_model("models/m", digest, folder / "model"), detect_hardware())
        stored = replace(reference, model_digest=digest, dtype=dtype)
        store.put_json(reference_key(digest, dtype), reference_to_json(stored))
    async with AsyncExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("FABRICTUNE_RECORD", "true")
        patch.setenv("FABRICTUNE_RECORD_FLUSH_SECONDS", "600")  # only asking for it writes it
        await cluster.start()
        stack.push_async_callback(cluster.close)
        config = ServerConfig(port=0, gateway_port=0, metrics_port=0, drain_seconds=0)
        inference = await open_inference(stack, config, store, artifacts, cluster, None)
        server = Server([inference.service], config, None)
        await server.start()
        stack.push_async_callback(server.close)
        wanted = parse_spec({"model": "models/m", **spec})
        await inference.rollout.create_revision("weather", "r-1", wanted, take_traffic=True)
        made = await inference.rollout.wait("weather", "r-1")
        assert made.state is State.READY, made.message
        yield House(folder, f"127.0.0.1:{server.port}", inference.url, made)
        await inference.rollout.delete("weather")
