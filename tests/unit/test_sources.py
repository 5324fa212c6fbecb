"""Rows from elsewhere: fetched whole, gone on with after a break, or refused with what is wrong. Real servers on loopback."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fabrictune import row_files
from fabrictune.errors import ApiError
from fabrictune.rows import push_rows
from fabrictune.sources import ALIASES, find_rows, public_uri, resolve_alias
from services.common.hooks.certificates import issue
from services.conversion import sources as conversion_sources
from tests.conftest import ROOT, serving

ROW = b'{"conversations": []}\n'
ROWS = ROW * 20_000


class Shop:
    """What a server offers, and what it was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.kinds: dict[str, str] = {}
        self.moved: dict[str, str] = {}
        self.drops: list[int] = []
        """The next answers break off after so many bytes."""
        self.etags = True
        self.asked: list[dict[str, str]] = []
        self.address = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shop: ClassVar[Shop]

    def do_GET(self) -> None:
        shop, path = self.shop, self.path.partition("?")[0]
        headers = {k.lower(): v for k, v in self.headers.items()}
        shop.asked.append(headers)
        if path in shop.moved:
            return self._say(302, {"location": shop.moved[path]}, b"")
        if path not in shop.files:
            return self._say(404, {}, b"no")
        data = shop.files[path]
        etag = f'"{hashlib.sha256(data).hexdigest()}"' if shop.etags else ""
        told = {"content-type": shop.kinds.get(path, "application/jsonl"), **({"etag": etag} if etag else {})}
        if etag and headers.get("if-none-match") == etag:
            return self._say(304, told, b"")
        begin = 0
        if "range" in headers and headers.get("if-range", etag) == etag:
            begin = int(headers["range"].removeprefix("bytes=").rstrip("-"))
            told["content-range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self._say(206 if begin else 200, told, data[begin:])

    def _say(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.shop.drops and body:
            self.wfile.write(body[: self.shop.drops.pop(0)])
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Quiet(ThreadingHTTPServer):
    """Says nothing of clients that go away."""

    def handle_error(self, *_: Any) -> None:
        """Expected."""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setenv("FABRICTUNE_DATA_DIR", str(tmp_path / "data"))
    shop = Shop()
    server = Quiet(("127.0.0.1", 0), type("Bound", (Handler,), {"shop": shop}))
    shop.address = f"http://127.0.0.1:{server.server_address[1]}"
    with serving(server):
        yield shop


def test_a_file_comes_whole_and_says_how_far_it_is(shop: Shop) -> None:
    shop.files["/rows.jsonl"] = ROWS
    steps: list[tuple[int, int | None]] = []
    found = find_rows(f"{shop.address}/rows.jsonl?signature=secret", on_progress=lambda *step: steps.append(step))
    assert found.path.read_bytes() == ROWS
    assert found.path.name == "rows.jsonl"
    assert found.origin == f"{shop.address}/rows.jsonl"
    assert steps[0] == (0, len(ROWS))
    assert steps[-1] == (len(ROWS), len(ROWS))


def test_a_download_that_breaks_off_goes_on_where_it_stopped(shop: Shop) -> None:
    shop.files["/rows.jsonl"] = ROWS
    shop.drops = [100_000, 50_000]
    assert find_rows(f"{shop.address}/rows.jsonl").path.read_bytes() == ROWS
    assert [a.get("range") for a in shop.asked] == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_run_goes_on_too(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fabrictune.download.PAUSES", (0.0,))
    shop.files["/rows.jsonl"] = ROWS
    shop.drops = [100_000, 0, 0]
    with pytest.raises(ApiError, match=r"broke off .*run it again to go on") as broken:
        find_rows(f"{shop.address}/rows.jsonl")
    assert broken.value.code == "UNAVAILABLE"
    assert find_rows(f"{shop.address}/rows.jsonl").path.read_bytes() == ROWS
    assert shop.asked[-1]["range"] == "bytes=100000-"


def test_what_has_changed_in_between_begins_anew(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fabrictune.download.PAUSES", (0.0,))
    shop.files["/rows.jsonl"] = ROWS
    shop.drops = [100_000, 0, 0]
    with pytest.raises(ApiError):
        find_rows(f"{shop.address}/rows.jsonl")
    shop.files["/rows.jsonl"] = other = b'{"messages": []}\n' * 20_000
    assert find_rows(f"{shop.address}/rows.jsonl").path.read_bytes() == other


def test_without_an_etag_a_broken_download_begins_anew(shop: Shop) -> None:
    shop.etags, shop.files["/rows.jsonl"], shop.drops = False, ROWS, [100_000]
    assert find_rows(f"{shop.address}/rows.jsonl").path.read_bytes() == ROWS
    assert "range" not in shop.asked[-1]


def test_a_file_is_fetched_again_only_when_it_has_changed(shop: Shop) -> None:
    shop.files["/rows.jsonl"] = ROWS
    for _ in range(2):
        find_rows(f"{shop.address}/rows.jsonl")
    assert "if-none-match" in shop.asked[1]
    shop.files["/rows.jsonl"] = ROW
    assert find_rows(f"{shop.address}/rows.jsonl").path.read_bytes() == ROW


def test_packed_rows_stay_packed(shop: Shop) -> None:
    shop.files["/rows.jsonl.gz"] = gzip.compress(ROWS, mtime=0)
    assert find_rows(f"{shop.address}/rows.jsonl.gz").path.read_bytes() == shop.files["/rows.jsonl.gz"]


def test_json_lines_under_another_name_become_jsonl(shop: Shop) -> None:
    shop.files["/rows.json"] = ROWS
    assert find_rows(f"{shop.address}/rows.json").path.name == "rows.jsonl"


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("rows.jsonl", b"<!doctype html><p>Sign in", "it is an HTML page"),
        ("rows.jsonl", b"", "it is empty"),
        ("rows.json", b'[{"a": 1},\n{"a": 2}]', "jq -c '.[]'"),
        ("rows.json", b'[{"a": 1}, {"a": 2}]\n', "jq -c '.[]'"),
        ("rows.json", b'{\n "a": 1\n}', "one JSON object over several lines"),
        ("rows.jsonl", b"id,text\n1,a\n", 'it begins with "id,text'),
        ("rows.jsonl", gzip.compress(ROWS, mtime=0), "it is gzip data"),
        ("rows.jsonl.gz", ROWS, "is no .gz file"),
        ("rows.jsonl.gz", gzip.compress(b"<html>", mtime=0), "is not JSON lines"),
        ("rows.jsonl.gz", gzip.compress(ROWS, mtime=0)[:9], "cannot be unpacked"),
        ("rows.jsonl.zst", ROWS, "is no .zst file"),
        ("rows.parquet", b"<html>", "is no .parquet file; it is an HTML page"),
    ],
)
def test_what_is_no_rows_file_is_refused_and_not_kept(shop: Shop, name: str, data: bytes, said: str) -> None:
    shop.files[f"/{name}"] = data
    with pytest.raises(ApiError) as refused:
        find_rows(f"{shop.address}/{name}")
    assert said in str(refused.value)
    assert shop.address in str(refused.value)
    shop.files[f"/{name}"] = {"gz": gzip.compress(ROW, mtime=0), "zst": b"\x28\xb5\x2f\xfd", "parquet": b"PAR1"}.get(
        name.rpartition(".")[2], ROW
    )
    assert find_rows(f"{shop.address}/{name}").path.read_bytes() == shop.files[f"/{name}"]


def test_one_broken_row_at_the_beginning_is_the_conversions_to_refuse(shop: Shop) -> None:
    for number, first in enumerate((b"null", b'["a"]', b"{", b"oops")):
        shop.files[f"/{number}.jsonl"] = first + b"\n" + ROW
        assert find_rows(f"{shop.address}/{number}.jsonl").path.exists()


def test_an_html_page_is_refused_by_its_kind_before_it_comes(shop: Shop) -> None:
    shop.files["/rows.jsonl"], shop.kinds["/rows.jsonl"] = ROWS, "text/html; charset=utf-8"
    with pytest.raises(ApiError, match="is an HTML page, not rows"):
        find_rows(f"{shop.address}/rows.jsonl")


def test_a_file_that_is_not_there(shop: Shop) -> None:
    with pytest.raises(ApiError, match=r"/rows\.jsonl: there is no such file \(HTTP 404 Not Found\)") as refused:
        find_rows(f"{shop.address}/rows.jsonl")
    assert refused.value.code == "NOT_FOUND"


def test_a_file_over_the_limit_is_refused_before_it_comes(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABRICTUNE_MAX_SOURCE_BYTES", "1000")
    shop.files["/rows.jsonl"] = ROWS
    with pytest.raises(ApiError, match="larger than 1000 bytes; FABRICTUNE_MAX_SOURCE_BYTES") as refused:
        find_rows(f"{shop.address}/rows.jsonl")
    assert refused.value.code == "RESOURCE_EXHAUSTED"
    monkeypatch.setenv("FABRICTUNE_MAX_SOURCE_BYTES", "20 GB")
    with pytest.raises(ApiError, match="must be a number of bytes"):
        find_rows(f"{shop.address}/rows.jsonl")


def test_redirects_are_followed_but_not_for_ever(shop: Shop) -> None:
    shop.files["/b.jsonl"], shop.moved["/a.jsonl"], shop.moved["/loop.jsonl"] = ROW, "/b.jsonl", "/loop.jsonl"
    assert find_rows(f"{shop.address}/a.jsonl").path.read_bytes() == ROW
    with pytest.raises(ApiError, match="leads on more than 5 times"):
        find_rows(f"{shop.address}/loop.jsonl")


def test_a_server_that_is_not_there(shop: Shop) -> None:
    with pytest.raises(ApiError, match=r"127\.0\.0\.1 cannot be reached .*online") as refused:
        find_rows("http://127.0.0.1:9/rows.jsonl")
    assert refused.value.code == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://example.org/rows.jsonl", "rows come by https"),
        ("https://ann:secret@example.org/rows.jsonl", "has a user name or password in it"),
        ("https://example.org/page", "must end in one of .jsonl"),
        ("ftp://example.org/rows.jsonl", "is no source of rows: give a path"),
        ("gs://bucket/rows", "is no source of rows: give a path"),
        ("hf:only-a-name", "must look like hf:ORG/NAME"),
        ("hf://org/name", "must look like hf:ORG/NAME"),
    ],
)
def test_addresses_that_are_refused(uri: str, said: str) -> None:
    with pytest.raises(ApiError) as refused:
        find_rows(uri)
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)


def test_tls_is_checked_and_is_not_left_again(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    issued = issue(["127.0.0.1", "localhost"], datetime.now(UTC))
    (tmp_path / "ca.crt").write_bytes(issued.authority)
    (tmp_path / "tls.pem").write_bytes(issued.certificate + issued.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.pem")
    server = Quiet(("127.0.0.1", 0), type("Secure", (Handler,), {"shop": shop}))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    address = f"https://localhost:{server.server_address[1]}"
    shop.files["/rows.jsonl"] = ROW
    shop.moved["/down.jsonl"] = f"{shop.address}/rows.jsonl"
    with serving(server):
        with pytest.raises(ApiError, match=r"localhost is not trusted .*SSL_CERT_FILE") as refused:
            find_rows(f"{address}/rows.jsonl")
        assert refused.value.code == "FAILED_PRECONDITION"
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.crt"))
        assert find_rows(f"{address}/rows.jsonl").path.read_bytes() == ROW
        with pytest.raises(ApiError, match="which is not https"):
            find_rows(f"{address}/down.jsonl")


def test_a_signed_address_is_written_down_without_its_signature() -> None:
    assert public_uri("https://host/rows.jsonl?X-Amz-Signature=abc#x") == "https://host/rows.jsonl"
    assert public_uri("data/rows.jsonl") == "data/rows.jsonl"


def test_the_recipes_names_are_sources() -> None:
    assert set(ALIASES) == {
        "ms-agent", "ms-agent-for-agentfabric-default", "ms-agent-for-agentfabric-addition", "ms-bench",
    }  # fmt: skip
    assert resolve_alias({"uri": "ms-agent"}) == {"uri": "ms:iic/ms_agent", "format": "ms_agent", "layout": "both"}
    addition = resolve_alias({"uri": "ms-agent-for-agentfabric-addition", "layout": "inline", "count": 9})
    assert addition == {
        "uri": "ms:AI-ModelScope/ms_agent_for_agentfabric:addition", "format": "agentfabric", "layout": "inline",
        "count": 9,
    }  # fmt: skip
    assert resolve_alias({"uri": "./ms-agent"}) == {"uri": "./ms-agent"}


def test_a_missing_path_says_what_else_there_is(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match=r"no rows at .*ms_agent: give a path.*ms-agent, ") as refused:
        find_rows("ms_agent", tmp_path)
    assert refused.value.code == "NOT_FOUND"


def test_fetched_rows_are_pushed_under_a_name_made_from_their_content(shop: Shop) -> None:
    shop.files["/Train.set.jsonl"] = ROW
    pushed: list[tuple[Any, ...]] = []
    client: Any = None
    uri = f"{shop.address}/Train.set.jsonl?token=secret"
    name = push_rows(client, uri, lambda *a: pushed.append(a))
    assert name.startswith("datasets/rows-train-")
    assert push_rows(client, uri, lambda *a: None) == name
    files, metadata = pushed[0][1], pushed[0][4]
    assert {place: file.read_bytes() for place, file in files.items()} == {"Train.set.jsonl": ROW}
    assert metadata == {"description": "raw rows: Train.set", "source": f"{shop.address}/Train.set.jsonl"}
    assert push_rows(client, "datasets/d1", lambda *a: pushed.append(a)) == "datasets/d1"
    assert len(pushed) == 1


def test_of_a_folder_only_the_rows_are_pushed_and_their_places_are_part_of_the_name(tmp_path: Path) -> None:
    for place in ("rows.jsonl", "a/rows.jsonl", ".env", "notes.md", ".git/rows.jsonl", "a/.rows.jsonl"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(ROW)
    client: Any = None
    pushed: list[list[str]] = []
    named = [push_rows(client, str(tmp_path), lambda *a: pushed.append(list(a[1])))]
    (tmp_path / "a").rename(tmp_path / "b")
    named.append(push_rows(client, str(tmp_path), lambda *a: pushed.append(list(a[1]))))
    assert pushed == [["a/rows.jsonl", "rows.jsonl"], ["b/rows.jsonl", "rows.jsonl"]]
    assert named[0] != named[1]
    assert [file.name for file in conversion_sources.find_files(tmp_path, "")] == ["rows.jsonl"] * 2
    (tmp_path / "bare").mkdir()
    with pytest.raises(ApiError, match=r"bare has no rows files; they end in \.jsonl"):
        push_rows(client, str(tmp_path / "bare"), lambda *a: None)


def convert(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("FABRICTUNE_")}
    argv = [sys.executable, "-m", "fabrictune", "convert", *arguments]
    return subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120)


def test_an_address_is_converted_without_a_server(shop: Shop, tmp_path: Path) -> None:
    shop.files["/train.jsonl"] = (ROOT / "examples/data/train.jsonl").read_bytes()
    done = convert(tmp_path, f"{shop.address}/train.jsonl?signature=secret", "--output", "out", "--format", "ms_agent")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["rows_converted"] > 100
    assert report["spec"]["sources"][0]["uri"] == f"{shop.address}/train.jsonl"


def test_sources_of_a_spec_have_options_of_their_own_and_paths_beside_it(tmp_path: Path) -> None:
    (tmp_path / "specs").mkdir()
    shutil.copy(ROOT / "examples/data/train.jsonl", tmp_path / "specs/rows.jsonl")
    spec = tmp_path / "specs/spec.yaml"
    spec.write_text("sources:\n- {uri: rows.jsonl, layout: inline, split: train}\n")
    done = convert(tmp_path, "--spec", str(spec), "--output", "out")
    assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "out/report.json").read_text())["layouts"]) == {"inline"}
    spec.write_text("seed: 1\n")
    done = convert(tmp_path, "--spec", str(spec), "--output", "out2")
    assert done.returncode == 64
    assert "name the rows to convert" in done.stderr


def test_an_artifact_needs_a_server(tmp_path: Path) -> None:
    done = convert(tmp_path, "datasets/d1", "--output", "out")
    assert done.returncode == 64
    assert "`fabrictune artifacts pull datasets/d1 FOLDER` first" in done.stderr


def test_the_client_takes_for_rows_files_what_the_conversion_reads() -> None:
    assert set(row_files.SUFFIXES) == set(conversion_sources.SUFFIXES)
