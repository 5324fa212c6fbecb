"""What `helm test` says: of a whole installation on loopback, and of each thing that can be wrong with one."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from fabrictune.v1 import training_pb2, training_pb2_grpc
from services.common.auth import Authenticator, read_tokens
from services.common.config import ServerConfig, StoreConfig
from services.common.hooks.certificates import issue
from services.common.hooks.selfcheck import Finding, examine
from services.common.server import Server, service
from services.common.store import Store
from services.inference.gateway import Gateway
from services.inference.routes import RouteTable

ROOT = Path(__file__).resolve().parents[2]
Environment = dict[str, str]


class Training(training_pb2_grpc.TrainingServiceServicer):
    """Has no jobs."""

    async def ListTrainingJobs(
        self, request: training_pb2.ListTrainingJobsRequest, context: Any
    ) -> training_pb2.ListTrainingJobsResponse:
        return training_pb2.ListTrainingJobsResponse()


def write_certificate(folder: Path, names: list[str], now: datetime) -> None:
    issued = issue(names, now)
    for name, data in (("ca.crt", issued.authority), ("tls.crt", issued.certificate), ("tls.key", issued.key)):
        (folder / name).write_bytes(data)


@pytest.fixture
async def installed(tmp_path: Path, store: Store, object_store: StoreConfig) -> AsyncIterator[Environment]:
    """A training server and a gateway with TLS and tokens, a store, and the environment of a pipeline server."""
    write_certificate(tmp_path, ["127.0.0.1", "localhost"], datetime.now(UTC))
    entry = {"name": "services", "role": "operator", "sha256": hashlib.sha256(b"sesame").hexdigest()}
    (tmp_path / "tokens.yaml").write_text(yaml.safe_dump([entry]))
    files = {"tls_certificate": tmp_path / "tls.crt", "tls_key": tmp_path / "tls.key"}
    config = ServerConfig.model_validate({"port": 0, "metrics_port": 0, "drain_seconds": 0, **files})
    async with AsyncExitStack() as stack:
        offered = service(Training(), training_pb2_grpc.add_TrainingServiceServicer_to_server)
        server = Server([offered], config, Authenticator(read_tokens(tmp_path / "tokens.yaml")))
        await server.start()
        stack.push_async_callback(server.close)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
        gateway = Gateway(RouteTable())
        port = await gateway.start("127.0.0.1", 0, context)
        stack.push_async_callback(gateway.close)
        yield {
            "FABRICTUNE_ENDPOINTS": json.dumps({"training": f"127.0.0.1:{server.port}"}),
            "FABRICTUNE_GATEWAY_URL": f"https://127.0.0.1:{port}",
            "FABRICTUNE_TLS_CERTIFICATE": str(tmp_path / "tls.crt"),
            "FABRICTUNE_TLS_KEY": str(tmp_path / "tls.key"),
            "FABRICTUNE_CA_FILE": str(tmp_path / "ca.crt"),
            "FABRICTUNE_TOKENS_FILE": str(tmp_path / "tokens.yaml"),
            "FABRICTUNE_TOKEN": "sesame",
            "FABRICTUNE_S3_ENDPOINT": object_store.endpoint,
            "FABRICTUNE_S3_BUCKET": store.bucket,
            "FABRICTUNE_S3_ACCESS_KEY": object_store.access_key,
            "FABRICTUNE_S3_SECRET_KEY": object_store.secret_key.get_secret_value(),
        }


async def look(monkeypatch: pytest.MonkeyPatch, environment: Environment) -> dict[str, Finding]:
    for name in [n for n in os.environ if n.startswith("FABRICTUNE_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return {f.what: f for f in await asyncio.to_thread(lambda: list(examine()))}


async def test_a_sound_installation_ends_with_zero_and_a_line_for_each_thing(installed: Environment) -> None:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("FABRICTUNE_")}
    argv, env = (
        [sys.executable, "-m", "services.common.hooks.selfcheck"],
        {**plain, **installed, "PYTHONPATH": str(ROOT)},
    )
    done = await asyncio.to_thread(subprocess.run, argv, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    whats = [line.removeprefix("ok").strip().partition(":")[0] for line in lines]
    assert whats == ["store", "settings", "TLS", "tokens", "training answers", "training asks for a token", "gateway"]
    assert "sesame" not in done.stdout


async def test_it_leaves_nothing_in_the_store(
    installed: Environment, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    assert (await look(monkeypatch, installed))["store"].fine
    assert list(store.list_keys("")) == []


def without_names(installed: Environment, folder: Path) -> None:
    write_certificate(folder, ["elsewhere"], datetime.now(UTC))


def expired(installed: Environment, folder: Path) -> None:
    write_certificate(folder, ["127.0.0.1"], datetime.now(UTC) - timedelta(days=3651))


def mixed_up(installed: Environment, folder: Path) -> None:
    (folder / "tls.key").write_bytes(issue(["x"], datetime.now(UTC)).key)


@pytest.mark.parametrize(
    ("what", "settings", "said"),
    [
        ("store", {"FABRICTUNE_S3_SECRET_KEY": "wrong"}, "refuses the key"),
        ("store", {"FABRICTUNE_S3_ENDPOINT": "http://127.0.0.1:9"}, "FABRICTUNE_S3_ENDPOINT names it"),
        ("store", {"FABRICTUNE_S3_ENDPOINT": "minio:9000"}, "must look like http://host:port"),
        ("TLS", {"FABRICTUNE_TLS_KEY": "/nowhere/tls.key"}, "the TLS Secret must hold"),
        ("TLS", without_names, "does not hold 127.0.0.1"),
        ("TLS", expired, "has expired"),
        ("TLS", mixed_up, "cannot be used"),
        ("tokens", {"FABRICTUNE_TOKENS_FILE": "/nowhere/tokens.yaml"}, "cannot be read"),
        ("training answers", {"FABRICTUNE_ENDPOINTS": '{"training": "127.0.0.1:9"}'}, "is its pod running"),
        (
            "training answers",
            {"FABRICTUNE_CA_FILE": "/nowhere/ca.crt"},
            "FABRICTUNE_CA_FILE /nowhere/ca.crt cannot be read",
        ),
        ("training asks for a token", {"FABRICTUNE_TOKEN": "wrong"}, "is refused with UNAUTHENTICATED"),
        ("gateway", {"FABRICTUNE_GATEWAY_URL": "https://127.0.0.1:9"}, "is the inference service's pod running"),
        ("gateway", {"FABRICTUNE_GATEWAY_URL": ""}, "FABRICTUNE_GATEWAY_URL is not set"),
        ("settings", {"FABRICTUNE_PORT": "many"}, "FABRICTUNE_PORT"),
    ],
)
async def test_what_is_wrong_is_named_and_the_store_is_looked_at_all_the_same(
    installed: Environment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    settings: Environment | Callable[[Environment, Path], None],
    said: str,
) -> None:
    if callable(settings):
        settings(installed, tmp_path)
        settings = {}
    found = await look(monkeypatch, installed | settings)
    assert not found[what].fine
    assert said in found[what].text
    assert "\n" not in str(found[what])
    assert what == "store" or found["store"].fine


async def test_a_server_that_asks_nobody_is_named(installed: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    offered = service(Training(), training_pb2_grpc.add_TrainingServiceServicer_to_server)
    files = {"tls_certificate": installed["FABRICTUNE_TLS_CERTIFICATE"], "tls_key": installed["FABRICTUNE_TLS_KEY"]}
    config = ServerConfig.model_validate({"port": 0, "metrics_port": 0, "drain_seconds": 0, **files})
    server = Server([offered], config, None)
    await server.start()
    try:
        endpoints = {"FABRICTUNE_ENDPOINTS": json.dumps({"training": f"127.0.0.1:{server.port}"})}
        found = (await look(monkeypatch, installed | endpoints))["training asks for a token"]
        assert not found.fine
        assert "without a token is answered with OK" in found.text
    finally:
        await server.close()
