"""A conversation's answer in pieces, for the gRPC side: the gateway's routes and engines, without its HTTP between.

Closing the generator (or cancelling the task that runs it) closes the connection to the engine, which then stops.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from services.common.errors import InvalidData, ResourceExhausted, Unavailable, WorkerLost
from services.inference.recorder import Recorder, Recording
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
    sampling: Mapping[str, Any], wait_seconds: float = 120.0, recorder: Recorder | None = None,
) -> AsyncGenerator[Piece, None]:  # fmt: skip
    """Stream an answer. model: as the gateway takes it; sampling: OpenAI's names.

    Raises NotFound, Unavailable (none is ready), InvalidData (the engine refuses it), WorkerLost (it died meanwhile).
    """
    if not messages:
        raise InvalidData("there are no messages to answer")
    async with routes.hold(model, wait_seconds) as target:
        body = {**sampling, "model": target.served_name, "messages": list(messages), "stream": True}
        body["stream_options"] = {"include_usage": True}
        reason, ended = "", False
        sent = orjson.dumps(body) if recorder else b""
        recording = Recording(recorder, target.deployment, target.revision, "Generate", sent)
        try:
            async with session.post(f"{target.address}/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    raise _refusal(response.status, await response.text())
                async for line in response.content:
                    data = line.strip().removeprefix(b"data:").strip()
                    if not data or data.startswith(b":"):
                        continue
                    recording.add(line)
                    if data == b"[DONE]":
                        ended = True
                        recording.end()
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
            raise Unavailable(
                f"the engine of revision {target.revision} does not answer; it is started again"
            ) from None
        except (aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError):
            ended = False
        finally:
            recording.close()
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
