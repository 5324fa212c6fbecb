"""The one HTTP address that users talk to: an OpenAI-style reverse proxy in front of the revisions' engines.

Requests and answers are passed on as they come, byte for byte (see `forward`), but for two things: "model" is what the
engine calls it there and what the client sent here, and a chat with `tools` goes on as AgentFabric's prompt (see `tools`).
The client's token stays here: engines never see it.
"""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import Counter

from services.common.errors import FabrictuneError, FailedPrecondition, InvalidData, internal_status
from services.common.logs import get_logger
from services.common.metrics import REGISTRY
from services.inference.connections import open_session
from services.inference.forward import Forwarder
from services.inference.limits import check_prompt
from services.inference.openai_errors import dump_body, error_body, error_response, json_response, read_body
from services.inference.recorder import Recorder
from services.inference.routes import RouteTable
from services.inference.tools import render_tools

MAX_BODY_BYTES = 8 * 1024 * 1024
WAIT_SECONDS = 120.0
"""How long a request is held while its revision loads."""
DRAIN_SECONDS = 10.0
CHAT = "/v1/chat/completions"

Authorize = Callable[[str, str], Awaitable[None]]
"""Takes the bearer token ("" when there is none) and the path; raises Unauthenticated or PermissionDenied."""

DEPLOYMENT = web.RequestKey("deployment", str)

requests_ended = Counter(
    "fabrictune_gateway_requests_total", "Requests answered", ["deployment", "code"], registry=REGISTRY
)


class Gateway:
    """Serves the routes of a table. Use `start` and `close`."""

    def __init__(
        self, routes: RouteTable, authorize: Authorize | None = None, wait_seconds: float = WAIT_SECONDS,
        max_body_bytes: int = MAX_BODY_BYTES, recorder: Recorder | None = None, drain_seconds: float = DRAIN_SECONDS,
    ) -> None:  # fmt: skip
        self._routes = routes
        self._authorize = authorize
        self._wait_seconds = wait_seconds
        self._max_body_bytes = max_body_bytes
        self._recorder = recorder
        self._log = get_logger("gateway")
        self._drain_seconds = drain_seconds
        self._session: aiohttp.ClientSession | None = None
        self._forwarder: Forwarder | None = None
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int, ssl_context: ssl.SSLContext | None = None) -> int:
        """Listen; returns the port. Raises FailedPrecondition when the address cannot be had."""
        app = web.Application(client_max_size=self._max_body_bytes, middlewares=[self._answer_errors])
        app.router.add_get("/healthz", _healthz)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)
        app.router.add_post(CHAT, self._proxy)
        app.router.add_post("/v1/completions", self._proxy)
        self._session = open_session(auto_decompress=False)
        self._forwarder = Forwarder(self._session, self._routes.outcomes, self._recorder)
        # aiohttp 3.14 waits twice: for the request to end, then for its handler. And 0 means for ever to it.
        twice = max(self._drain_seconds / 2, 0.01)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=twice)
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
        """Take no more requests, let those in flight end for `drain_seconds`, and stop."""
        if self._runner:
            await self._runner.cleanup()
        if self._session:
            await self._session.close()

    async def _models(self, request: web.Request) -> web.Response:
        await self._check_token(request)
        return json_response({"object": "list", "data": [_model_card(name) for name in self._routes.models()]})

    async def _model(self, request: web.Request) -> web.Response:
        await self._check_token(request)
        model = request.match_info["model"]
        self._routes.choose(model)
        return json_response(_model_card(model))

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
            sent = dump_body({**asked, "model": target.served_name}) if changed else raw
            assert self._forwarder is not None
            wanted = "" if not renamed and target.says_served_name else model
            return await self._forwarder.forward(request, target, sent, wanted, raw)

    async def _check_token(self, request: web.Request) -> None:
        if self._authorize is not None:
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            await self._authorize(token.strip() if scheme.lower() == "bearer" else "", request.path)

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
            return json_response(error_body(InvalidData(text)), status=413)
        except web.RequestPayloadError as error:
            return error_response(InvalidData(f"the request's body cannot be read: {error}"))
        except web.HTTPException as error:
            text = (
                f"{request.method} {request.path} is not served here; the paths are those of the OpenAI API under /v1"
            )
            return json_response(error_body(InvalidData(text)), status=error.status)
        except Exception as error:  # the process's rim: what nobody knew of is a typed 500
            if request.transport is None or request.writer.output_size:
                raise  # nobody hears it any more, or an answer has begun: the connection ends
            request_id = request.headers.get("X-Request-Id") or uuid.uuid4().hex[:16]
            self._log.error("unexpected", request_id=request_id, path=request.path, exc_info=error)
            return error_response(FabrictuneError(internal_status(request_id).message))


async def _healthz(_: web.Request) -> web.Response:
    return web.Response(text="ok\n")


def _model_card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "fabrictune"}
