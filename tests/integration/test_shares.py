"""One conversion on three nodes, as an Indexed Job runs it: worker processes that meet in a real object store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from services.common.artifacts import Artifacts
from services.common.config import StoreConfig
from services.common.store import Store
from tests.unit.test_conversion_worker import many, write

FILES = ("train.jsonl", "validation.jsonl", "test.jsonl", "tools.jsonl", "rejects.jsonl", "report.json")


def start_node(store: Store, object_store: StoreConfig, folder: Path, spec: Path, node: int) -> subprocess.Popen[bytes]:
    env = {**os.environ, "FABRICTUNE_S3_ENDPOINT": object_store.endpoint, "FABRICTUNE_S3_BUCKET": store.bucket}
    env |= {
        "FABRICTUNE_S3_ACCESS_KEY": object_store.access_key,
        "FABRICTUNE_S3_SECRET_KEY": object_store.secret_key.get_secret_value(),
        "FABRICTUNE_DATA_DIR": str(folder / f"node-{node}"),
        "FABRICTUNE_TERMINATION_LOG": str(folder / f"word-{node}"),
        "FABRICTUNE_SPEC_FILE": str(spec),
        "JOB_COMPLETION_INDEX": str(node),
    }
    return subprocess.Popen([sys.executable, "-m", "services.conversion.worker"], env=env)


def test_three_nodes_make_what_one_makes_and_leave_no_shares(
    store: Store, object_store: StoreConfig, artifacts: Artifacts, tmp_path: Path
) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    for number in range(4):
        write(rows / f"{number}.jsonl", *many(20 + number), "no json")
    artifacts.publish(rows, "datasets/rows", "rows")
    made: dict[int, Path] = {}
    for nodes in (1, 3):
        told = {"sources": [{"uri": "datasets/rows"}], "duplicates": "near", "resources": {"nodes": nodes}}
        spec = tmp_path / f"{nodes}.yaml"
        spec.write_text(yaml.safe_dump({"name": f"conversionJobs/on-{nodes}", "spec": told}))
        running = [
            start_node(store, object_store, tmp_path / str(nodes), spec, node) for node in reversed(range(nodes))
        ]
        assert [process.wait(timeout=120) for process in running] == [0] * nodes
        made[nodes] = artifacts.cached(f"datasets/on-{nodes}")
    for file in FILES:
        assert (made[1] / file).read_bytes() == (made[3] / file).read_bytes(), file
    assert json.loads((made[3] / "report.json").read_text())["rows_rejected"] == 4
    assert not list(store.list_keys("shares/"))
