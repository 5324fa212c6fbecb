"""How fast a target answers: time to the first token, tokens a second, and the whole request, over real prompts, streamed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from services.common.errors import InvalidData, Unavailable
from services.evaluation.ask import Address, Sampling, open_client, request_body
from services.evaluation.intervals import percentiles
from services.evaluation.questions import Question

PROMPTS = 32
"""As many prompts are streamed, the first ones of the suite, after one that only warms the server up."""


@dataclass(frozen=True)
class Timing:
    """One streamed answer. Seconds."""

    first_token: float
    whole: float
    tokens: int
    """By the server's count, else the pieces that came."""

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None for a single one."""
        rest = self.whole - self.first_token
        return (self.tokens - 1) / rest if self.tokens > 1 and rest > 0 else None


async def measure_latency(questions: Sequence[Question], address: Address, sampling: Sampling) -> dict[str, Any]:
    """{requests, concurrency, tokens, tokens_per_second_all, first_token, tokens_per_second, whole: {p50, p95}}.

    Raises Unavailable, InvalidData when an answer does not stream.
    """
    chosen = [q for q in questions if q.after is None][:PROMPTS]
    places = asyncio.Semaphore(sampling.concurrency)
    async with open_client(address, sampling) as http:

        async def ask(question: Question) -> Timing:
            async with places:
                body = request_body(address, sampling, [question], 0, {})
                return await _stream(http, address, question, body)

        await ask(chosen[0])
        begin = time.perf_counter()
        timings = await asyncio.gather(*(ask(question) for question in chosen))
        took = time.perf_counter() - begin
    rates = [rate for t in timings if (rate := t.tokens_per_second) is not None]
    return {
        "requests": len(timings),
        "concurrency": sampling.concurrency,
        "tokens": sum(t.tokens for t in timings),
        "tokens_per_second_all": round(sum(t.tokens for t in timings) / took, 2),
        "first_token": percentiles([t.first_token for t in timings]),
        "tokens_per_second": percentiles(rates),
        "whole": percentiles([t.whole for t in timings]),
    }


async def _stream(http: httpx.AsyncClient, address: Address, question: Question, body: Mapping[str, Any]) -> Timing:
    sent = {**body, "stream": True, "stream_options": {"include_usage": True}}
    begin = time.perf_counter()
    first, pieces, counted = 0.0, 0, 0
    try:
        async with http.stream("POST", "/chat/completions", json=sent) as answer:
            if answer.status_code != 200:
                said = address.hide_key((await answer.aread()).decode(errors="replace"))[:300]
                raise Unavailable(
                    f"{address.url} does not stream row {question.id} (HTTP {answer.status_code}: {said})"
                )
            async for line in answer.aiter_lines():
                if not line.startswith("data:") or line[5:].strip() == "[DONE]":
                    continue
                told = json.loads(line[5:])
                counted = (told.get("usage") or {}).get("completion_tokens") or counted
                if any(c["delta"].get("content") or c["delta"].get("tool_calls") for c in told.get("choices") or ()):
                    first = first or time.perf_counter() - begin
                    pieces += 1
    except httpx.HTTPError as error:
        said = address.hide_key(f"{type(error).__name__} {error}")
        raise Unavailable(f"{address.url} broke off row {question.id}: {said}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidData(f"{address.url} does not stream as an OpenAI server would") from None
    whole = time.perf_counter() - begin
    return Timing(first or whole, whole, counted or pieces)
