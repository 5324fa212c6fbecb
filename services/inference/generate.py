"""A conversation's answer in pieces, for the gRPC side: the gateway's routes and engines, without its HTTP between.

Closing the generator (or cancelling the task that runs it) closes the connection to the engine, which then stops.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from services.common.errors import InvalidData, ResourceExhausted, Unavailable, WorkerLost
from services.inference.limits import check_prompt
from services.inference.openai_errors import dump_body, read_error
from services.inference.recorder import Recorder, Recording
from services.inference.routes import RouteTable
from services.inference.tools import render_tools

JSON = {"Content-Type": "application/json"}


@dataclass
class ToolCall:
    """A call of the answer; its arguments are a JSON object."""

    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Piece:
    """A part of the answer; the last one has the reason and the usage."""

    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tool_calls: Sequence[ToolCall] = field(default=())


async def generate(
    routes: RouteTable, session: aiohttp.ClientSession, model: str, messages: Sequence[Mapping[str, Any]],
    sampling: Mapping[str, Any], wait_seconds: float = 120.0, recorder: Recorder | None = None,
) -> AsyncGenerator[Piece, None]:  # fmt: skip
    """Stream an answer. model: as the gateway takes it; sampling: OpenAI's names, tools and what belongs to them among them.

    Raises NotFound, Unavailable (none is ready), InvalidData (the engine refuses it), InvalidSpec (tools that cannot be used),
    WorkerLost (it died meanwhile).
    """
    if not messages:
        raise InvalidData("there are no messages to answer")
    asked: dict[str, Any] = {**sampling, "messages": list(messages)}
    if asked.get("tools"):
        asked = render_tools(asked)
    note = routes.outcomes.note
    async with routes.hold(model, wait_seconds) as target:
        check_prompt(asked, target)
        body = {**asked, "model": target.served_name, "stream": True, "stream_options": {"include_usage": True}}
        answer, begin, first = _Answer(), time.perf_counter(), 0.0
        # As the client said it, like the gateway's: without the prompt that its tools became.
        said = dump_body({**sampling, "messages": list(messages), "model": model}) if recorder else b""
        recording = Recording(recorder, target.deployment, target.revision, "Generate", said)
        try:
            url, sent = f"{target.address}/v1/chat/completions", dump_body(body)
            async with session.post(url, data=sent, headers=JSON) as response:
                if response.status != 200:
                    raise _refusal(response.status, await response.text())
                rest = b""
                async for chunk in response.content.iter_any():
                    first = first or time.perf_counter() - begin
                    recording.add(chunk)
                    *lines, rest = (rest + chunk).split(b"\n")
                    if piece := answer.take(lines):
                        yield piece
                    if answer.ended:
                        recording.end()
                        break
        except asyncio.CancelledError:
            if not first:
                routes.outcomes.abandon(target.deployment, target.revision, time.perf_counter() - begin)
            raise
        except aiohttp.ClientConnectorError:
            note(target.deployment, target.revision, time.perf_counter() - begin, True)
            raise Unavailable(
                f"the engine of revision {target.revision} does not answer; it is started again"
            ) from None
        except WorkerLost:  # it says so itself: HTTP 5xx, or an error in the stream
            note(target.deployment, target.revision, first or time.perf_counter() - begin, True)
            raise
        except orjson.JSONDecodeError as error:
            note(target.deployment, target.revision, first, True)
            raise WorkerLost(
                f"the engine of revision {target.revision} sent what is not JSON in UTF-8 ({error}); ask again",
                reason_override="ENGINE_STREAM_INVALID",
            ) from None
        except (aiohttp.ClientError, TimeoutError):
            answer.ended = False
        finally:
            recording.close()
        note(target.deployment, target.revision, first, not answer.ended)
        if not answer.ended:
            raise WorkerLost(f"the engine of revision {target.revision} ended in the middle of the answer; ask again")


@dataclass
class _Answer:
    """What has come of an answer: its calls and its reason are told at the end."""

    ended: bool = False
    reason: str = ""
    calls: dict[int, ToolCall] = field(default_factory=dict)
    usage: Mapping[str, Any] = field(default_factory=dict)
    """Some engines tell it with each event; it counts at the end."""
    told: bool = False

    def take(self, lines: Sequence[bytes]) -> Piece | None:
        """What so many lines of the stream say: those that came together are one piece. Raises JSONDecodeError."""
        text = ""
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip()
            if not data or data.startswith(b":"):
                continue
            if data == b"[DONE]":
                self.ended = True
                break
            event = orjson.loads(data)
            if "error" in event:
                raise _refusal(*read_error(event))
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                self.reason = choice.get("finish_reason") or self.reason
                self._gather(delta.get("tool_calls") or ())
                text += delta.get("content") or ""
            self.usage = event.get("usage") or self.usage
        if self.usage and not self.told and (self.reason or self.ended):
            self.told = True
            counts = int(self.usage["prompt_tokens"]), int(self.usage.get("completion_tokens") or 0)
            return Piece(text, self.reason, *counts, tool_calls=[self.calls[n] for n in sorted(self.calls)])
        return Piece(text) if text else None

    def _gather(self, deltas: Sequence[Mapping[str, Any]]) -> None:
        """Put parts of calls together. Ours come whole; a parser that engine_args name may send them in parts."""
        for delta in deltas:
            call = self.calls.setdefault(delta["index"], ToolCall())
            function = delta.get("function") or {}
            call.id = delta.get("id") or call.id
            call.name += function.get("name") or ""
            call.arguments += function.get("arguments") or ""


def _refusal(status: int, text: str) -> InvalidData | ResourceExhausted | WorkerLost:
    try:
        said = str(orjson.loads(text)["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        said = text[:500]
    if status == 429:
        return ResourceExhausted(f"the engine has too much to do: {said}")
    if status < 500:
        return InvalidData(f"the engine refuses the request: {said}")
    return WorkerLost(f"the engine failed with HTTP {status}: {said}")
