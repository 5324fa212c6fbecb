"""`fabrictune connect` with a small `kubectl` that shows a release and forwards ports, and with real servers behind it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import minio
import psutil
import pytest

from fabrictune.connection import find_endpoint, read_connection, start_ticks
from fabrictune.errors import ApiError
from fabrictune.kubectl import read_release
from fabrictune.transfer import open_http, push
from fabrictune.v1 import artifact_pb2, artifact_pb2_grpc
from services.common.auth import Authenticator, TokenEntry
from services.common.config import ServerConfig, StoreConfig
from services.common.hooks.certificates import issue
from services.common.server import Server, service
from services.common.store import Store
from tests.conftest import serving

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "ft_sesame"
KUBECTL = f"""#!{sys.executable} -S
import json, os, pathlib, socket, sys, threading
here = pathlib.Path(__file__).parent
words = [w for w in sys.argv[1:] if not w.startswith("--")]
def fail(text):
    sys.exit(text)
if words[:2] == ["get", "deployments,services"]:
    print((here / "list.json").read_text())
elif words[:2] == ["get", "secret"]:
    file = here / f"secret-{{words[2]}}.json"
    print(file.read_text()) if file.exists() else fail(f'Error from server (NotFound): secrets "{{words[2]}}" not found')
elif words[0] == "port-forward":
    name = words[1].removeprefix("service/")
    target = json.loads((here / "ports.json").read_text()).get(name)
    if not target:
        fail("error: unable to forward port because pod is not running. Current status=Pending")
    (here / f"pid-{{name}}").write_text(str(os.getpid()))
    local, remote = map(int, words[2].split(":"))
    def pump(a, b):
        try:
            while data := a.recv(65536):
                b.sendall(data)
        except OSError:
            pass
        for end in (a, b):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
    with socket.create_server(("127.0.0.1", local)) as server:
        print(f"Forwarding from 127.0.0.1:{{local}} -> {{remote}}", flush=True)
        while True:
            client, _ = server.accept()
            print(f"Handling connection for {{local}}", flush=True)
            behind = socket.create_connection(("127.0.0.1", target))
            for pair in ((client, behind), (behind, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()
"""


class Cluster:
    """What the small kubectl shows. Its folder is first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        (self.bin / "kubectl").write_text(KUBECTL)
        (self.bin / "kubectl").chmod(0o755)
        self.say_release()

    def say_release(self, *others: str, tls: bool = True, s3: str = "http://ft-store.ns.svc:9000") -> None:
        names = ["ft", *others]
        items = [deployment(name, tls, s3) for name in names]
        items += [named("Service", name + end, name, "x") for name in names for end in ("", "-inference", "-store")]
        (self.bin / "list.json").write_text(json.dumps({"items": items}))

    def say_secret(self, name: str, **data: bytes) -> None:
        encoded = {key.replace("_", "."): base64.b64encode(value).decode() for key, value in data.items()}
        (self.bin / f"secret-{name}.json").write_text(json.dumps({"data": encoded}))

    def say_ports(self, **ports: int) -> None:
        (self.bin / "ports.json").write_text(json.dumps({k.replace("_", "-"): v for k, v in ports.items()}))

    def forward_pid(self, service: str) -> int:
        return int((self.bin / f"pid-{service}").read_text())

    def env(self, **more: str) -> dict[str, str]:
        plain = {k: v for k, v in os.environ.items() if not k.startswith("FABRICTUNE_")}
        return plain | {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "200"} | more

    def call(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "fabrictune", *arguments]
        return subprocess.run(
            argv, cwd=self.folder, env=self.env(**more), capture_output=True, text=True, check=False, timeout=60
        )

    @contextlib.contextmanager
    def connect(self, *options: str) -> Iterator[Connect]:
        out, err = self.folder / "out.txt", self.folder / "err.txt"
        argv = [sys.executable, "-m", "fabrictune", "connect", *options]
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(argv, cwd=self.folder, env=self.env(), stdout=stdout, stderr=stderr)
            try:
                wait_for(lambda: "Ctrl-C ends it" in out.read_text() or process.poll() is not None, err)
                assert process.poll() is None, err.read_text()
                yield Connect(process, out, err, json.loads((self.folder / ".fabrictune/connection.json").read_text()))
            finally:
                if process.poll() is None:
                    process.terminate()
                process.wait(10)


class Connect:
    """A running `fabrictune connect`."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path, said: dict[str, Any]) -> None:
        self.process, self.out, self.err, self.said = process, out, err, said


def wait_for(condition: Any, why: Path | None = None) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, why.read_text() if why else "it did not come"
        time.sleep(0.05)


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def named(kind: str, name: str, instance: str, component: str) -> dict[str, Any]:
    labels = {"app.kubernetes.io/instance": instance, "app.kubernetes.io/component": component}
    return {"kind": kind, "metadata": {"name": name, "namespace": "ns", "labels": labels}}


def deployment(name: str, tls: bool = True, s3: str = "http://ft-store.ns.svc:9000") -> dict[str, Any]:
    """A pipeline server's, as the chart renders it, in short."""
    folder = "/etc/fabrictune"
    env = [
        {"name": "FABRICTUNE_S3_ENDPOINT", "value": s3},
        {"name": "FABRICTUNE_TOKENS_FILE", "value": f"{folder}/tokens/tokens.yaml"},
        {"name": "FABRICTUNE_TOKEN", "valueFrom": {"secretKeyRef": {"name": f"{name}-token-services", "key": "token"}}},
    ]
    mounts = [{"name": "tokens", "mountPath": f"{folder}/tokens"}]
    volumes = [{"name": "tokens", "secret": {"secretName": f"{name}-tokens"}}]
    if tls:
        env.append({"name": "FABRICTUNE_TLS_CERTIFICATE", "value": f"{folder}/tls/tls.crt"})
        mounts.append({"name": "tls", "mountPath": f"{folder}/tls"})
        volumes.append({"name": "tls", "secret": {"secretName": f"{name}-certificate"}})
    pod = {"containers": [{"name": "pipeline", "env": env, "volumeMounts": mounts}], "volumes": volumes}
    return named("Deployment", f"{name}-pipeline", name, "pipeline") | {"spec": {"template": {"spec": pod}}}


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """A release `ft` whose three Services are one port that answers nothing."""
    made = Cluster(tmp_path)
    made.say_secret("ft-certificate", ca_crt=b"authority")
    made.say_secret("ft-token-admin", token=TOKEN.encode())
    made.say_ports(ft=9, ft_inference=9, ft_store=9)
    return made


def test_a_release_is_read_from_its_pipeline_server() -> None:
    found = read_release(deployment("ft"), ["ft", "ft-inference", "ft-store"])
    assert (found.name, found.namespace, found.tls_secret) == ("ft", "ns", "ft-certificate")
    assert (found.store, found.store_host) == (("ft-store", 9000), "ft-store.ns.svc:9000")
    assert found.asks_for_tokens
    outside = read_release(deployment("ft", tls=False, s3="https://s3.example.com"), ["ft", "ft-inference"])
    assert (outside.tls_secret, outside.store) == ("", None)


def test_what_it_writes_is_for_this_user_only_and_no_token_is_printed(cluster: Cluster) -> None:
    with cluster.connect() as running:
        file = cluster.folder / ".fabrictune/connection.json"
        assert file.stat().st_mode & 0o777 == 0o600
        said = running.said
        assert said["token"] == TOKEN
        assert Path(said["ca_file"]).read_bytes() == b"authority"
        assert list(said["s3"]) == ["ft-store.ns.svc:9000"]
        text = running.out.read_text()
        assert TOKEN not in text
        assert "kubectl --namespace=ns get secret ft-token-admin -o jsonpath='{.data.token}' | base64 -d" in text
        assert f"--cacert {said['ca_file']}" in text
        assert f"https://{said['gateway'].removeprefix('https://')}/v1/models" in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_leaves_nothing_behind(cluster: Cluster, number: signal.Signals) -> None:
    with cluster.connect() as running:
        children = [cluster.forward_pid(name) for name in ("ft", "ft-inference", "ft-store")]
        running.process.send_signal(number)
        assert running.process.wait(10) == 0
    assert list((cluster.folder / ".fabrictune").iterdir()) == []
    assert not any(psutil.pid_exists(pid) for pid in children)


def test_a_port_forward_that_dies_is_started_again_on_the_same_port(cluster: Cluster) -> None:
    with cluster.connect() as running:
        first = cluster.forward_pid("ft")
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: "service/ft is forwarded again" in running.err.read_text(), running.err)
        assert cluster.forward_pid("ft") != first
        host, _, port = running.said["endpoint"].rpartition(":")
        socket.create_connection((host, int(port)), timeout=5).close()


def test_the_ports_can_be_chosen_and_a_store_outside_is_not_forwarded(cluster: Cluster) -> None:
    cluster.say_release(tls=False, s3="https://s3.example.com")
    grpc, http = unused_port(), unused_port()
    with cluster.connect("--port", str(grpc), "--gateway-port", str(http)) as running:
        assert (running.said["endpoint"], running.said["gateway"]) == (f"127.0.0.1:{grpc}", f"http://127.0.0.1:{http}")
        assert (running.said["s3"], running.said["ca_file"]) == ({}, "")


def test_a_second_one_in_the_same_folder_is_refused(cluster: Cluster) -> None:
    with cluster.connect():
        done = cluster.call("connect")
    assert done.returncode == 64
    assert "runs already in this folder" in done.stderr


def test_without_kubectl_it_says_where_to_get_it(cluster: Cluster) -> None:
    done = cluster.call("connect", PATH="/nowhere")
    assert done.returncode == 78
    assert "`kubectl` is not on PATH" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_releases_are_named(cluster: Cluster) -> None:
    cluster.say_release("ft2")
    done = cluster.call("connect")
    assert done.returncode == 66
    assert "there are ft, ft2; name one with --release" in done.stderr


def test_no_release_says_how_to_find_one(cluster: Cluster) -> None:
    (cluster.bin / "list.json").write_text('{"items": []}')
    done = cluster.call("connect")
    assert done.returncode == 66
    assert "kubectl get deployments -A -l app.kubernetes.io/component=pipeline" in done.stderr


def test_a_secret_that_is_missing_is_named(cluster: Cluster) -> None:
    done = cluster.call("connect", "--role", "viewer")
    assert done.returncode == 66
    assert 'secrets "ft-token-viewer" not found' in done.stderr
    assert "--token-secret" in done.stderr
    assert not (cluster.folder / ".fabrictune/connection.json").exists()


def test_a_pod_that_does_not_run_is_said_in_kubectls_words(cluster: Cluster) -> None:
    cluster.say_ports(ft=9)
    done = cluster.call("connect")
    assert done.returncode == 75
    assert "service/ft-inference cannot be forwarded" in done.stderr
    assert "Current status=Pending" in done.stderr
    assert not psutil.pid_exists(cluster.forward_pid("ft"))


class Artifacts(artifact_pb2_grpc.ArtifactServiceServicer):
    """A server behind the port-forward."""

    async def GetArtifact(self, request: artifact_pb2.GetArtifactRequest, context: Any) -> artifact_pb2.Artifact:
        return artifact_pb2.Artifact(name=request.name)


@pytest.fixture
async def server(tmp_path: Path, cluster: Cluster) -> AsyncIterator[Server]:
    """A real one with TLS and tokens, such as bootstrap makes them."""
    issued = issue(["ft.ns.svc", "localhost", "127.0.0.1"], datetime.now(UTC))
    (tmp_path / "tls.crt").write_bytes(issued.certificate)
    (tmp_path / "tls.key").write_bytes(issued.key)
    cluster.say_secret("ft-certificate", ca_crt=issued.authority)
    entry = TokenEntry(name="admin", role="admin", sha256=hashlib.sha256(TOKEN.encode()).hexdigest())
    files = {"tls_certificate": tmp_path / "tls.crt", "tls_key": tmp_path / "tls.key"}
    config = ServerConfig.model_validate({"port": 0, "metrics_port": 0, "drain_seconds": 0, **files})
    offered = service(Artifacts(), artifact_pb2_grpc.add_ArtifactServiceServicer_to_server)
    made = Server([offered], config, Authenticator([entry]))
    await made.start()
    cluster.say_ports(ft=made.port, ft_inference=9, ft_store=9)
    yield made
    await made.close()


@pytest.mark.slow
async def test_other_commands_in_the_folder_find_it_and_its_token_goes_nowhere_else(
    server: Server, cluster: Cluster
) -> None:
    def talk() -> None:
        get = ("artifacts", "get", "models/m", "--json")
        with cluster.connect() as running:
            done = cluster.call(*get)
            assert (done.returncode, json.loads(done.stdout or "{}")) == (0, {"name": "models/m"}), done.stderr
            elsewhere = {"FABRICTUNE_CA_FILE": running.said["ca_file"]}
            named = cluster.call("--endpoint", f"localhost:{server.port}", *get, **elsewhere)
            assert named.returncode == 77, named.stderr  # reached, without a token
        # Nothing is left that leads there; whatever else may listen where an endpoint is looked for, it has no such model.
        assert not (cluster.folder / ".fabrictune/connection.json").exists()
        assert cluster.call(*get).returncode in (66, 75)

    await asyncio.to_thread(talk)


class Bucket(ThreadingHTTPServer):
    """Answers every GET with the Host that it was asked for, and keeps what it is sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Echo)
        self.server_names: list[str | None] = []


class _Echo(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        text = self.headers["host"].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    server = Bucket()
    with serving(server):
        yield server


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FABRICTUNE_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("FABRICTUNE_ENDPOINT", raising=False)
    return tmp_path


def write_connection(folder: Path, **said: Any) -> None:
    mine: dict[str, Any] = {
        "pid": os.getpid(),
        "started": start_ticks(os.getpid()),
        "endpoint": "127.0.0.1:7",
        "s3": {},
    }
    (folder / "connection.json").write_text(json.dumps(mine | said))


def test_a_connection_of_a_dead_process_is_not_used(folder: Path) -> None:
    (folder / "up.json").write_text(json.dumps({"endpoint": "127.0.0.1:5"}))
    write_connection(folder)
    assert find_endpoint() == "127.0.0.1:7"
    write_connection(folder, started=1)
    assert read_connection() == {}
    assert find_endpoint() == "127.0.0.1:5"


def test_a_forwarded_store_is_asked_under_its_own_name(folder: Path, bucket: Bucket) -> None:
    write_connection(folder, s3={"ft-store.ns.svc:9000": f"127.0.0.1:{bucket.server_port}"})
    with open_http(5) as http:
        assert http.get("http://ft-store.ns.svc:9000/b/key?X-Amz-Signature=0").text == "ft-store.ns.svc:9000"
        assert http.get(f"http://127.0.0.1:{bucket.server_port}/b").text == f"127.0.0.1:{bucket.server_port}"


def test_a_forwarded_store_with_tls_must_show_a_certificate_of_its_own_name(folder: Path, bucket: Bucket) -> None:
    issued = issue(["ft-store.ns.svc"], datetime.now(UTC))
    for name, data in (("ca", issued.authority), ("crt", issued.certificate), ("key", issued.key)):
        (folder / name).write_bytes(data)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "crt", folder / "key")
    context.sni_callback = lambda _socket, name, _context: bucket.server_names.append(name)
    bucket.socket = context.wrap_socket(bucket.socket, server_side=True)
    port = f"127.0.0.1:{bucket.server_port}"
    write_connection(folder, s3={"ft-store.ns.svc:443": port, "other.ns.svc:443": port}, ca_file=str(folder / "ca"))
    with open_http(5) as http:
        assert http.get("https://ft-store.ns.svc/b").text == "ft-store.ns.svc"
        with pytest.raises(httpx.ConnectError, match=r"other\.ns\.svc"):
            http.get("https://other.ns.svc/b")
    assert bucket.server_names == ["ft-store.ns.svc", "other.ns.svc"]


def test_signed_addresses_of_a_real_store_hold_through_the_forward(
    folder: Path, store: Store, object_store: StoreConfig
) -> None:
    inside = minio.Minio(
        "ft-store.ns.svc:9000", access_key=object_store.access_key,
        secret_key=object_store.secret_key.get_secret_value(), secure=False, region=object_store.region,
    )  # fmt: skip
    write_connection(folder, s3={"ft-store.ns.svc:9000": object_store.endpoint.removeprefix("http://")})
    with open_http(10) as http:
        put = http.put(inside.get_presigned_url("PUT", store.bucket, "a/b.bin"), content=b"rows")
        assert put.status_code == 200, put.text
        assert http.get(inside.get_presigned_url("GET", store.bucket, "a/b.bin")).content == b"rows"
    assert store.get_bytes("a/b.bin") == b"rows"


def test_a_store_that_only_answers_in_its_cluster_is_explained(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")

    class Uploads:
        def begin_upload(self, request: artifact_pb2.CreateUploadRequest) -> artifact_pb2.Upload:
            return artifact_pb2.Upload(upload_id="u", addresses={"rows.jsonl": "http://ft-store.ns.invalid:9000/b"})

    client: Any = type("Client", (), {"artifacts": Uploads()})()
    with pytest.raises(ApiError, match=r"ft-store.ns.invalid:9000 cannot be reached.*`fabrictune connect`"):
        push(client, tmp_path / "rows.jsonl", "datasets/d", "rows")
