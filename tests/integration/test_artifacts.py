"""Artifacts in a real object store: sealed once, verified, resumed, refused."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from fabrictune.errors import ApiError
from fabrictune.transfer import CHUNK, pull
from fabrictune.v1 import artifact_pb2
from services.common import transfer
from services.common.artifacts import Artifacts
from services.common.config import StoreConfig
from services.common.errors import (
    AlreadyExists,
    DataLoss,
    InvalidData,
    InvalidSpec,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from services.common.remote import RemoteDraft
from services.common.store import Store, open_store
from services.pipeline.artifacts import artifact_message
from tests.conftest import serving


def folder_of(path: Path, **files: bytes) -> Path:
    for name, data in files.items():
        file = path / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return path


def publish(artifacts: Artifacts, folder: Path, name: str = "datasets/a", **more: object) -> str:
    return artifacts.publish(folder, name, "dataset", more).digest


def test_a_folder_comes_back_as_it_was(artifacts: Artifacts, tmp_path: Path) -> None:
    big = os.urandom(3 * transfer.PART + 17)
    folder = folder_of(tmp_path / "in", train_jsonl=b"{}\n", deep__big=big, empty=b"")
    manifest = artifacts.publish(folder, "datasets/a", "dataset", {"job": "conversionJobs/x"}, {"rows": 1})
    assert artifacts.get("datasets/a") == manifest
    artifacts.fetch("datasets/a", tmp_path / "out")
    assert (tmp_path / "out/deep/big").read_bytes() == big
    assert (tmp_path / "out/empty").read_bytes() == b""
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file()) == ["big", "empty", "train.jsonl"]


def test_an_artifact_is_never_replaced(artifacts: Artifacts, tmp_path: Path) -> None:
    digest = publish(artifacts, folder_of(tmp_path / "in", a=b"1"))
    assert publish(artifacts, folder_of(tmp_path / "same", a=b"1")) == digest
    with pytest.raises(AlreadyExists, match="datasets/a exists with other files"):
        publish(artifacts, folder_of(tmp_path / "other", a=b"2"))
    assert artifacts.get("datasets/a").digest == digest


def test_of_two_that_publish_at_once_one_wins_and_nothing_is_left_over(
    artifacts: Artifacts, store: Store, tmp_path: Path
) -> None:
    folders = [folder_of(tmp_path / str(n), a=bytes([n])) for n in range(6)]

    def attempt(folder: Path) -> str | None:
        try:
            return publish(artifacts, folder)
        except AlreadyExists:
            return None

    with ThreadPoolExecutor(6) as pool:
        told = [digest for digest in pool.map(attempt, folders) if digest]
    assert told == [artifacts.get("datasets/a").digest]
    assert len(list(store.list_keys("datasets/a/"))) == 2  # the manifest and its one file


def test_the_first_of_two_attempts_of_one_job_wins(artifacts: Artifacts, tmp_path: Path) -> None:
    first = publish(artifacts, folder_of(tmp_path / "in", a=b"1"), digest="same spec and inputs")
    assert publish(artifacts, folder_of(tmp_path / "again", a=b"2"), digest="same spec and inputs") == first


def test_a_broken_download_goes_on_where_it_stopped(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(artifacts, folder_of(tmp_path / "in", big=os.urandom(5 * transfer.PART)))
    fetch_part = transfer._fetch_part
    fetched: list[int] = []

    def flaky(store: Store, address: str, key: str, out: int, part: int, size: int, on_bytes: transfer.OnBytes) -> None:
        if part == 3 and not fetched.count(3):
            fetched.append(3)
            raise Unavailable("the network went away")
        fetched.append(part)
        fetch_part(store, address, key, out, part, size, on_bytes)

    monkeypatch.setattr(transfer, "_fetch_part", flaky)
    with pytest.raises(Unavailable):
        artifacts.fetch("datasets/a", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    leave_free(monkeypatch, 2 * transfer.PART)  # no room for all of it once more
    artifacts.fetch("datasets/a", tmp_path / "out")
    assert fetched.count(0) == fetched.count(1) == fetched.count(2) == 1
    assert (tmp_path / "out/big").read_bytes() == (tmp_path / "in/big").read_bytes()


def test_a_small_download_that_broke_off_goes_on(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(artifacts, folder_of(tmp_path / "in", a=b"all of it"))
    with monkeypatch.context() as broken, pytest.raises(Unavailable):
        broken.setattr(transfer, "_fetch_part", refuse)
        artifacts.fetch("datasets/a", tmp_path / "out")
    artifacts.fetch("datasets/a", tmp_path / "out")
    assert (tmp_path / "out/a").read_bytes() == b"all of it"


def test_what_is_there_of_another_artifact_is_no_beginning_of_this_one(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(artifacts, folder_of(tmp_path / "in", a=b"one", b=b"1"))
    publish(artifacts, folder_of(tmp_path / "other", b=b"two"), "datasets/b")
    fetch_part = transfer._fetch_part
    with monkeypatch.context() as broken, pytest.raises(Unavailable):
        broken.setattr(
            transfer,
            "_fetch_part",
            lambda s, at, key, *rest: (refuse if key.endswith("/b") else fetch_part)(s, at, key, *rest),
        )
        artifacts.fetch("datasets/a", tmp_path / "out")
    artifacts.fetch("datasets/b", tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == {"b": b"two"}


class Downloads:
    """A client's artifacts, with addresses of a real store."""

    def __init__(self, artifacts: Artifacts) -> None:
        self.artifacts = artifacts

    def begin_download(self, name: str) -> artifact_pb2.Download:
        manifest = self.artifacts.get(name)
        addresses = {
            f.path: self.artifacts.store.presign("GET", f"{name}/{manifest.attempt}/{f.path}") for f in manifest.files
        }
        return artifact_pb2.Download(artifact=artifact_message(manifest), addresses=addresses)


def client_of(artifacts: Artifacts) -> Any:
    return type("Client", (), {"artifacts": Downloads(artifacts)})()


def pull_a_part(artifacts: Artifacts, name: str, folder: Path) -> None:
    def interrupt(count: int) -> None:
        if count >= CHUNK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(client_of(artifacts), name, folder, interrupt)


def test_a_broken_pull_goes_on_where_there_is_room_for_the_rest(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = os.urandom(3 * CHUNK)
    publish(artifacts, folder_of(tmp_path / "in", big=big))
    pull_a_part(artifacts, "datasets/a", tmp_path / "out")
    leave_free(monkeypatch, 2 * CHUNK)
    told: list[int] = []
    pull(client_of(artifacts), "datasets/a", tmp_path / "out", told.append)
    assert told[0] == CHUNK and sum(told) == len(big)
    assert (tmp_path / "out/big").read_bytes() == big
    with pytest.raises(ApiError, match="needs 3 MB, but only 2 MB are free"):
        pull(client_of(artifacts), "datasets/a", tmp_path / "again")


def test_a_broken_pull_of_another_artifact_leaves_nothing_in_this_one_s_folder(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    publish(artifacts, folder_of(tmp_path / "in", a=b"1", big=os.urandom(2 * CHUNK)))
    publish(artifacts, folder_of(tmp_path / "other", big=b"two"), "datasets/b")
    target = tmp_path / "pulled/out"
    pull_a_part(artifacts, "datasets/a", target)
    pull_a_part(artifacts, "datasets/a", target.with_name("out-2"))
    pull(client_of(artifacts), "datasets/b", target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == {"big": b"two"}
    assert [f.name[:7] for f in sorted(target.parent.iterdir())] == [".out-2.", "out"], "another folder's goes on"


def leave_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def refuse(*_: object) -> None:
    raise Unavailable("the network went away")


@pytest.mark.parametrize("lost", ["the answer", "the connection"])
def test_a_manifest_that_is_written_though_its_answer_was_lost_keeps_its_files(
    artifacts: Artifacts, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    put_json = store.put_json

    def put(key: str, value: Any, *, only_if_absent: bool = False) -> bool:
        put_json(key, value, only_if_absent=only_if_absent)
        if lost == "the connection":
            raise Unavailable("the network went away")
        return False  # a server that failed has written it all the same, and the second try met it

    monkeypatch.setattr(store, "put_json", put)
    draft = RemoteDraft(store, artifacts, "datasets/a", "dataset")
    with contextlib.suppress(Unavailable), draft:
        draft.write("train.jsonl", 3, iter([b"{}\n"]))
        draft.seal({}, {})
    assert artifacts.read(artifacts.get("datasets/a"), "train.jsonl") == b"{}\n"


def test_changed_bytes_are_noticed(artifacts: Artifacts, store: Store, tmp_path: Path) -> None:
    publish(artifacts, folder_of(tmp_path / "in", a=b"right"))
    key = next(k for k in store.list_keys("datasets/a/") if k.endswith("/a"))
    store.put_bytes(key, b"wrong")
    with pytest.raises(DataLoss, match="not what its manifest says"):
        artifacts.fetch("datasets/a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_manifest_is_noticed(artifacts: Artifacts, store: Store, tmp_path: Path) -> None:
    publish(artifacts, folder_of(tmp_path / "in", a=b"right"))
    manifest = store.get_json("datasets/a/manifest.json")
    assert manifest is not None
    manifest["files"][0]["size"] = 99
    store.put_json("datasets/a/manifest.json", manifest)
    with pytest.raises(DataLoss, match="was changed"):
        artifacts.get("datasets/a")


def test_the_cache_fetches_once(artifacts: Artifacts, store: Store, tmp_path: Path) -> None:
    digest = publish(artifacts, folder_of(tmp_path / "in", a=b"1"))
    folder = artifacts.cached("datasets/a", digest)
    for key in store.list_keys("datasets/a/"):
        if key.endswith("/a"):
            store.delete(key)
    assert artifacts.cached("datasets/a") == folder
    with pytest.raises(DataLoss, match="has changed"):
        artifacts.cached("datasets/a", "0" * 64)


def test_lineage_goes_back_to_the_rows(artifacts: Artifacts, tmp_path: Path) -> None:
    rows = artifacts.publish(folder_of(tmp_path / "rows", a_jsonl=b"{}"), "datasets/rows", "rows")
    data = artifacts.publish(
        folder_of(tmp_path / "data", b_jsonl=b"{}"), "datasets/data", "dataset",
        {"inputs": [{"name": rows.name, "digest": rows.digest}]},
    )  # fmt: skip
    assert [m.name for m in artifacts.lineage("datasets/data")] == ["datasets/data", "datasets/rows"]
    artifacts.delete("datasets/rows")
    assert artifacts.lineage("datasets/data") == [data]


def test_what_may_not_be_published(artifacts: Artifacts, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidData, match="no files"):
        artifacts.publish(tmp_path / "empty", "datasets/a", "dataset")
    with pytest.raises(InvalidData, match=r"pickled weights \(pytorch_model\.bin\)"):
        folder = folder_of(tmp_path / "m", model_safetensors=b"x", config_json=b"{}")
        (folder / "pytorch_model.bin").write_bytes(b"x")
        artifacts.publish(folder, "models/a", "model")
    with pytest.raises(InvalidData, match=r"no \.safetensors"):
        artifacts.publish(folder_of(tmp_path / "n", config_json=b"{}"), "models/a", "model")
    with pytest.raises(InvalidSpec):
        artifacts.publish(folder_of(tmp_path / "o", a=b"x"), "datasets/../a", "dataset")
    with pytest.raises(NotFound):
        artifacts.get("datasets/nothing")


def test_pages(artifacts: Artifacts, tmp_path: Path) -> None:
    for number in range(5):
        publish(artifacts, folder_of(tmp_path / str(number), a=bytes([number])), f"datasets/d{number}")
    first, token = artifacts.list("datasets", 3)
    rest, end = artifacts.list("datasets", 3, token)
    assert [m.name for m in first + rest] == [f"datasets/d{n}" for n in range(5)]
    assert end == ""


def test_a_store_that_is_down(object_store: StoreConfig) -> None:
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9 "):
        open_store(object_store.model_copy(update={"endpoint": "http://127.0.0.1:9"}))


def test_a_wrong_key(object_store: StoreConfig) -> None:
    wrong = object_store.model_copy(update={"access_key": "nobody"})
    with pytest.raises(PermissionDenied, match="refuses the key 'nobody'"):
        open_store(wrong)


class Agent(BaseHTTPRequestHandler):
    """Gives keys like the agent of EKS Pod Identity."""

    def do_GET(self) -> None:
        server: Any = self.server
        allowed = self.headers["Authorization"] == "Bearer pod" and server.keys
        self.send_response(200 if allowed else 403)
        self.end_headers()
        self.wfile.write(json.dumps(server.keys).encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_a_workload_without_a_key_has_those_of_its_own_identity(
    object_store: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("Bearer pod")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "token"))
    agent: Any = ThreadingHTTPServer(("127.0.0.1", 0), Agent)
    agent.keys = {
        "AccessKeyId": object_store.access_key, "SecretAccessKey": object_store.secret_key.get_secret_value(),
        "Token": None, "Expiration": "2040-01-01T00:00:00Z",
    }  # fmt: skip
    keyless = object_store.model_copy(update={"access_key": "", "secret_key": SecretStr("")})
    with serving(agent):
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{agent.server_port}/v1/credentials")
        store = open_store(keyless)
        assert store.put_json("identity/a.json", {"n": 1}, only_if_absent=True)  # signed by presign()
        assert store.get_json("identity/a.json") == {"n": 1}
        store.delete("identity/a.json")
        agent.keys = {}
        with pytest.raises(PermissionDenied, match=r"own identity gives no key .*403"):
            open_store(keyless)
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "absent"))
    with pytest.raises(PermissionDenied, match="absent"):
        open_store(keyless)


def test_an_endpoint_that_is_none(object_store: StoreConfig) -> None:
    with pytest.raises(InvalidSpec, match="http://host:port"):
        open_store(object_store.model_copy(update={"endpoint": "minio:9000"}))


def test_conditional_put(store: Store) -> None:
    key = f"x/{secrets.token_hex(4)}.json"
    assert store.put_json(key, {"n": 1}, only_if_absent=True)
    assert not store.put_json(key, {"n": 2}, only_if_absent=True)
    assert json.loads(store.get_bytes(key)) == {"n": 1}
