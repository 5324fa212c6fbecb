"""One interceptor for every call: a request id, who may ask, errors to statuses, metrics, one log line."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.rpc import code_pb2, status_pb2
from grpc_status import rpc_status

from services.common import metrics
from services.common.auth import OPEN_PREFIX, Authenticator, bearer
from services.common.errors import FabrictuneError, internal_status
from services.common.logs import get_logger

ServicerContext = grpc.aio.ServicerContext[Any, Any]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps unary and server-streaming handlers."""

    def __init__(self, authenticator: Authenticator | None) -> None:
        self._authenticator = authenticator
        self._log = get_logger("rpc")

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Put our wrapper around the handler of a method."""
        handler = await continuation(details)
        if handler is None or details.method.startswith(OPEN_PREFIX):
            return handler
        if handler.request_streaming:  # reflection, and what the front door passes on: asked for a role, not changed
            return self._guarded(handler.stream_stream, handler, details.method)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream, details.method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler.unary_unary, details.method), handler.request_deserializer, handler.response_serializer
        )

    def _unary(self, behaviour: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: ServicerContext) -> Any:
            begin, request_id = time.perf_counter(), self._begin(method, context)
            status = status_pb2.Status()
            try:
                await self._authorize(method, context)
                return await behaviour(request, context)
            except asyncio.CancelledError:
                status = status_pb2.Status(code=code_pb2.CANCELLED)
                raise
            except Exception as error:  # noqa: BLE001 - the process's rim: what nobody knew of becomes INTERNAL
                status = self._status_of(error, request_id)
                await context.abort_with_status(rpc_status.to_status(status))
            finally:
                metrics.call_seconds.labels(method).observe(time.perf_counter() - begin)
                self._end(method, status, time.perf_counter() - begin)

        return call

    def _stream(self, behaviour: Callable[..., AsyncIterator[Any]], method: str) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: ServicerContext) -> AsyncIterator[Any]:
            begin, request_id = time.perf_counter(), self._begin(method, context)
            status = status_pb2.Status()
            metrics.streams_open.inc()
            try:
                await self._authorize(method, context)
                async for answer in behaviour(request, context):
                    yield answer
            except (asyncio.CancelledError, GeneratorExit):
                status = status_pb2.Status(code=code_pb2.CANCELLED)
                raise
            except Exception as error:  # noqa: BLE001 - the process's rim: what nobody knew of becomes INTERNAL
                status = self._status_of(error, request_id)
                await context.abort_with_status(rpc_status.to_status(status))
            finally:
                metrics.streams_open.dec()
                self._end(method, status, time.perf_counter() - begin)

        return call

    def _guarded(self, inner: Callable[..., AsyncIterator[Any]], handler: Any, method: str) -> Any:
        async def call(requests: Any, context: ServicerContext) -> AsyncIterator[Any]:
            try:
                await self._authorize(method, context)
            except FabrictuneError as error:
                await context.abort_with_status(rpc_status.to_status(error.to_status()))
            async for answer in inner(requests, context):
                yield answer

        return grpc.stream_stream_rpc_method_handler(call, handler.request_deserializer, handler.response_serializer)

    def _begin(self, method: str, context: ServicerContext) -> str:
        sent = dict(context.invocation_metadata() or ())
        request_id = str(sent.get("x-request-id") or uuid.uuid4().hex[:16])
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id, method=method)
        context.set_trailing_metadata((("x-request-id", request_id),))
        return request_id

    async def _authorize(self, method: str, context: ServicerContext) -> None:
        if self._authenticator is None or context.peer().startswith("unix:"):
            return  # the socket lies in a folder that only our own user can enter
        sent = dict(context.invocation_metadata() or ())
        caller = await asyncio.to_thread(self._authenticator.allow, bearer(str(sent.get("authorization", ""))), method)
        structlog.contextvars.bind_contextvars(caller=caller.name)

    def _status_of(self, error: Exception, request_id: str) -> status_pb2.Status:
        if isinstance(error, FabrictuneError):
            return error.to_status()
        self._log.error("unexpected", exc_info=error)
        return internal_status(request_id)

    def _end(self, method: str, status: status_pb2.Status, seconds: float) -> None:
        code = code_pb2.Code.Name(status.code)
        metrics.calls.labels(method, code).inc()
        level = "debug" if status.code in (code_pb2.OK, code_pb2.CANCELLED) else "info"
        getattr(self._log, level)("call", code=code, message=status.message, milliseconds=round(seconds * 1000, 1))
