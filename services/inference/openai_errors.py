"""Our errors in OpenAI's form and as HTTP statuses, and what of a request's body is checked before anything else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web
from google.rpc import code_pb2

from services.common.errors import FabrictuneError, InvalidData, Unauthenticated

RETRY_AFTER_SECONDS = 5

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


def dump_body(body: Mapping[str, Any]) -> bytes:
    """A request's body for an engine. Raises InvalidData where orjson, which reads more than it writes, cannot write it."""
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        raise InvalidData(
            f"the request cannot be passed on ({error}): JSON may have 254 levels, whole characters, integers of 64 bits"
        ) from None


def error_body(error: FabrictuneError) -> dict[str, Any]:
    """OpenAI's form of an error."""
    _, kind = HTTP_ERRORS.get(error.code, (500, "internal_error"))
    reason = error.reason_override or error.reason
    param = "model" if "model" in error.metadata else error.violations[0].field if error.violations else None
    return {"error": {"message": str(error), "type": kind, "param": param, "code": reason}}


def read_error(event: Mapping[str, Any]) -> tuple[int, str]:
    """(HTTP status, message) of an engine's `{"error": …}`. One that names no status is the engine's own failure: 500."""
    error = event["error"]
    told = error if isinstance(error, dict) else {"message": error}
    code = told.get("code")
    return code if isinstance(code, int) and code else 500, str(told.get("message") or "")


def error_response(error: FabrictuneError) -> web.Response:
    """The same with its HTTP status."""
    status, _ = HTTP_ERRORS.get(error.code, (500, ""))
    pause = math.ceil(error.retry_seconds) or RETRY_AFTER_SECONDS
    headers = {"Retry-After": str(pause)} if status in (429, 503) else {}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error_body(error), status=status, headers=headers)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A response of JSON."""
    return web.Response(body=orjson.dumps(value), status=status, headers=headers, content_type="application/json")
