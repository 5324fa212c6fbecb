"""A conversation's answer in pieces, for the gRPC side: the gateway's routes and engines, without its HTTP between.

Closing the generator (or cancelling the task that runs it) closes the connection to the engine, which then stops.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from services.common.errors import InvalidData, ResourceExhausted, Unavailable, WorkerLost
from services.inference.gateway import check_prompt
from services.inference.routes import RouteTable


@dataclass(frozen=True)
class Piece:
    """A part of the answer; the last one has the reason and the usage."""

    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


async def generate(
    routes: RouteTable, session: aiohttp.ClientSession, model: str, messages: Sequence[Mapping[str, Any]],
    sampling: Mapping[str, Any], wait_seconds: float = 120.0,
) -> AsyncGenerator[Piece, None]:  # fmt: skip
    """Stream an answer. model: as the gateway takes it; sampling: OpenAI's names.

    Raises NotFound, Unavailable (none is ready), InvalidData (the engine refuses it), WorkerLost (it died meanwhile).
    """
    if not messages:
        raise InvalidData("there are no messages to answer")
    note = routes.outcomes.note
    async with routes.hold(model, wait_seconds) as target:
        check_prompt({"messages": list(messages)}, target)
        body = {**sampling, "model": target.served_name, "messages": list(messages), "stream": True}
        body["stream_options"] = {"include_usage": True}
        reason, ended, begin, first = "", False, time.perf_counter(), 0.0
        try:
            async with session.post(f"{target.address}/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    if response.status >= 500:
                        note(target.deployment, target.revision, time.perf_counter() - begin, True)
                    raise _refusal(response.status, await response.text())
                async for line in response.content:
                    first = first or time.perf_counter() - begin
                    data = line.strip().removeprefix(b"data:").strip()
                    if not data or data.startswith(b":"):
                        continue
                    if data == b"[DONE]":
                        ended = True
                        break
                    event = orjson.loads(data)
                    if "error" in event:
                        raise _refusal(int(event["error"].get("code") or 500), str(event["error"].get("message", "")))
                    for choice in event.get("choices") or []:
                        reason = choice.get("finish_reason") or reason
                        if text := choice["delta"].get("content"):
                            yield Piece(text=text)
                    if usage := event.get("usage"):
                        yield Piece("", reason, int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0))
        except aiohttp.ClientConnectorError:
            note(target.deployment, target.revision, time.perf_counter() - begin, True)
            raise Unavailable(
                f"the engine of revision {target.revision} does not answer; it is started again"
            ) from None
        except (aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError):
            ended = False
        note(target.deployment, target.revision, first, not ended)
        if not ended:
            raise WorkerLost(f"the engine of revision {target.revision} ended in the middle of the answer; ask again")


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
