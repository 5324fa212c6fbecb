"""A channel to a server (TLS, token, deadlines, what is tried again), and its refusals as exceptions.

Only who calls a server imports this: gRPC takes longer to load than all else of a command.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from fabrictune.connection import read_connection
from fabrictune.errors import ApiError

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


def from_status(status: status_pb2.Status) -> ApiError:
    """The exception for a google.rpc.Status."""
    reason, violations = "", []
    for detail in status.details:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
            reason = info.reason
        elif detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
            violations = [(v.field, v.description) for v in bad.field_violations]
    return ApiError(status.message, code_pb2.Code.Name(status.code), reason, violations)


def from_rpc(error: grpc.RpcError, endpoint: str) -> ApiError:
    """The exception for a failed call."""
    status = rpc_status.from_call(error)
    if status is not None:
        return from_status(status)
    code = error.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        text = (
            f"no fabrictune server answers at {endpoint}: start one with `fabrictune up`, or name one with --endpoint"
        )
        return ApiError(text, code.name)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ApiError(f"the server at {endpoint} did not answer in time", code.name)
    return ApiError(error.details() or code.name, code.name)


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
