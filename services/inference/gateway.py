"""The one HTTP address that users talk to: an OpenAI-style reverse proxy in front of the revisions' engines.

Requests and answers are passed on as they come, byte for byte, but for two things: "model" is what the engine calls it
there and what the client sent here, and a chat with `tools` goes on as AgentFabric's prompt (see `tools`). A client that
goes away takes its request at the engine with it. The client's token stays here: engines never see it.
"""

from __future__ import annotations

import math
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiohttp
import orjson
from aiohttp import web
from google.rpc import code_pb2
from prometheus_client import Counter

from services.common.errors import FabrictuneError, FailedPrecondition, InvalidData, Unauthenticated, Unavailable
from services.common.logs import get_logger
from services.common.metrics import REGISTRY
from services.inference.engine import IDLE_SECONDS
from services.inference.limits import check_prompt
from services.inference.recorder import WHOLE, Recorder, Recording
from services.inference.routes import RouteTable, Target
from services.inference.tools import render_tools

MAX_BODY_BYTES = 8 * 1024 * 1024
WAIT_SECONDS = 120.0
"""How long a request is held while its revision loads."""
RETRY_AFTER_SECONDS = 5
DRAIN_SECONDS = 10.0
CHAT = "/v1/chat/completions"

Authorize = Callable[[str], Awaitable[None]]
"""Takes the bearer token ("" when there is none); raises Unauthenticated or PermissionDenied."""

HTTP_ERRORS: Mapping[int, tuple[int, str]] = {
    code_pb2.INVALID_ARGUMENT: (400, "invalid_request_error"),
    code_pb2.UNAUTHENTICATED: (401, "authentication_error"),
    code_pb2.PERMISSION_DENIED: (403, "permission_error"),
    code_pb2.NOT_FOUND: (404, "not_found_error"),
    code_pb2.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    code_pb2.UNAVAILABLE: (503, "service_unavailable_error"),
    code_pb2.ABORTED: (502, "engine_error"),
}
"""google.rpc.Code → HTTP status and OpenAI's error type; anything else is a 500."""

DEPLOYMENT = web.RequestKey("deployment", str)

requests_ended = Counter(
    "fabrictune_gateway_requests_total", "Requests answered", ["deployment", "code"], registry=REGISTRY
)


class Gateway:
    """Serves the routes of a table. Use `start` and `close`."""

    def __init__(
        self, routes: RouteTable, authorize: Authorize | None = None, wait_seconds: float = WAIT_SECONDS,
        max_body_bytes: int = MAX_BODY_BYTES, recorder: Recorder | None = None,
    ) -> None:  # fmt: skip
        self._routes = routes
        self._authorize = authorize
        self._wait_seconds = wait_seconds
        self._max_body_bytes = max_body_bytes
        self._recorder = recorder
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None
        self._log = get_logger("gateway")

    async def start(self, host: str, port: int, ssl_context: ssl.SSLContext | None = None) -> int:
        """Listen; returns the port. Raises FailedPrecondition when the address cannot be had."""
        app = web.Application(client_max_size=self._max_body_bytes, middlewares=[self._answer_errors])
        app.router.add_get("/healthz", _healthz)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)
        app.router.add_post(CHAT, self._proxy)
        app.router.add_post("/v1/completions", self._proxy)
        # No limit of time: an answer may take minutes. A dead engine is noticed by its closed connection.
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
            auto_decompress=False,
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=DRAIN_SECONDS)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port, ssl_context=ssl_context, reuse_port=False).start()
        except OSError as error:
            await self.close()
            reason = error.strerror or str(error)
            raise FailedPrecondition(
                f"the gateway cannot listen on {host}:{port}: {reason}; set FABRICTUNE_GATEWAY_PORT to a free port"
            ) from None
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        """Take no more requests, let those in flight end (10 s), and stop."""
        if self._runner:
            await self._runner.cleanup()
        if self._session:
            await self._session.close()

    async def _models(self, request: web.Request) -> web.Response:
        await self._check_token(request)
        return _json({"object": "list", "data": [_model_card(name) for name in self._routes.models()]})

    async def _model(self, request: web.Request) -> web.Response:
        await self._check_token(request)
        model = request.match_info["model"]
        self._routes.choose(model)
        return _json(_model_card(model))

    async def _proxy(self, request: web.Request) -> web.StreamResponse:
        await self._check_token(request)
        raw = await request.read()
        body = read_body(raw)
        model = body["model"]
        asked = render_tools(body) if body.get("tools") and request.path == CHAT else body
        async with self._routes.hold(model, self._wait_seconds) as target:
            request[DEPLOYMENT] = target.deployment
            check_prompt(asked, target)
            renamed = model != target.served_name
            changed = renamed or asked is not body
            sent = orjson.dumps({**asked, "model": target.served_name}) if changed else raw
            return await self._forward(request, target, sent, model if renamed else "", raw)

    async def _forward(
        self, request: web.Request, target: Target, sent: bytes, rename: str, said: bytes
    ) -> web.StreamResponse:
        """sent: to the engine; said: by the client, which is what is recorded."""
        assert self._session is not None
        headers = {"Content-Type": "application/json", "Accept": request.headers.get("Accept", "*/*")}
        if request_id := request.headers.get("X-Request-Id"):
            headers["X-Request-Id"] = request_id
        response: web.StreamResponse | None = None
        recording = Recording(self._recorder, target.deployment, target.revision, request.path, said)
        begin = time.perf_counter()
        try:
            async with self._session.post(target.address + request.path, data=sent, headers=headers) as upstream:
                if not _is_stream(upstream):
                    whole = await upstream.read()
                    self._note(target, time.perf_counter() - begin, failed=upstream.status >= 500)
                    if upstream.status == 200:
                        recording.add(whole)
                        recording.end(WHOLE)
                    return web.Response(
                        body=_rename(whole, target.served_name, rename) if rename else whole,
                        status=upstream.status, headers=_response_headers(upstream, target),
                    )  # fmt: skip
                response = web.StreamResponse(status=upstream.status, headers=_response_headers(upstream, target))
                await response.prepare(request)
                rest, first = b"", 0.0
                async for chunk in upstream.content.iter_any():
                    first = first or time.perf_counter() - begin
                    if rename:
                        whole_lines, newline, rest = (rest + chunk).rpartition(b"\n")
                        chunk = _rename(whole_lines + newline, target.served_name, rename)
                    if chunk:
                        recording.add(chunk)
                        await response.write(chunk)
                recording.add(rest)
                recording.end()
                await response.write_eof(_rename(rest, target.served_name, rename) if rest else b"")
                self._note(target, first, failed=False)
                return response
        except aiohttp.ClientConnectorError:
            self._note(target, time.perf_counter() - begin, failed=True)
            raise Unavailable(
                f"the engine of revision {target.revision} does not answer; it is started again"
            ) from None
        except (aiohttp.ClientError, TimeoutError) as error:
            if request.transport is None or request.transport.is_closing():
                raise  # it was the client who went away
            self._note(target, time.perf_counter() - begin, failed=True)
            self._log.warning(
                "engine died in mid-answer", deployment=target.deployment, revision=target.revision, error=repr(error)
            )
            lost = EngineLost(f"the engine of revision {target.revision} ended in the middle of the answer; ask again")
            if response is None:
                raise lost from None
            # The status line has been sent: say it in the stream, as OpenAI does, and end without [DONE].
            await response.write(b"data: " + orjson.dumps(error_body(lost)) + b"\n\n")
            await response.write_eof()
            return response
        finally:
            recording.close()

    def _note(self, target: Target, seconds: float, failed: bool) -> None:
        self._routes.outcomes.note(target.deployment, target.revision, seconds, failed)

    async def _check_token(self, request: web.Request) -> None:
        if self._authorize is not None:
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            await self._authorize(token.strip() if scheme.lower() == "bearer" else "")

    @web.middleware
    async def _answer_errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        response = await self._answer(request, handler)
        requests_ended.labels(str(request.get(DEPLOYMENT, "")), str(response.status)).inc()
        return response

    async def _answer(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except FabrictuneError as error:
            return error_response(error)
        except web.HTTPRequestEntityTooLarge:
            text = f"the request's body is larger than {self._max_body_bytes} bytes"
            return _json(error_body(InvalidData(text)), status=413)
        except web.HTTPException as error:
            text = (
                f"{request.method} {request.path} is not served here; the paths are those of the OpenAI API under /v1"
            )
            return _json(error_body(InvalidData(text)), status=error.status)


class EngineLost(FabrictuneError):
    """The engine ended while it answered."""

    code, reason, exit_code = code_pb2.ABORTED, "ENGINE_LOST", 75


def read_body(raw: bytes) -> dict[str, Any]:
    """A request's body: a JSON object with a "model". Raises InvalidData."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidData(f"the request's body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidData("the request's body must be a JSON object")
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise InvalidData('the request has no "model"; GET /v1/models lists what there is')
    return body


def error_body(error: FabrictuneError) -> dict[str, Any]:
    """OpenAI's form of an error."""
    _, kind = HTTP_ERRORS.get(error.code, (500, "internal_error"))
    reason = error.reason_override or error.reason
    param = "model" if "model" in error.metadata else error.violations[0].field if error.violations else None
    return {"error": {"message": str(error), "type": kind, "param": param, "code": reason}}


def error_response(error: FabrictuneError) -> web.Response:
    """The same with its HTTP status."""
    status, _ = HTTP_ERRORS.get(error.code, (500, ""))
    pause = math.ceil(error.retry_seconds) or RETRY_AFTER_SECONDS
    headers = {"Retry-After": str(pause)} if status in (429, 503) else {}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return _json(error_body(error), status=status, headers=headers)


async def _healthz(_: web.Request) -> web.Response:
    return web.Response(text="ok\n")


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, headers=headers, content_type="application/json")


def _model_card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "fabrictune"}


def _is_stream(upstream: aiohttp.ClientResponse) -> bool:
    return upstream.content_type == "text/event-stream"


def _response_headers(upstream: aiohttp.ClientResponse, target: Target) -> dict[str, str]:
    headers = {
        "Content-Type": upstream.headers.get("Content-Type", "application/json"),
        "X-Fabrictune-Revision": target.revision,
    }
    headers |= {name: upstream.headers[name] for name in ("X-Request-Id", "Retry-After") if name in upstream.headers}
    if _is_stream(upstream):
        headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return headers


def _rename(data: bytes, served_name: str, wanted: str) -> bytes:
    """Put the client's name for the model back. Inside JSON strings quotes are escaped, so only the key can match."""
    name = orjson.dumps(wanted)
    for separator in (b":", b": "):
        data = data.replace(b'"model"' + separator + orjson.dumps(served_name), b'"model"' + separator + name)
    return data
