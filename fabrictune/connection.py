"""Where the server is, and a channel to it: TLS, token, deadlines, what is tried again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc

from fabrictune.errors import ApiError

DEFAULT_ENDPOINT = "127.0.0.1:8470"
DEADLINE_SECONDS = 60.0
# Only UNAVAILABLE is tried again: the call has not been begun.
SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)


def find_endpoint() -> str:
    """FABRICTUNE_ENDPOINT, else that of the `fabrictune connect` or `up` of this folder, else the default."""
    named = os.environ.get("FABRICTUNE_ENDPOINT", "")
    return named or str((read_connection() or read_up_file()).get("endpoint", DEFAULT_ENDPOINT))


def read_up_file(data_dir: Path | None = None) -> dict[str, Any]:
    """What a running `fabrictune up` says of itself: {pid, endpoint, gateway, metrics, s3}; {} when there is none."""
    return _read(data_dir, "up.json")


def read_connection(data_dir: Path | None = None) -> dict[str, Any]:
    """What the `fabrictune connect` of this folder says while it runs; else {}.

    {pid, started, endpoint, gateway, ca_file, token, s3: {host:port as the store's addresses have it: host:port here}}
    """
    said = _read(data_dir, "connection.json")
    return said if is_alive(said) else {}


def is_alive(said: Mapping[str, Any]) -> bool:
    """Whether the process that wrote {pid, started} runs. Its start tells it from a later one with the same number."""
    ticks = start_ticks(int(said["pid"])) if "pid" in said else None
    return ticks is not None and ticks == said.get("started")


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when it has gone. Without /proc (macOS): 0 while it runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return 0


def _read(data_dir: Path | None, name: str) -> dict[str, Any]:
    folder = data_dir or Path(os.environ.get("FABRICTUNE_DATA_DIR", ".fabrictune"))
    try:
        return dict(json.loads((folder / name).read_text()))
    except (OSError, ValueError):
        return {}


def open_channel(endpoint: str, token: str, ca_file: Path | None, timeout: float) -> grpc.Channel:
    """A channel that sends the token and gives each unary call `timeout` seconds. Raises ApiError.

    Token and authority: as given, else FABRICTUNE_TOKEN and _CA_FILE, else those of the `fabrictune connect` that forwards
    this very endpoint; they go nowhere else.
    """
    said = read_connection()
    known = said if said.get("endpoint") == endpoint else {}
    named = os.environ.get("FABRICTUNE_CA_FILE") or known.get("ca_file")
    inner = _connect(endpoint, ca_file or (Path(named) if named else None))
    token = token or os.environ.get("FABRICTUNE_TOKEN") or str(known.get("token", ""))
    return grpc.intercept_channel(inner, _Deadline(timeout), _Bearer(token))


def _connect(endpoint: str, ca_file: Path | None) -> grpc.Channel:
    options = [("grpc.service_config", SERVICE_CONFIG), ("grpc.max_receive_message_length", 16 * 2**20)]
    address = endpoint.removeprefix("https://").removeprefix("http://")
    if endpoint.startswith("https://") or ca_file is not None:
        try:
            roots = ca_file.read_bytes() if ca_file else None
        except OSError as error:
            raise ApiError(f"the CA file {ca_file} cannot be read: {error.strerror}", "INVALID_ARGUMENT") from None
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(roots), options=options)
    return grpc.insecure_channel(address, options=options)


class _Deadline(grpc.UnaryUnaryClientInterceptor):
    """A default deadline for unary calls; a service config's `timeout` would not reach the server."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(details._replace(timeout=details.timeout or self._seconds), request)


class _Bearer(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Sends the token with each call."""

    def __init__(self, token: str) -> None:
        self._metadata = [("authorization", f"Bearer {token}")] if token else []

    def _send(self, continuation: Any, details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or []), *self._metadata]
        return continuation(details._replace(metadata=metadata), request)

    intercept_unary_unary: Any = _send
    intercept_unary_stream: Any = _send
