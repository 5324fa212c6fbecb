"""The front door: the pipeline's address answers for every service, so that users need one address and no ingress.

Calls of the other services pass as bytes, message by message, to the channel of their service; the caller's own token goes
with them, so who may do what is asked here (by the server's interceptor) and there. Only a service that cannot be reached
is answered for here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from functools import partial
from typing import Any, cast

import grpc
from grpc_status import rpc_status

from services.common.errors import Unavailable
from services.common.logs import get_logger
from services.common.server import Service

# They belong to one connection, not to the call. What begins with "grpc-" is gRPC's own, but for the status's details.
HOP_HEADERS = frozenset({"user-agent", "te", "content-type", "host", "connection", "trailer", "transfer-encoding"})
DETAILS = "grpc-status-details-bin"

Metadata = tuple[tuple[str, str | bytes], ...]


class FrontDoor:
    """Passes calls on. channels: full name of a service → the channel to it, which adds no token of its own."""

    def __init__(self, channels: Mapping[str, grpc.aio.Channel]) -> None:
        self._channels = channels

    @property
    def services(self) -> tuple[Service, ...]:
        """What to give to a Server beside its own services: their names are listed by reflection, too."""
        return tuple(Service(name, _Passage(name, channel), _add) for name, channel in self._channels.items())


class _Passage(grpc.GenericRpcHandler):
    """The calls of one service."""

    def __init__(self, name: str, channel: grpc.aio.Channel) -> None:
        self._name, self._channel = name, channel
        self._log = get_logger("front")

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """A handler for any method of the service; whether there is such a method is for the service to say."""
        method = handler_call_details.method
        if not method.startswith(f"/{self._name}/"):
            return None
        # On the wire a call with one request and one answer is a stream of one each.
        behaviour: Any = partial(self._pass_on, method)
        return grpc.stream_stream_rpc_method_handler(behaviour)

    async def _pass_on(self, method: str, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        call: Any = cast(Any, self._channel).stream_stream(method)(
            requests,
            timeout=context.time_remaining(),
            metadata=grpc.aio.Metadata(*_forwardable(context.invocation_metadata())),
        )
        # Not only in a `finally`: a caller may go while we wait for nothing, and then this generator is just dropped.
        context.add_done_callback(lambda _: call.cancel())
        begun = False
        try:
            async for answer in call:
                if not begun:
                    # Not before the first answer: a call that has got headers is not tried again by its caller.
                    await context.send_initial_metadata(_forwardable(await call.initial_metadata()))
                    begun = True
                yield answer
            context.set_trailing_metadata(_forwardable(await call.trailing_metadata()))
        except grpc.aio.AioRpcError as error:
            trailing = _forwardable(error.trailing_metadata())
            if error.code() is grpc.StatusCode.UNAVAILABLE and DETAILS not in dict(trailing):
                await self._say_unreachable(error, context)
            await context.abort(error.code(), error.details() or "", trailing)
        finally:
            call.cancel()

    async def _say_unreachable(self, error: grpc.aio.AioRpcError, context: Any) -> None:
        """Nobody answered, or the connection broke: gRPC itself says UNAVAILABLE, without our details."""
        self._log.warning("unreachable", service=self._name, error=error.details())
        short = self._name.rpartition(".")[2]
        text = (
            f"the front door cannot reach {short} at present; it may be starting: try again, and look at its pod when "
            "that does not help"
        )
        await context.abort_with_status(rpc_status.to_status(Unavailable(text, {"service": self._name}).to_status()))


def _add(passage: _Passage, server: grpc.aio.Server) -> None:
    server.add_generic_rpc_handlers((passage,))


def _forwardable(metadata: Iterable[tuple[str, str | bytes]] | None) -> Metadata:
    """What a call's metadata says beyond this hop."""
    return tuple(
        (key, value)
        for key, value in metadata or ()
        if key == DETAILS or not (key in HOP_HEADERS or key.startswith((":", "grpc-")))
    )
