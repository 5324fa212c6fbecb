"""One request passed on to an engine and its answer passed back, byte for byte but for the model's name.

A stream goes on line by line, as engines write it: so a name is never put back into half a line, and what is not UTF-8
is noticed before a client's decoder breaks on it. A client that goes away takes its request at the engine with it.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from functools import partial

import aiohttp
import orjson
from aiohttp import web
from google.rpc import code_pb2

from services.common.errors import FabrictuneError, Unavailable
from services.common.logs import get_logger
from services.inference.openai_errors import error_body, read_error
from services.inference.outcomes import Outcomes
from services.inference.recorder import WHOLE, Recorder, Recording
from services.inference.routes import Target


class EngineLost(FabrictuneError):
    """The engine ended while it answered, or said what nobody can read."""

    code, reason, exit_code = code_pb2.ABORTED, "ENGINE_LOST", 75


class Forwarder:
    """Passes requests on to engines."""

    def __init__(self, session: aiohttp.ClientSession, outcomes: Outcomes, recorder: Recorder | None) -> None:
        self._session, self._outcomes, self._recorder = session, outcomes, recorder
        self._log = get_logger("gateway")

    async def forward(
        self, request: web.Request, target: Target, sent: bytes, wanted: str, said: bytes
    ) -> web.StreamResponse:
        """Answer a request. sent: to the engine; wanted: the name to put back, or ""; said: by the client, recorded.

        Raises Unavailable, EngineLost (before the answer has begun; later it is an event of the stream).
        """
        headers = {"Content-Type": "application/json", "Accept": request.headers.get("Accept", "*/*")}
        if request_id := request.headers.get("X-Request-Id"):
            headers["X-Request-Id"] = request_id
        there = target.served_name if target.says_served_name else ""
        rename = make_rename(there, wanted) if wanted else _as_it_is
        recording = Recording(self._recorder, target.deployment, target.revision, request.path, said)
        begin, first = time.perf_counter(), 0.0
        response: web.StreamResponse | None = None
        try:
            async with self._session.post(target.address + request.path, data=sent, headers=headers) as upstream:
                answered = _response_headers(upstream, target)
                if not _is_stream(upstream):
                    whole = await upstream.read()
                    if upstream.status == 200:
                        whole.decode()
                        recording.add(whole)
                        recording.end(WHOLE)
                    self._note(target, time.perf_counter() - begin, failed=upstream.status >= 500)
                    return web.Response(body=rename(whole), status=upstream.status, headers=answered)
                response = web.StreamResponse(status=upstream.status, headers=answered)
                await response.prepare(request)
                rest, code = b"", 0
                async for chunk in upstream.content.iter_any():
                    first = first or time.perf_counter() - begin
                    if rest or chunk[-1:] != b"\n":
                        lines, newline, rest = (rest + chunk).rpartition(b"\n")
                        chunk = lines + newline
                    if chunk:
                        chunk.decode()
                        chunk, code = cut_at_error(chunk)
                        chunk = rename(chunk)
                        recording.add(chunk)
                        await response.write(chunk)
                        if code:
                            rest = b""
                            break
                if rest:
                    rest.decode()
                    rest, code = cut_at_error(rest)
                    recording.add(rest)
                if not code:
                    recording.end()
                await response.write_eof(rename(rest))
                self._note(target, first, failed=code >= 500)
                return response
        except aiohttp.ClientConnectorError:
            self._note(target, time.perf_counter() - begin, failed=True)
            raise Unavailable(
                f"the engine of revision {target.revision} does not answer; it is started again"
            ) from None
        except UnicodeDecodeError as error:
            lost = EngineLost(
                f"the engine of revision {target.revision} sent what is not UTF-8 ({error.reason}); ask again",
                reason_override="ENGINE_STREAM_INVALID",
            )
        except asyncio.CancelledError:
            self._abandon(target, begin, first)
            raise
        except (aiohttp.ClientError, TimeoutError) as error:
            if request.transport is None or request.transport.is_closing():
                self._abandon(target, begin, first)
                raise  # it was the client who went away
            self._log.warning(
                "engine died in mid-answer", deployment=target.deployment, revision=target.revision, error=repr(error)
            )
            lost = EngineLost(f"the engine of revision {target.revision} ended in the middle of the answer; ask again")
        finally:
            recording.close()
        self._note(target, first or time.perf_counter() - begin, failed=True)
        if response is None:
            raise lost
        # The status line has been sent: say it in the stream, as OpenAI does, and end without [DONE]. The blank line ends
        # an event of which only a part came.
        await response.write(b"\ndata: " + orjson.dumps(error_body(lost)) + b"\n\n")
        await response.write_eof()
        return response

    def _abandon(self, target: Target, begin: float, first: float) -> None:
        if not first:
            self._outcomes.abandon(target.deployment, target.revision, time.perf_counter() - begin)

    def _note(self, target: Target, seconds: float, failed: bool) -> None:
        self._outcomes.note(target.deployment, target.revision, seconds, failed)


def cut_at_error(lines: bytes) -> tuple[bytes, int]:
    """Lines of a stream up to the engine's error, and its HTTP status; all of them and 0 where there is none.

    vLLM 0.32 ends a stream that it cannot go on with by an event `{"error": …}` and then says [DONE] nevertheless, as if all
    had been said (chat_completion/serving.py).
    """
    found = _ERROR.search(lines) if b'"error"' in lines else None
    if found is None:
        return lines, 0
    try:
        code, _ = read_error(orjson.loads(found[1]))
    except orjson.JSONDecodeError:
        code = 500
    return lines[: found.end()] + b"\n\n", code


_ERROR = re.compile(rb'^data: ?(\{"error".*)', re.MULTILINE)


def make_rename(served_name: str, wanted: str) -> Callable[[bytes], bytes]:
    """Puts the client's name for the model back. Inside JSON strings quotes are escaped, so only the key can match.

    served_name: "" puts it in any name's place.
    """
    there, here = orjson.dumps(served_name), orjson.dumps(wanted)
    if not served_name:
        return partial(_MODEL.sub, lambda _: b'"model":' + here)
    pairs = [(b'"model"' + gap + there, b'"model"' + gap + here) for gap in (b":", b": ")]

    def rename(data: bytes) -> bytes:
        for old, new in pairs:
            data = data.replace(old, new)
        return data

    return rename


_MODEL = re.compile(rb'"model": ?"(?:[^"\\]|\\.)*"')


def _as_it_is(data: bytes) -> bytes:
    return data


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
