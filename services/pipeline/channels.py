"""Channels to the stages' services, one each. The pipeline needs two sets: its own calls carry its token, and those that
the front door passes on carry their callers', so its set is opened without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from fabrictune.v1 import conversion_pb2, evaluation_pb2, inference_pb2, merging_pb2, training_pb2
from services.common.errors import FailedPrecondition, InvalidSpec

SERVICES: Mapping[str, str] = {
    kind: next(iter(module.DESCRIPTOR.services_by_name.values())).full_name
    for kind, module in {
        "conversion": conversion_pb2,
        "training": training_pb2,
        "merging": merging_pb2,
        "evaluation": evaluation_pb2,
        "inference": inference_pb2,
    }.items()
}
"""Kind, as FABRICTUNE_ENDPOINTS names it → full name of its service, such as "fabrictune.v1.TrainingService"."""

OPTIONS = (
    ("grpc.max_receive_message_length", 16 * 2**20),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),  # a pod that comes back is found at once; gRPC would wait up to 2 minutes
    ("grpc.keepalive_time_ms", 30_000),  # a node that went silently is noticed
    ("grpc.keepalive_timeout_ms", 10_000),
)


def open_channels(endpoints: Mapping[str, str], ca_file: Path | None, token: str) -> Mapping[str, grpc.aio.Channel]:
    """A channel for each kind; TLS when ca_file is given. The caller closes them.

    token: sent with each call, when it is given. Raises InvalidSpec naming the kinds that are missing or unknown, and
    FailedPrecondition when the certificate authority cannot be read.
    """
    wrong = sorted(set(SERVICES) ^ set(endpoints))
    if wrong:
        raise InvalidSpec(
            f"FABRICTUNE_ENDPOINTS must name an address for each of {', '.join(SERVICES)}; look at {', '.join(wrong)}"
        )
    credentials = grpc.ssl_channel_credentials(_read(ca_file)) if ca_file else None
    return {kind: _open(address, credentials, token) for kind, address in endpoints.items()}


def _open(address: str, credentials: grpc.ChannelCredentials | None, token: str) -> grpc.aio.Channel:
    interceptors = _bearers(token) if token else []
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=OPTIONS, interceptors=interceptors)
    return grpc.aio.secure_channel(address, credentials, options=OPTIONS, interceptors=interceptors)


def _bearers(token: str) -> Sequence[grpc.aio.ClientInterceptor]:
    """An interceptor for each form of call that our API has: grpc.aio takes an object for one form only."""

    def send(continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or ()), ("authorization", f"Bearer {token}")]
        return continuation(details._replace(metadata=grpc.aio.Metadata(*metadata)), request)

    class Unary(grpc.aio.UnaryUnaryClientInterceptor):
        async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
            return await send(continuation, client_call_details, request)

    class Stream(grpc.aio.UnaryStreamClientInterceptor):
        async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
            return await send(continuation, client_call_details, request)

    return [Unary(), Stream()]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise FailedPrecondition(
            f"the certificate authority {file} cannot be read: {error.strerror}; FABRICTUNE_CA_FILE names it"
        ) from None
