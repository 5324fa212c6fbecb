"""One model folder served in the foreground: `fabrictune deploy FOLDER`. The same rollout and gateway, without a store."""

from __future__ import annotations

import asyncio
import hashlib
import shlex
import tempfile
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from services.common.clusters.local import LocalCluster
from services.common.config import load_record
from services.common.errors import FailedPrecondition
from services.common.logs import configure
from services.common.resources import check_id
from services.common.server import wait_for_stop
from services.inference.engine import Model, describe_model, detect_hardware, read_model_config, render_engine
from services.inference.gateway import Gateway
from services.inference.launch import Artifacts
from services.inference.recorder import open_recorder
from services.inference.reference import Reference
from services.inference.revisions import Deployment, State
from services.inference.rollout import Rollout
from services.inference.routes import RouteTable
from services.inference.spec import RevisionSpec, parse_spec


def serve_folder(model: Path, port: int, name: str, spec: Mapping[str, Any], dry_run: bool) -> None:
    """Serve until told to stop; dry_run: say what would be started. port: 0 takes a free one.

    name: of the deployment and the model; "": the folder's. Raises InvalidData, InvalidSpec, FailedPrecondition, what a start
    raises.
    """
    read_model_config(model)  # refused before anything starts
    name = check_id(name or model.resolve().name, "--as" if name else "the folder's name, which is to be the model's")
    revision = parse_spec({**spec, "model": f"models/{name}"})
    if dry_run:
        work = render_engine(
            name, "r-1", revision, describe_model(revision.model, "", model.resolve()), detect_hardware()
        )
        print(f"{name} would be served at port {port or 'any'} by\n{shlex.join(work.argv)}")
        return
    configure("console", "WARNING")
    asyncio.run(_serve(model, port, name, revision))


async def _serve(folder: Path, port: int, name: str, revision: RevisionSpec) -> None:
    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fabrictune-")))
        cluster = LocalCluster(scratch)
        await cluster.start()
        stack.push_async_callback(cluster.close)
        routes = RouteTable()
        rollout = Rollout(cluster, routes, _folder_artifacts(folder.resolve()), detect_hardware())
        stack.push_async_callback(rollout.close)
        gateway = Gateway(routes, None, recorder=open_recorder(stack, load_record(), None))
        port = await gateway.start("127.0.0.1", port)
        stack.push_async_callback(gateway.close)
        print(f"starting vLLM on {folder} and comparing it with the reference …", flush=True)
        await rollout.create_revision(name, "r-1", revision, take_traffic=True)
        stopped = asyncio.create_task(wait_for_stop())
        starting = asyncio.create_task(rollout.wait(name, "r-1"))
        await asyncio.wait({stopped, starting}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            return
        if starting.result().state is not State.READY:
            raise FailedPrecondition(f"the model cannot be served: {starting.result().message}")
        steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in starting.result().seconds.items())
        print(
            f"{name} is served at http://127.0.0.1:{port}/v1\n\n  curl http://127.0.0.1:{port}/v1/chat/completions "
            f'-H \'Content-Type: application/json\' \\\n    -d \'{{"model": "{name}", "messages": '
            f'[{{"role": "user", "content": "Hello"}}]}}\'\n\nIt took: {steps}. Ctrl-C ends it.',
            flush=True,
        )
        await stopped


def _folder_artifacts(folder: Path) -> Artifacts:
    """A folder in a store's place; nothing outlives the process."""
    references: dict[tuple[str, str], Reference] = {}

    async def fetch_model(name: str) -> Model:
        weights = sorted(folder.glob("*.safetensors"))
        digests = await asyncio.gather(*(asyncio.to_thread(_digest, f) for f in weights))
        return describe_model(name, hashlib.sha256("".join(digests).encode()).hexdigest(), folder)

    async def fetch_reference(digest: str, dtype: str) -> Reference | None:
        return references.get((digest, dtype))

    async def store_reference(reference: Reference) -> None:
        references[reference.model_digest, reference.dtype] = reference

    async def keep_nothing(_: Deployment | str) -> None:
        return None

    return Artifacts(fetch_model, fetch_reference, store_reference, keep_nothing, keep_nothing)


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
