"""Every service in one process, with a local cluster and an embedded object store: what `fabrictune up` runs.

The same servicers and the same API as one per pod. Jobs and engines are child processes; they and the object store
outlive a killed `up`, and the next one goes on with them. A `up` that is told to stop ends them all.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc

from services.common.artifacts import Artifacts
from services.common.auth import load_authenticator
from services.common.clusters.leftovers import leftovers
from services.common.clusters.local import LocalCluster
from services.common.clusters.processes import start_ticks
from services.common.config import ServerConfig, StoreConfig, load_record, load_server, load_store
from services.common.jobs import Jobs
from services.common.logs import configure
from services.common.main import run_until_stopped, settle
from services.common.server import Server, wait_for_stop
from services.common.store import Store, open_store
from services.common.weed import EmbeddedStore
from services.conversion import service as conversion
from services.evaluation import service as evaluation
from services.inference.host import open_inference
from services.merging import service as merging
from services.pipeline.channels import SERVICES
from services.pipeline.host import open_pipeline
from services.training import service as training

OFFERS = (conversion.OFFER, training.OFFER, merging.OFFER, evaluation.OFFER)


def serve(announce: bool) -> None:
    """Run until told to stop. Raises errors of services.common.errors when it cannot start."""
    config = load_server()
    configure(config.log_format, config.log_level)
    data_dir = config.data_dir.absolute()
    data_dir.mkdir(parents=True, exist_ok=True)
    embedded = None
    named = load_store()
    if not named.endpoint:
        embedded = EmbeddedStore(data_dir / "store")
        named = embedded.start()
    _hand_on(named, data_dir)
    try:
        asyncio.run(_serve(config, open_store(named), data_dir, announce))
    finally:
        if embedded is not None:
            embedded.stop()
        (data_dir / "up.json").unlink(missing_ok=True)


def end_leftovers(data_dir: Path) -> int:
    """End the workers, engines and object store that a killed `up` has left; returns how many."""
    ended = leftovers(data_dir.absolute() / "cluster")
    return ended + EmbeddedStore(data_dir / "store").stop()


async def _serve(config: ServerConfig, store: Store, data_dir: Path, announce: bool) -> None:
    authenticator = load_authenticator(config)
    async with AsyncExitStack() as stack:
        cluster = LocalCluster(data_dir / "cluster", config.max_concurrent_jobs)
        await cluster.start()
        stack.push_async_callback(cluster.close)
        artifacts = Artifacts(store, data_dir / "cache")
        # In a folder that only this user can enter: services of this process talk to each other there, asking no token.
        inside = f"unix:{stack.enter_context(tempfile.TemporaryDirectory(prefix='fabrictune-'))}/inside.sock"
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(inside))
        kinds = [(offer, Jobs(offer.stage, store, artifacts, cluster)) for offer in OFFERS]

        inference = await open_inference(stack, config, store, artifacts, cluster, authenticator)
        os.environ["FABRICTUNE_GATEWAY_URL"] = config.gateway_url or inference.url
        cluster.set_environment("FABRICTUNE_GATEWAY_URL", os.environ["FABRICTUNE_GATEWAY_URL"])
        pipeline = open_pipeline(stack, dict.fromkeys(SERVICES, channel), store, artifacts)
        offered = [offer.serve(jobs, cluster) for offer, jobs in kinds]
        server = Server([*offered, inference.service, *pipeline.services], config, authenticator, inside)
        await server.start()
        stack.push_async_callback(server.close)
        for jobs in [*(jobs for _, jobs in kinds), pipeline.jobs]:
            await settle(stack, jobs)
        await inference.restore()
        said = _write_up_file(config, data_dir, server, inference.url, store.endpoint)
        if announce:
            record = load_record()
            kept = f"  records   prompts and answers are kept, redacted, for {record.record_days} days\n"
            print(
                f"fabrictune is up\n  gRPC      {said['endpoint']}\n  OpenAI    {inference.url}/v1\n"
                f"  metrics   http://{config.host}:{server.metrics_port}/metrics\n  S3        {store.endpoint}\n"
                f"  data      {data_dir}\n{kept if record.record else ''}Ctrl-C ends it.",
                flush=True,
            )
        await wait_for_stop()
        (data_dir / "up.json").unlink(missing_ok=True)
        await asyncio.gather(server.close(), inference.drain())  # both at once, in `drain_seconds`


def _write_up_file(config: ServerConfig, data_dir: Path, server: Server, gateway: str, s3: str) -> dict[str, Any]:
    said = {
        "pid": os.getpid(),
        "started": start_ticks(os.getpid()),
        "endpoint": f"{config.host}:{server.port}",
        "gateway": gateway,
        "metrics": f"http://{config.host}:{server.metrics_port}/metrics",
        "s3": s3,
    }
    draft = data_dir / "up.tmp"
    draft.write_text(json.dumps(said, indent=1))
    draft.replace(data_dir / "up.json")
    return said


def _hand_on(store: StoreConfig, data_dir: Path) -> None:
    """Workers read the same settings as we do: from the environment, where only this user can see them."""
    os.environ |= {
        "FABRICTUNE_S3_ENDPOINT": store.endpoint,
        "FABRICTUNE_S3_BUCKET": store.bucket,
        "FABRICTUNE_S3_REGION": store.region,
        "FABRICTUNE_S3_ACCESS_KEY": store.access_key,
        "FABRICTUNE_S3_SECRET_KEY": store.secret_key.get_secret_value(),
        "FABRICTUNE_DATA_DIR": str(data_dir),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    }


def main() -> None:
    """`python -m services.up`."""
    run_until_stopped(lambda: serve(announce=True))


if __name__ == "__main__":
    main()
