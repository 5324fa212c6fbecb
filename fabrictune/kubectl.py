"""A fabrictune release as `kubectl` shows it, and port-forwards to it. Only the program is needed: who may use it may connect."""

from __future__ import annotations

import base64
import json
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fabrictune.errors import ApiError

SECONDS = 30.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
INSTANCE, COMPONENT = "app.kubernetes.io/instance", "app.kubernetes.io/component"
# What kubectl says on stderr → google.rpc.Code.
CODES: Mapping[str, str] = {
    "(NotFound)": "NOT_FOUND",
    "(Forbidden)": "PERMISSION_DENIED",
    "(Unauthorized)": "UNAUTHENTICATED",
}


class Kubectl:
    """The program with the user's choice of cluster and namespace. Raises ApiError when it is missing."""

    def __init__(self, namespace: str = "", context: str = "", kubeconfig: Path | None = None) -> None:
        if shutil.which("kubectl") is None:
            raise ApiError(
                "`kubectl` is not on PATH; `fabrictune connect` uses it to reach the cluster: "
                "https://kubernetes.io/docs/tasks/tools/",
                "FAILED_PRECONDITION",
            )
        chosen = {"--namespace": namespace, "--context": context, "--kubeconfig": str(kubeconfig or "")}
        self._argv = ["kubectl", *(f"{flag}={value}" for flag, value in chosen.items() if value)]

    def argv(self, *arguments: str) -> list[str]:
        """A whole command."""
        return [*self._argv, *arguments]

    def get(self, *arguments: str) -> dict[str, Any]:
        """What `kubectl get` says, as JSON. Raises ApiError in kubectl's words."""
        argv = self.argv("get", *arguments, "--output=json", f"--request-timeout={SECONDS:.0f}s")
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            code = next((code for mark, code in CODES.items() if mark in said), "UNAVAILABLE")
            raise ApiError(f"{shlex.join(argv[: 1 + argv.index('get')])} … failed: {said}", code)
        return dict(json.loads(done.stdout))

    def get_secret(self, name: str) -> dict[str, bytes]:
        """What is in a Secret. Raises ApiError."""
        return {key: base64.b64decode(value) for key, value in (self.get("secret", name).get("data") or {}).items()}


@dataclass(frozen=True)
class Release:
    """One installation."""

    name: str
    """What all its names begin with: the front door's Service."""
    namespace: str
    tls_secret: str
    """The Secret with its certificate and authority; "" when TLS is off."""
    asks_for_tokens: bool
    store: tuple[str, int] | None
    """The object store's Service and port in the release; None when it is elsewhere."""
    store_host: str
    """host:port by which signed addresses name the store."""


def find_release(kubectl: Kubectl, name: str = "") -> Release:
    """The release of this name, or the only one in the namespace. Raises ApiError."""
    found = kubectl.get("deployments,services", "--selector", f"{INSTANCE}={name}" if name else INSTANCE)["items"]
    pipelines = {
        _labels(o)[INSTANCE]: o for o in found if o["kind"] == "Deployment" and _labels(o).get(COMPONENT) == "pipeline"
    }
    if len(pipelines) != 1:
        what = f"there are {', '.join(sorted(pipelines))}; name one with --release" if pipelines else "there is none"
        raise ApiError(
            f"which fabrictune? In this namespace {what}. `kubectl get deployments -A -l {COMPONENT}=pipeline` lists all; "
            "--namespace and --context choose another place",
            "NOT_FOUND",
        )
    [(instance, pipeline)] = pipelines.items()
    services = [o["metadata"]["name"] for o in found if o["kind"] == "Service" and _labels(o)[INSTANCE] == instance]
    return read_release(pipeline, services)


def read_release(pipeline: Mapping[str, Any], services: Sequence[str]) -> Release:
    """What a pipeline server's Deployment says of its release. Pure. services: names of the release's Services."""
    name = pipeline["metadata"]["name"].removesuffix("-pipeline")
    pod = pipeline["spec"]["template"]["spec"]
    container = pod["containers"][0]
    env = {e["name"]: e.get("value", "") for e in container.get("env", ())}
    folder = str(Path(env.get("FABRICTUNE_TLS_CERTIFICATE", "")).parent)
    volumes = {v["name"]: v for v in pod.get("volumes", ())}
    mounted = {m["mountPath"].rstrip("/"): volumes.get(m["name"], {}) for m in container.get("volumeMounts", ())}
    tls_secret = mounted.get(folder, {}).get("secret", {}).get("secretName", "")
    address = urlsplit(env.get("FABRICTUNE_S3_ENDPOINT", ""))
    port = address.port or (443 if address.scheme == "https" else 80)
    service = (address.hostname or "").partition(".")[0]
    return Release(
        name=name,
        namespace=pipeline["metadata"]["namespace"],
        tls_secret=tls_secret if env.get("FABRICTUNE_TLS_CERTIFICATE") else "",
        asks_for_tokens=bool(env.get("FABRICTUNE_TOKENS_FILE") or env.get("FABRICTUNE_OIDC_ISSUER")),
        store=(service, port) if service in services else None,
        store_host=f"{address.hostname}:{port}",
    )


class Forward:
    """One `kubectl port-forward`, started again when it ends: pods move. Use `start`, then `tend` now and then, and `stop`."""

    def __init__(self, kubectl: Kubectl, service: str, remote: int, local: int) -> None:
        self.service, self.address = service, f"127.0.0.1:{local}"
        self._argv = kubectl.argv("port-forward", f"service/{service}", f"{local}:{remote}", "--address=127.0.0.1")
        self._said = ""
        self._ready: threading.Event
        self._process: subprocess.Popen[str]
        self._reader: threading.Thread
        self._pause, self._again_at = FIRST_PAUSE, 0.0

    def start(self, stop: threading.Event) -> None:
        """Returns once it forwards, or when told to stop. Raises ApiError in kubectl's words."""
        self._launch()
        deadline = time.monotonic() + SECONDS
        while not self._ready.wait(0.05) and self._process.poll() is None and time.monotonic() < deadline:
            if stop.is_set():
                return
        if not self._ready.is_set():
            self.stop()
            raise ApiError(f"service/{self.service} cannot be forwarded: {self._said or 'no answer'}", "UNAVAILABLE")

    def tend(self) -> str:
        """Begin again what has ended, with growing pauses; returns what there is to tell, or ""."""
        if self._process.poll() is None:
            if self._again_at and self._ready.is_set():
                self._pause, self._again_at = FIRST_PAUSE, 0.0
                return f"service/{self.service} is forwarded again"
            return ""
        if not self._again_at:
            self._again_at = time.monotonic() + self._pause
            return f"the port-forward to service/{self.service} ended ({self._said}); it is started again"
        if time.monotonic() >= self._again_at:
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
            self._again_at = time.monotonic() + self._pause
            self._launch()
        return ""

    def stop(self) -> None:
        """End it."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        self._reader.join()

    def _launch(self) -> None:
        self._ready = threading.Event()
        self._process = subprocess.Popen(
            self._argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,  # Ctrl-C is for us; we end it
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(self._process, self._ready), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str], ready: threading.Event) -> None:
        """Drain what it says (a line for each connection), and keep the last line that may be a reason."""
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                if line.startswith("Forwarding from"):
                    ready.set()
                elif not line.startswith("Handling connection"):
                    self._said = line.strip()


def _labels(thing: Mapping[str, Any]) -> Mapping[str, str]:
    return thing["metadata"].get("labels") or {}
