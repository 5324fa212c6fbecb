"""Calls over one connection: failures are `ApiError`s, and specs are plain dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import grpc
from google.protobuf import json_format

from fabrictune.channel import from_rpc
from fabrictune.errors import ApiError


class Calls:
    """Calls the server at the other end of a channel."""

    def __init__(self, channel: grpc.Channel, endpoint: str) -> None:
        self._channel, self._endpoint = channel, endpoint

    def stub(self, stub: Any) -> Any:
        """A generated stub on this connection."""
        return stub(self._channel)

    def call(self, method: Any, request: Any) -> Any:
        """Call a stub's method. Raises ApiError."""
        try:
            return method(request)
        except grpc.RpcError as error:
            raise from_rpc(error, self._endpoint) from None

    def stream(self, method: Any, request: Any, seconds: float | None = None) -> Iterator[Any]:
        """Call a streaming method, at most for so many seconds. Raises ApiError."""
        answers = method(request, timeout=seconds)
        try:
            yield from answers
        except grpc.RpcError as error:
            if seconds is not None and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return
            raise from_rpc(error, self._endpoint) from None
        finally:
            answers.cancel()


def fill(message: Any, told: Mapping[str, Any], what: str) -> None:
    """Set a message's fields. what: its name in the error. Raises ApiError."""
    try:
        json_format.ParseDict(dict(told), message)
    except json_format.ParseError as error:
        raise ApiError(f"{what} is wrong: {error}", "INVALID_ARGUMENT") from None
