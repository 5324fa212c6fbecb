"""The chart's hooks: which Secrets there should be, and what is asked of an API server, here a small one on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from lightkube import Client
from lightkube.config.kubeconfig import KubeConfig
from lightkube.config.models import Cluster, User

from services.common.auth import Authenticator, Role, read_tokens
from services.common.errors import FailedPrecondition, PermissionDenied, Unavailable
from services.common.hooks.bootstrap import Bootstrap, BootstrapConfig, Wanted
from services.common.hooks.certificates import issue, read_certificate
from services.common.hooks.secret_values import server_names, store_secret, tls_secret, token_secret, tokens_secret
from services.common.hooks.uninstall import uninstall
from tests.conftest import serving

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ALL = ["ft-tls", "ft-tokens", "ft-token-admin", "ft-token-services", "ft-store"]
ROOT = Path(__file__).resolve().parents[2]


class ApiServer(ThreadingHTTPServer):
    """Objects of one namespace: create, get, list by label, replace, delete. Deleting a Job lets its pods linger a while."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.refused: set[tuple[str, str]] = set()
        self.requests: list[tuple[str, str]] = []
        self.lingering = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def client(self) -> Client:
        user = User(token="t")
        return Client(KubeConfig.from_one(cluster=Cluster(server=self.url), user=user), namespace="ns")

    def add(self, resource: str, name: str, **labels: str) -> None:
        metadata = {"name": name, "labels": labels, "resourceVersion": "1"}
        self.objects[resource, name] = {
            "metadata": metadata,
            "spec": {"selector": {}, "template": {}, "containers": []},
        }

    def data(self, name: str) -> dict[str, bytes]:
        return {k: base64.b64decode(v) for k, v in self.objects["secrets", name]["data"].items()}

    def names(self, resource: str) -> list[str]:
        return sorted(name for kind, name in self.objects if kind == resource)


class _Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        path = parts.path.partition("/namespaces/ns/")[2].split("/")
        resource, name = path[0], path[1] if len(path) > 1 else ""
        body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or "{}")
        with self.server.lock:
            self.server.requests.append((self.command, resource))
            if (self.command, resource) in self.server.refused:
                self._say(403, f'{resource} "{name}" is forbidden: User "system:serviceaccount:ns:hook" cannot')
                return
            getattr(self, f"_{self.command.lower()}")(resource, name, body, parse_qs(parts.query))

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _get(self, resource: str, name: str, _body: Any, query: dict[str, list[str]]) -> None:
        objects = self.server.objects
        if name:
            found = objects.get((resource, name))
            self._send(200, found) if found else self._say(404, "not found")
            return
        if resource == "pods" and self.server.lingering:
            self.server.lingering -= 1
            if not self.server.lingering:
                for pod in self.server.names("pods"):
                    del objects["pods", pod]
        wanted = [part.partition("=") for part in query.get("labelSelector", [""])[0].split(",") if part]
        items = [
            o
            for (kind, _), o in objects.items()
            if kind == resource and all(_matches(o["metadata"]["labels"], key, value) for key, _, value in wanted)
        ]
        self._send(200, {"kind": "List", "metadata": {"resourceVersion": "1"}, "items": items})

    def _post(self, resource: str, _name: str, body: Any, _query: object) -> None:
        key = (resource, body["metadata"]["name"])
        if key in self.server.objects:
            self._say(409, "already exists")
            return
        self.server.objects[key] = body | {"metadata": {**body["metadata"], "resourceVersion": "1"}}
        self._send(201, self.server.objects[key])

    def _put(self, resource: str, name: str, body: Any, _query: object) -> None:
        if self.server.objects[resource, name]["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"]:
            self._say(409, "the object has been modified")
            return
        self.server.objects[resource, name] = body
        self._send(200, body)

    def _delete(self, resource: str, name: str, _body: Any, _query: object) -> None:
        self.server.objects.pop((resource, name), None)
        self._send(200, {"kind": "Status", "status": "Success"})

    def _say(self, code: int, message: str) -> None:
        self._send(code, {"kind": "Status", "status": "Failure", "code": code, "message": message})

    def _send(self, code: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _matches(labels: dict[str, str], key: str, value: str) -> bool:
    return labels.get(key) == value if value else key in labels


@pytest.fixture
def api() -> Iterator[ApiServer]:
    server = ApiServer()
    with serving(server):
        yield server


def bootstrap(api: ApiServer, now: datetime = NOW, **wanted: Any) -> list[str]:
    settings = {"tls": True, "auth": True, "store": True, "services": ("training",), **wanted}
    config = BootstrapConfig.model_construct(namespace="ns", release="ft", bootstrap=Wanted(**settings))
    return list(Bootstrap(api.client(), config, now).run())


def test_the_certificate_holds_every_name_that_a_server_is_called_by() -> None:
    names = server_names("ft", "ns", ["training"], ["llm.example.com", "10.0.0.7"])
    assert {"ft", "ft-training", "ft-training.ns", "ft.ns.svc", "ft-training.ns.svc.cluster.local"} <= set(names)
    assert {"localhost", "127.0.0.1", "llm.example.com", "10.0.0.7"} <= set(names)
    facts = read_certificate(tls_secret("ft-tls", names, NOW).data["tls.crt"])
    assert facts.names == set(names)
    assert timedelta(days=3649) < facts.expires - NOW <= timedelta(days=3650)


def test_the_certificate_is_one_that_tls_takes(tmp_path: Path) -> None:
    issued = issue(["localhost", "127.0.0.1"], datetime.now(UTC))
    for name, data in (("ca", issued.authority), ("crt", issued.certificate), ("key", issued.key)):
        (tmp_path / name).write_bytes(data)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    for host, fine in (("localhost", True), ("127.0.0.1", True), ("elsewhere", False)):
        client = ssl.create_default_context(cafile=tmp_path / "ca")
        client.verify_flags |= ssl.VERIFY_X509_STRICT
        assert shake_hands(server, client, host) is fine


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> bool:
    a, b = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(a, b, server_hostname=host), server.wrap_bio(b, a, server_side=True)]
    for _ in range(3):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return True


def test_the_tokens_file_is_what_the_servers_read(tmp_path: Path) -> None:
    tokens = {holder: token_secret(holder).data["token"] for holder in ("admin", "services")}
    file = tmp_path / "tokens.yaml"
    file.write_bytes(tokens_secret("t", tokens).data["tokens.yaml"])
    authenticator = Authenticator(read_tokens(file))
    assert authenticator.identify(tokens["admin"].decode()).role is Role.ADMIN
    assert authenticator.identify(tokens["services"].decode()).role is Role.OPERATOR


def test_no_two_secrets_are_alike_and_none_is_shown_by_its_repr() -> None:
    first, second = token_secret("a"), token_secret("a")
    assert first.data != second.data
    assert len(first.data["token"]) >= 43
    assert store_secret("s").data != store_secret("s").data
    assert first.data["token"].decode() not in repr(first)
    assert "PRIVATE KEY" not in repr(issue(["x"], NOW))


def test_an_empty_namespace_gets_all_of_them_and_a_second_run_changes_nothing(api: ApiServer) -> None:
    lines = bootstrap(api)
    assert api.names("secrets") == sorted(ALL)
    assert "the certificate is valid until 2035-12-30" in lines[0]
    made = json.dumps([api.objects["secrets", name] for name in ALL], sort_keys=True)
    assert all(line.startswith("kept") for line in bootstrap(api))
    assert json.dumps([api.objects["secrets", name] for name in ALL], sort_keys=True) == made
    tls = api.objects["secrets", "ft-tls"]
    assert tls["type"] == "kubernetes.io/tls"
    assert tls["metadata"]["labels"] == {
        "app.kubernetes.io/instance": "ft", "app.kubernetes.io/managed-by": "fabrictune",
    }  # fmt: skip


def test_only_what_is_wanted_is_made(api: ApiServer) -> None:
    bootstrap(api, tls=False, store=False)
    assert api.names("secrets") == ["ft-token-admin", "ft-token-services", "ft-tokens"]


def test_two_that_run_at_once_end_with_one_set_that_fits(api: ApiServer) -> None:
    threads = [threading.Thread(target=bootstrap, args=(api,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert api.names("secrets") == sorted(ALL)
    hashed = {e["name"]: e["sha256"] for e in yaml.safe_load(api.data("ft-tokens")["tokens.yaml"])}
    for holder in ("admin", "services"):
        assert hashed[holder] == hashlib.sha256(api.data(f"ft-token-{holder}")["token"]).hexdigest()


def test_a_run_that_was_cut_off_before_the_hashes_goes_on(api: ApiServer) -> None:
    bootstrap(api)
    token = api.data("ft-token-admin")
    del api.objects["secrets", "ft-tokens"], api.objects["secrets", "ft-token-services"]
    bootstrap(api)
    assert api.data("ft-token-admin") == token
    hashed = [e["sha256"] for e in yaml.safe_load(api.data("ft-tokens")["tokens.yaml"])]
    assert hashed[0] == hashlib.sha256(token["token"]).hexdigest()


def test_hashes_without_their_token_are_an_error_that_says_what_to_do(api: ApiServer) -> None:
    bootstrap(api)
    del api.objects["secrets", "ft-token-admin"]
    with pytest.raises(FailedPrecondition, match="ft-token-admin is missing") as refused:
        bootstrap(api)
    assert "kubectl -n ns delete secret" in str(refused.value)
    assert "ft-token-admin" not in api.names("secrets")


def test_a_certificate_near_its_end_is_renewed_and_nothing_else(api: ApiServer) -> None:
    bootstrap(api)
    before = {name: api.data(name) for name in ALL}
    assert bootstrap(api, NOW + timedelta(days=3550))[0].startswith("kept")
    lines = bootstrap(api, NOW + timedelta(days=3570))
    assert "rollout restart" in lines[0]
    after = {name: api.data(name) for name in ALL}
    assert [name for name in ALL if before[name] != after[name]] == ["ft-tls"]
    assert read_certificate(after["ft-tls"]["tls.crt"]).expires > NOW + timedelta(days=7000)


def test_a_certificate_that_is_not_ours_is_never_renewed(api: ApiServer) -> None:
    bootstrap(api)
    api.objects["secrets", "ft-tls"]["metadata"]["labels"] = {}
    before = api.data("ft-tls")
    assert bootstrap(api, NOW + timedelta(days=3570))[0].startswith("kept")
    assert api.data("ft-tls") == before


def test_a_name_that_a_kept_certificate_lacks_is_said(api: ApiServer) -> None:
    bootstrap(api)
    assert "It lacks llm.example.com" in bootstrap(api, hosts=("llm.example.com",))[0]


@pytest.mark.parametrize(("method", "verb"), [("GET", "get"), ("POST", "create")])
def test_a_right_that_is_missing_is_named(api: ApiServer, method: str, verb: str) -> None:
    api.refused.add((method, "secrets"))
    with pytest.raises(PermissionDenied, match=f"refuses to {verb} secrets ft-tls.*must hold the verb '{verb}'"):
        bootstrap(api)
    assert api.names("secrets") == []


def test_no_api_server_is_said(api: ApiServer) -> None:
    client = Client(
        KubeConfig.from_one(cluster=Cluster(server="http://127.0.0.1:9"), user=User(token="t")), namespace="ns"
    )
    wanted = Wanted(tls=False, auth=False, store=True)
    config = BootstrapConfig.model_construct(namespace="ns", release="ft", bootstrap=wanted)
    with pytest.raises(Unavailable, match="the API server does not answer"):
        list(Bootstrap(client, config, NOW).run())


def run_hook(module: str, folder: Path, url: str, **env: str) -> subprocess.CompletedProcess[str]:
    kubeconfig = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("FABRICTUNE_", "KUBERNETES_"))}
    env = plain | {"KUBECONFIG": str(folder / "kubeconfig"), "PYTHONPATH": str(ROOT)} | env
    argv = [sys.executable, "-m", module]
    return subprocess.run(argv, env=env, cwd=folder, capture_output=True, text=True, check=False, timeout=60)


def test_the_hook_prints_no_secret(api: ApiServer, tmp_path: Path) -> None:
    asked = json.dumps({"tls": True, "auth": True, "store": True, "services": ["training"], "hosts": []})
    where = {"FABRICTUNE_NAMESPACE": "ns", "FABRICTUNE_RELEASE": "ft"}
    done = run_hook("services.common.hooks.bootstrap", tmp_path, api.url, FABRICTUNE_BOOTSTRAP=asked, **where)
    assert done.returncode == 0, done.stderr
    assert "made the Secret ft-tls" in done.stdout
    for name in ("ft-token-admin", "ft-token-services", "ft-store"):
        for value in api.data(name).values():
            assert value.decode() not in done.stdout + done.stderr


def test_bad_settings_of_the_hook_are_named(api: ApiServer, tmp_path: Path) -> None:
    where = {"FABRICTUNE_NAMESPACE": "ns", "FABRICTUNE_RELEASE": "ft"}
    done = run_hook("services.common.hooks.bootstrap", tmp_path, api.url, FABRICTUNE_BOOTSTRAP="{", **where)
    assert done.returncode == 64
    assert "FABRICTUNE_BOOTSTRAP" in done.stderr
    assert "Traceback" not in done.stderr


OURS = {"app.kubernetes.io/instance": "ft", "fabrictune.dev/kind": "training"}


def test_uninstall_ends_what_the_release_has_started_and_nothing_else(api: ApiServer) -> None:
    api.add("jobs", "training-t1", **OURS)
    api.add("pods", "training-t1-x", **OURS)
    api.add("deployments", "engine-q", **OURS | {"fabrictune.dev/kind": "engine"})
    api.add("services", "engine-q", **OURS | {"fabrictune.dev/kind": "engine"})
    api.add("deployments", "ft-training", **{"app.kubernetes.io/instance": "ft"})
    api.add("jobs", "training-t2", **OURS | {"app.kubernetes.io/instance": "other"})
    api.lingering = 3
    lines = list(uninstall(api.client(), "ft", pause=lambda _: None))
    assert lines == ["deleted the Job training-t1", "deleted the Deployment engine-q", "deleted the Service engine-q"]
    assert (api.names("jobs"), api.names("deployments"), api.names("pods")) == (["training-t2"], ["ft-training"], [])


def test_uninstall_says_which_pods_take_longer(api: ApiServer) -> None:
    api.add("pods", "training-t1-x", **OURS)
    lines = list(uninstall(api.client(), "ft", seconds=0, pause=lambda _: None))
    assert lines == ["still ending: training-t1-x"]


def test_uninstall_without_a_right_says_which(api: ApiServer, tmp_path: Path) -> None:
    api.add("jobs", "training-t1", **OURS)
    api.refused.add(("DELETE", "jobs"))
    where = {"FABRICTUNE_NAMESPACE": "ns", "FABRICTUNE_RELEASE": "ft"}
    done = run_hook("services.common.hooks.uninstall", tmp_path, api.url, **where)
    assert done.returncode == 77
    assert "must hold the verb 'delete' for jobs" in done.stderr
