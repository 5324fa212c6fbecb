"""The preview as users meet it: rows in a real object store, a real server, the client and the command."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fabrictune.client import Client
from fabrictune.errors import ApiError
from fabrictune.v1 import conversion_pb2
from services.common.artifacts import Artifacts
from services.common.auth import Authenticator, TokenEntry
from services.common.clusters.local import LocalCluster
from services.common.config import ServerConfig
from services.common.jobs import Jobs
from services.common.server import Server
from services.common.store import Store
from services.conversion.preview import HEAD_BYTES
from services.conversion.service import OFFER

ROWS = Path(__file__).resolve().parents[2] / "examples/data/train.jsonl"
KEY = "key of ann"


class Here:
    """A server whose store holds rows, and how a viewer calls it."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    async def preview(self, uri: str, rows: int = 0, **source: str) -> conversion_pb2.PreviewConversionResponse:
        with Client(self.endpoint, KEY) as client:
            return await asyncio.to_thread(client.conversion.preview, {"sources": [{"uri": uri, **source}]}, rows)


@pytest.fixture
async def here(store: Store, artifacts: Artifacts, tmp_path: Path) -> AsyncIterator[Here]:
    folder = tmp_path / "rows"
    (folder / "deep").mkdir(parents=True)
    (folder / "README.md").write_text("no rows")
    (folder / "deep/a.jsonl.gz").write_bytes(gzip.compress(ROWS.read_bytes()))
    (folder / "b.jsonl").write_bytes(ROWS.read_bytes())
    (folder / "big.jsonl").write_bytes(ROWS.read_bytes() * (HEAD_BYTES // ROWS.stat().st_size + 2))
    (folder / "c.parquet").write_bytes(b"PAR1")
    table = pyarrow.Table.from_pylist([json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()[:20]])
    pyarrow.parquet.write_table(table, folder / "d.parquet")
    (folder / "e.parquet").write_bytes(b"PAR1" * (HEAD_BYTES // 4 + 1))
    (folder / "empty.jsonl").touch()
    artifacts.publish(folder, "datasets/rows", "rows")
    cluster = LocalCluster(tmp_path / "cluster", 1)
    jobs = Jobs(OFFER.stage, store, artifacts, cluster)
    entry = TokenEntry(name="ann", role="viewer", sha256=hashlib.sha256(KEY.encode()).hexdigest())
    config = ServerConfig(port=0, metrics_port=0, drain_seconds=0)
    server = Server([OFFER.serve(jobs, cluster)], config, Authenticator([entry]))
    await server.start()
    yield Here(f"127.0.0.1:{server.port}")
    await server.close()


async def test_a_viewer_sees_the_first_rows_before_and_after(here: Here) -> None:
    answer = await here.preview("datasets/rows")
    assert [(row.source, row.line) for row in answer.rows] == [("b.jsonl", line) for line in range(1, 6)]
    assert answer.rows[0].before[0].text.startswith("Answer the following questions")
    assert "# Tools" in answer.rows[0].after[0].messages[0].text


async def test_a_glob_names_the_file_and_packed_rows_are_read(here: Here) -> None:
    answer = await here.preview("datasets/rows", 50, files="deep/*")
    assert [row.line for row in answer.rows] == list(range(1, 51))
    assert {row.source for row in answer.rows} == {"a.jsonl.gz"}
    assert answer.ByteSize() < 4 << 20, "what a client of gRPC takes"


async def test_the_rows_of_a_small_table_are_shown(here: Here) -> None:
    table = await here.preview("datasets/rows", 3, files="d.parquet")
    lines = await here.preview("datasets/rows", 3, files="b.jsonl")
    assert [list(row.after) for row in table.rows] == [list(row.after) for row in lines.rows]


async def test_of_a_large_file_only_the_beginning_is_read(here: Here) -> None:
    answer = await here.preview("datasets/rows", 3, files="big.jsonl")
    assert [row.HasField("refusal") for row in answer.rows] == [False] * 3


async def test_a_file_without_rows_shows_none(here: Here) -> None:
    assert not (await here.preview("datasets/rows", files="empty.jsonl")).rows


@pytest.mark.parametrize(
    ("uri", "rows", "source", "code", "said"),
    [
        ("datasets/none", 0, {}, "NOT_FOUND", "there is no artifact datasets/none"),
        ("rows.jsonl", 0, {}, "INVALID_ARGUMENT", "is no artifact's name"),
        ("datasets/rows", 0, {"files": "*.md"}, "INVALID_ARGUMENT", "has no rows files that match"),
        ("datasets/rows", 0, {"files": "*.parquet"}, "INVALID_ARGUMENT", "c.parquet cannot be read as Parquet"),
        ("datasets/rows", 0, {"files": "e.parquet"}, "INVALID_ARGUMENT", "e.parquet cannot be previewed here"),
        ("datasets/rows", 0, {"layout": "sideways"}, "INVALID_ARGUMENT", "spec.sources[0].layout"),
        ("datasets/rows", -1, {}, "INVALID_ARGUMENT", "must be positive"),
    ],
)
async def test_what_cannot_be_previewed_is_refused_by_name(
    here: Here, uri: str, rows: int, source: dict[str, str], code: str, said: str
) -> None:
    with pytest.raises(ApiError) as refused:
        await here.preview(uri, rows, **source)
    assert refused.value.code == code
    assert said in str(refused.value)


async def test_the_command_asks_the_server_for_an_artifact_and_reads_a_path_itself(here: Here, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_bytes(ROWS.read_bytes())
    argv = [sys.executable, "-m", "fabrictune", "--json", "--endpoint", here.endpoint]
    argv += ["convert", "datasets/rows", "mine.jsonl", "--preview", "1"]
    env = os.environ | {"FABRICTUNE_TOKEN": KEY}
    done = await asyncio.to_thread(subprocess.run, argv, cwd=tmp_path, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["source"] for row in rows] == ["b.jsonl", "mine.jsonl"]
    assert rows[0]["after"] == rows[1]["after"]
