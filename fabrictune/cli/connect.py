"""`fabrictune connect`: a cluster's fabrictune on this machine, by port-forwards, for as long as the command runs.

What the other commands need (where, the authority, a token, the way to the object store) is put into a file of this folder
that only this user can read, and goes when the command ends.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fabrictune.cli.context import console, errors, print_json_line, program, settings
from fabrictune.connection import read_connection, start_ticks
from fabrictune.errors import ApiError
from fabrictune.kubectl import Forward, Kubectl, Release, find_release

GRPC, GATEWAY = 8470, 8480
POLL_SECONDS = 0.5


def connect(
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="The release's; kubectl's own when absent.")] = "",
    release: Annotated[str, typer.Option(help="Which one, where a namespace has several.")] = "",
    context: Annotated[str, typer.Option(help="A context of the kubeconfig.")] = "",
    kubeconfig: Annotated[Path | None, typer.Option(help="A kubeconfig; kubectl's own when absent.")] = None,
    role: Annotated[str, typer.Option(help="Whose token: the Secret RELEASE-token-ROLE.")] = "admin",
    token_secret: Annotated[str, typer.Option(help="Another Secret whose key `token` is the token.")] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC, on loopback; 0 takes a free one.")] = 0,
    gateway_port: Annotated[int, typer.Option(min=0, max=65535, help="OpenAI gateway; 0 takes a free one.")] = 0,
    data_dir: Annotated[
        Path, typer.Option(envvar="FABRICTUNE_DATA_DIR", help="Where the other commands find it.")
    ] = Path(".fabrictune"),
) -> None:
    """Reach a fabrictune that runs in a cluster without an ingress. Every other command in this folder uses it.

    Runs until Ctrl-C, and begins a port-forward again when its pod moves.
    """
    running = read_connection(data_dir)
    if running:
        raise ApiError(
            f"`fabrictune connect` runs already in this folder (process {running['pid']}, {running['endpoint']}); end it first",
            "ALREADY_EXISTS",
        )
    found = find_release(Kubectl(namespace, context, kubeconfig), release)
    kubectl = Kubectl(found.namespace, context, kubeconfig)
    secret = (token_secret or f"{found.name}-token-{role}") if found.asks_for_tokens else ""
    with ExitStack() as stack:
        stop = stack.enter_context(_told_to_stop())
        front = Forward(kubectl, found.name, GRPC, port or _free_port())
        gateway = Forward(kubectl, f"{found.name}-inference", GATEWAY, gateway_port or _free_port())
        store = Forward(kubectl, *found.store, _free_port()) if found.store else None
        forwards = [f for f in (front, gateway, store) if f]
        for forward in forwards:
            forward.start(stop)
            stack.callback(forward.stop)
        if stop.is_set():
            return
        ca_file = data_dir / "connection-ca.crt"
        said = {
            "pid": os.getpid(),
            "started": start_ticks(os.getpid()),
            "endpoint": front.address,
            "gateway": f"{'https' if found.tls_secret else 'http'}://{gateway.address}",
            "ca_file": str(ca_file.absolute()) if found.tls_secret else "",
            "token": _read_key(kubectl, secret, "token").decode().strip() if secret else "",
            "s3": {found.store_host: store.address} if store else {},
        }
        data_dir.mkdir(parents=True, exist_ok=True)
        if found.tls_secret:
            stack.enter_context(_private_file(ca_file, _read_key(kubectl, found.tls_secret, "ca.crt")))
        stack.enter_context(_private_file(data_dir / "connection.json", json.dumps(said, indent=1).encode()))
        _announce(kubectl, found, secret, said)
        while not stop.wait(POLL_SECONDS):
            for told in filter(None, [forward.tend() for forward in forwards]):
                errors.print(told, markup=False, highlight=False, soft_wrap=True)


def _announce(kubectl: Kubectl, release: Release, secret: str, said: dict[str, Any]) -> None:
    if settings().json:
        print_json_line({key: value for key, value in said.items() if key not in ("token", "started")})
        return
    lines = [
        f"connected to {release.name} in the namespace {release.namespace}",
        f"  gRPC      {said['endpoint']}",
        f"  OpenAI    {said['gateway']}/v1",
        *(f"  S3        {host} is {here}" for host, here in said["s3"].items()),
        "In another terminal, in this folder:",
        f"  {program()} run my-run.yaml",
        f"  {program()} jobs list",
        "With any OpenAI client, or curl:",
    ]
    curl = ["curl", *(["--cacert", said["ca_file"]] if said["ca_file"] else [])]
    header = ""
    if secret:
        command = shlex.join(kubectl.argv("get", "secret", secret))
        lines.append(f"""  export FABRICTUNE_TOKEN="$({command} -o jsonpath='{{.data.token}}' | base64 -d)\"""")
        header = ' -H "authorization: Bearer $FABRICTUNE_TOKEN"'
    lines += [f"  {shlex.join(curl)}{header} {said['gateway']}/v1/models", "Ctrl-C ends it."]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _read_key(kubectl: Kubectl, secret: str, key: str) -> bytes:
    try:
        data = kubectl.get_secret(secret)
    except ApiError as error:
        advice = "; --role or --token-secret names another one" if key == "token" else ""
        raise ApiError(f"{error.message}{advice}", error.code) from None
    if not data.get(key):
        raise ApiError(f"the Secret {secret} has no {key}", "NOT_FOUND")
    return data[key]


@contextmanager
def _private_file(file: Path, content: bytes) -> Iterator[None]:
    """A file that only this user can read, for as long as the block lasts."""
    draft = file.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(content)
    draft.replace(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


@contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """Set once by Ctrl-C, SIGTERM or a terminal that closes, so that everything is put back in order."""
    told = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: told.set())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
