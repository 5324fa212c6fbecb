"""The real libraries of the hubs against a hub on loopback: rows come from it, artifacts go to it.

A child process each, since huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from fabrictune.v1 import artifact_pb2_grpc
from services.common.artifacts import Artifacts
from services.common.config import ServerConfig
from services.common.server import Server, service
from services.common.store import Store
from services.pipeline.artifacts import ArtifactService
from tests.conftest import ROOT, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROW = b'{"conversations": []}\n'
CARD = b"---\nconfigs:\n- config_name: addition\n  data_files: data/more.jsonl\n---\n# Rows\n"
FILES = {
    "README.md": CARD,
    "data/base.jsonl": ROW,
    "data/more.jsonl": ROW * 3,
    "picture.png": b"\x89PNG",
    "dataset_infos.json": b"{}",
}


class Hub:
    """What the hub has, and what was sent to it."""

    def __init__(self) -> None:
        self.files, self.commit = dict(FILES), COMMIT
        self.private: bool | None = None
        """Of the repository that is published to; None: there is none."""
        self.made: list[dict[str, Any]] = []
        self.sent: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.fetched: list[str] = []


class Handler(BaseHTTPRequestHandler):
    """As much of both hubs' addresses as their libraries ask for here."""

    protocol_version = "HTTP/1.1"
    hub: ClassVar[Hub]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        path = unquote(url.path)
        hub.tokens.add(self.headers.get("authorization", ""))
        if path in ("/api/datasets/org/rows", f"/api/datasets/org/rows/revision/{hub.commit}"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
            self._say({"id": "org/rows", "sha": hub.commit, "siblings": siblings})
        elif path.startswith(f"/datasets/org/rows/resolve/{hub.commit}/"):
            self._give(path.removeprefix(f"/datasets/org/rows/resolve/{hub.commit}/"))
        elif path.startswith(f"/api/datasets/org/rows/tree/{hub.commit}"):
            self._say([{"type": "file", "path": p, "size": len(d), "oid": "0" * 40} for p, d in hub.files.items()])
        elif path == "/api/datasets/ann/made" and hub.private is not None:
            self._say({"id": "ann/made", "sha": COMMIT, "private": hub.private, "siblings": []})
        elif path == "/api/v1/datasets/org/rows/repo/tree":
            files = [
                {"Path": p, "Name": p.rpartition("/")[2], "Size": len(d), "Type": "blob", "Sha256": sha(d)}
                for p, d in hub.files.items()
            ]
            page = int(parse_qs(url.query).get("PageNumber", ["1"])[0])
            self._say(
                {"Code": 200, "Success": True, "Data": {"Files": files if page == 1 else [], "TotalCount": len(files)}}
            )
        elif path == "/api/v1/datasets/org/rows/repo":
            self._give(parse_qs(url.query)["FilePath"][0])
        else:
            code = "RevisionNotFound" if path.endswith("/nope") else "RepoNotFound"
            self._say({"error": "no", "Code": 404, "Message": "no"}, 404, {"x-error-code": code})

    def do_POST(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        hub.tokens.add(self.headers.get("authorization", ""))
        if path == "/api/repos/create":
            wanted = json.loads(body)
            if hub.private is not None:
                return self._say({"error": "there", "url": f"{self._address()}/datasets/ann/made"}, 409)
            hub.made.append(wanted)
            hub.private = wanted.get("private", wanted.get("visibility") == "private")
            self._say({"url": f"{self._address()}/datasets/ann/made"})
        elif path == "/api/validate-yaml":
            self._say({"errors": [], "warnings": []})
        elif path.startswith("/api/datasets/ann/made/preupload/"):
            paths = [f["path"] for f in json.loads(body)["files"]]
            self._say({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif path.startswith("/api/datasets/ann/made/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.sent[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._say({"commitUrl": f"{self._address()}/datasets/ann/made/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._say({"error": f"no {path}"}, 404)

    def _address(self) -> str:
        return f"http://{self.headers['host']}"

    def _give(self, name: str) -> None:
        self.hub.fetched.append(name)
        data = self.hub.files[name]
        told = {"etag": f'"{sha(data)}"', "x-repo-commit": self.hub.commit, "accept-ranges": "bytes"}
        self._send(200, told, data)

    def _say(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, {"content-type": "application/json", **(headers or {})}, json.dumps(value).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[tuple[Hub, str]]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    with serving(server):
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"


def child(code: str, folder: Path, endpoint: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run code with nothing of this process's settings of the hubs."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MODELSCOPE_", "FABRICTUNE_"))}
    env |= {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "MODELSCOPE_ENDPOINT": endpoint, "MODELSCOPE_CACHE": str(folder / "ms"), "MODELSCOPE_HOME": str(folder / "mshome"),
        "FABRICTUNE_DATA_DIR": str(folder / "data"), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=env | more,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def find(uri: str, folder: Path, endpoint: str, **more: str) -> Any:
    """What find_rows says, or its error."""
    code = (
        "import json, sys\nfrom fabrictune.sources import find_rows\n"
        "try:\n    rows = find_rows(sys.argv[1] if len(sys.argv) > 1 else URI)\n"
        "except Exception as error:\n    print(json.dumps({'error': type(error).__name__, 'text': str(error)}))\n"
        "else:\n    print(json.dumps({'path': str(rows.path.absolute()), 'origin': rows.origin}))\n"
    ).replace("sys.argv[1] if len(sys.argv) > 1 else URI", repr(uri))
    done = child(code, folder, endpoint, **more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("scheme", "revision"), [("hf", COMMIT), ("ms", "master")])
def test_only_rows_files_are_fetched(hub: tuple[Hub, str], tmp_path: Path, scheme: str, revision: str) -> None:
    state, endpoint = hub
    found = find(f"{scheme}:org/rows", tmp_path, endpoint)
    assert found.get("origin") == f"{scheme}:org/rows@{revision}", found
    files = {
        p.relative_to(found["path"]).as_posix(): p.read_bytes() for p in Path(found["path"]).rglob("*") if p.is_file()
    }
    assert files == {name: data for name, data in FILES.items() if name.endswith(".jsonl")}
    assert not {"picture.png", "dataset_infos.json"} & set(state.fetched)


@pytest.mark.parametrize("scheme", ["hf", "ms"])
def test_a_subset_is_what_the_card_says(hub: tuple[Hub, str], tmp_path: Path, scheme: str) -> None:
    state, endpoint = hub
    found = find(f"{scheme}:org/rows:addition", tmp_path, endpoint)
    assert Path(found["path"]).read_bytes() == FILES["data/more.jsonl"]
    assert "data/base.jsonl" not in state.fetched
    missing = find(f"{scheme}:org/rows:nope", tmp_path, endpoint)
    assert missing["error"] == "NotFound"
    assert "has no subset 'nope'; its rows files are: data/base.jsonl, data/more.jsonl" in missing["text"]


@pytest.mark.parametrize("scheme", ["hf", "ms"])
def test_a_change_at_the_hub_reaches_the_rows(hub: tuple[Hub, str], tmp_path: Path, scheme: str) -> None:
    state, endpoint = hub
    find(f"{scheme}:org/rows", tmp_path, endpoint)
    del state.files["data/more.jsonl"]
    state.files["data/base.jsonl"], state.commit = ROW * 9, COMMIT[::-1]
    found = find(f"{scheme}:org/rows", tmp_path, endpoint)
    assert Path(found["path"]).read_bytes() == ROW * 9


@pytest.mark.parametrize(
    ("uri", "error", "said"),
    [
        ("hf:org/nothing", "NotFound", "hf:org/nothing is not there, or not for you; HF_TOKEN"),
        ("ms:org/nothing", "NotFound", "ms:org/nothing is not there, or not for you; MODELSCOPE_API_TOKEN"),
        ("hf:org/rows@nope", "NotFound", "has no such revision"),
    ],
)
def test_what_is_not_there(hub: tuple[Hub, str], tmp_path: Path, uri: str, error: str, said: str) -> None:
    found = find(uri, tmp_path, hub[1])
    assert found["error"] == error, found
    assert said in found["text"]


def test_a_data_set_over_the_limit_is_refused_before_it_comes(hub: tuple[Hub, str], tmp_path: Path) -> None:
    found = find("hf:org/rows", tmp_path, hub[1], FABRICTUNE_MAX_SOURCE_BYTES="50")
    assert found["error"] == "ResourceExhausted"
    assert hub[0].fetched == []


@pytest.mark.parametrize(("scheme", "offline"), [("hf", "0"), ("hf", "1"), ("ms", "0")])
def test_without_a_network_there_is_one_clear_error(tmp_path: Path, scheme: str, offline: str) -> None:
    found = find(f"{scheme}:org/rows", tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE=offline)
    assert found["error"] == "Unavailable", found
    assert f"{scheme}:org/rows cannot be had" in found["text"]


PUBLISH = """
from pathlib import Path
from services.common.errors import FabrictuneError
from services.common.hub_publishing import publish
try:
    print(publish("hf", "ann/made", "dataset", Path("out"), public=PUBLIC, message="datasets/d1"))
except FabrictuneError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def made(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_bytes(CARD)
    (tmp_path / "out/train.jsonl").write_bytes(ROW)
    return tmp_path


def test_a_folder_is_published_and_private(hub: tuple[Hub, str], made: Path) -> None:
    state, endpoint = hub
    done = child(PUBLISH.replace("PUBLIC", "False"), made, endpoint, HF_TOKEN="hf_secret")
    assert "private=True" in done.stdout, done.stderr
    assert state.sent == {"README.md": CARD, "train.jsonl": ROW}
    assert "Bearer hf_secret" in state.tokens
    assert "hf_secret" not in done.stdout + done.stderr


def test_nothing_goes_to_a_repository_that_is_public_unless_that_is_said(hub: tuple[Hub, str], made: Path) -> None:
    state, endpoint = hub
    state.private = False
    done = child(PUBLISH.replace("PUBLIC", "False"), made, endpoint, HF_TOKEN="hf_secret")
    assert "FailedPrecondition" in done.stdout, done.stdout + done.stderr
    assert "is public already; --public says that this is meant" in done.stdout
    assert state.sent == {}
    done = child(PUBLISH.replace("PUBLIC", "True"), made, endpoint, HF_TOKEN="hf_secret")
    assert "private=False" in done.stdout, done.stderr
    assert set(state.sent) == {"README.md", "train.jsonl"}


@pytest.fixture
async def endpoint(store: Store, artifacts: Artifacts, tmp_path: Path) -> AsyncIterator[str]:
    """A server with a data set, made from raw rows."""
    for folder, files in (
        ("raw", {"rows.jsonl": ROW}),
        ("set", {"train.jsonl": ROW, "rejects.jsonl": b"", "README.md": b"x"}),
    ):
        (tmp_path / folder).mkdir()
        for name, data in files.items():
            (tmp_path / folder / name).write_bytes(data)
    rows = artifacts.publish(tmp_path / "raw", "datasets/rows", "rows", metadata={"source": "ms:iic/ms_agent@master"})
    made_from = {"job": "conversionJobs/d1", "inputs": [{"name": rows.name, "digest": rows.digest}]}
    artifacts.publish(
        tmp_path / "set", "datasets/d1", "dataset", made_from, {"rows_in": 1, "rows_written": {"train": 1}}
    )
    offered = service(ArtifactService(store, artifacts), artifact_pb2_grpc.add_ArtifactServiceServicer_to_server)
    config = ServerConfig.model_validate({"port": 0, "metrics_port": 0, "drain_seconds": 0})
    server = Server([offered], config, None)
    await server.start()
    yield f"127.0.0.1:{server.port}"
    await server.close()


async def push(folder: Path, hub: str, endpoint: str, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    argv = ["--endpoint", endpoint, "artifacts", "push", "datasets/d1", "hf://ann/made", *options]
    code = f"import sys; sys.argv = ['fabrictune', *{argv!r}]; from fabrictune.cli import main; main()"
    return await asyncio.to_thread(child, code, folder, hub, **more)


async def test_a_dry_run_prints_the_card_and_the_files_and_sends_nothing(
    hub: tuple[Hub, str], endpoint: str, tmp_path: Path
) -> None:
    done = await push(tmp_path, hub[1], endpoint, "--dry-run", "--leave-out", "rejects*", "--license", "apache-2.0")
    assert done.returncode == 0, done.stderr
    assert "license: apache-2.0" in done.stdout
    assert "| `datasets/rows` | rows |" in done.stdout
    assert "ms:iic/ms_agent@master" in done.stdout
    assert done.stdout.rstrip().endswith("Files:\n  README.md\n  README.source.md\n  train.jsonl")
    assert hub[0].tokens == set()


async def test_an_artifact_is_published_with_its_card(hub: tuple[Hub, str], endpoint: str, tmp_path: Path) -> None:
    done = await push(tmp_path, hub[1], endpoint, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert "datasets/d1 is at" in done.stdout
    assert "(private)" in done.stdout
    sent = hub[0].sent
    assert set(sent) == {"README.md", "README.source.md", "train.jsonl", "rejects.jsonl"}
    assert sent["README.source.md"] == b"x"
    assert b"# made" in sent["README.md"]
    assert b"Not chosen yet" in sent["README.md"]
    assert list((tmp_path / "data/publishing").iterdir()) == []


async def test_without_a_token_nothing_is_fetched(hub: tuple[Hub, str], endpoint: str, tmp_path: Path) -> None:
    done = await push(tmp_path, hub[1], endpoint)
    assert done.returncode == 77, done.stderr
    assert "set HF_TOKEN" in done.stderr
    assert not (tmp_path / "data/publishing").exists()


def test_publishing_needs_a_token(hub: tuple[Hub, str], made: Path) -> None:
    done = child(PUBLISH.replace("PUBLIC", "False"), made, hub[1])
    assert "Unauthenticated publishing needs a token that may write: set HF_TOKEN" in done.stdout
    assert hub[0].made == []
