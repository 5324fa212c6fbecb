"""A 500 MB artifact to and from the embedded S3 server, beside Debian's rclone with the same server. Limit: the disk."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path

from rich.console import Console

from bench.measure import Sample, call, command, show

MEGABYTES = 500
ROUNDS = 3


def run() -> bool:
    """Measure; False when rclone is not there."""
    rclone = shutil.which("rclone")
    if rclone is None:
        Console(stderr=True).print("bench transfer needs the baseline rclone: apt-get install rclone")
        return False
    from services.common.store import open_store
    from services.common.weed import EmbeddedStore

    with tempfile.TemporaryDirectory(prefix="fabrictune-bench-") as scratch:
        folder = Path(scratch)
        embedded = EmbeddedStore(folder / "store")
        try:
            config = embedded.start()
            open_store(config)
            env = {
                **{k: v for k, v in os.environ.items() if k != "AWS_CA_BUNDLE"},  # rclone 1.60 cannot load one
                "FABRICTUNE_S3_ENDPOINT": config.endpoint,
                "FABRICTUNE_S3_ACCESS_KEY": config.access_key,
                "FABRICTUNE_S3_SECRET_KEY": config.secret_key.get_secret_value(),
                "RCLONE_CONFIG": str(folder / "rclone.conf"),
                "RCLONE_CONFIG_W_TYPE": "s3",
                "RCLONE_CONFIG_W_PROVIDER": "SeaweedFS",
                "RCLONE_CONFIG_W_ENDPOINT": config.endpoint,
                "RCLONE_CONFIG_W_ACCESS_KEY_ID": config.access_key,
                "RCLONE_CONFIG_W_SECRET_ACCESS_KEY": config.secret_key.get_secret_value(),
                "RCLONE_CONFIG_W_REGION": config.region,
            }
            data = folder / "data"
            data.mkdir()
            with (data / "weights.safetensors").open("wb") as out:
                for _ in range(MEGABYTES):
                    out.write(secrets.token_bytes(1_000_000))
            up: dict[str, list[Sample]] = {"fabrictune": [], "rclone": []}
            down: dict[str, list[Sample]] = {"fabrictune": [], "rclone": []}
            for number in range(ROUNDS):
                name, there = f"models/bench-{number}", f"w:{config.bucket}/rclone-{number}"
                up["fabrictune"].append(call("bench.transfer", "publish", str(data), name, env=env))
                up["rclone"].append(command([rclone, "copy", str(data), there], env))
                down["fabrictune"].append(call("bench.transfer", "fetch", name, str(folder / "ours"), env=env))
                down["rclone"].append(command([rclone, "copy", there, str(folder / "theirs")], env))
                shutil.rmtree(folder / "ours")
                shutil.rmtree(folder / "theirs")
            begin = time.perf_counter()
            shutil.copyfile(data / "weights.safetensors", folder / "copy")
            disk = MEGABYTES / (time.perf_counter() - begin)
        finally:
            embedded.stop()
    note = f"sha256 of every byte is ours only; a plain copy of the file on this disk: {disk:.0f} MB/s"
    show(f"upload of {MEGABYTES} MB, median of {ROUNDS}", up, "rclone", MEGABYTES, note)
    show(f"download of {MEGABYTES} MB, median of {ROUNDS}", down, "rclone", MEGABYTES, note)
    return True


def publish(folder: str, name: str) -> None:
    """Upload a folder and seal it."""
    from services.common.artifacts import Artifacts
    from services.common.config import load_store
    from services.common.store import open_store

    Artifacts(open_store(load_store()), Path(folder).parent / "cache").publish(Path(folder), name, "model")


def fetch(name: str, folder: str) -> None:
    """Download and verify an artifact."""
    from services.common.artifacts import Artifacts
    from services.common.config import load_store
    from services.common.store import open_store

    Artifacts(open_store(load_store()), Path(folder).parent / "cache").fetch(name, Path(folder))
