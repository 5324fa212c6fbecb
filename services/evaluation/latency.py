"""How fast a target answers: time to the first token, tokens a second, and the whole request, over real prompts, streamed."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from services.common.errors import InvalidData
from services.evaluation.ask import Address, Sampling, check_status, open_client, request_body, try_again
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

    Rows that the server refuses are not timed. Raises Unavailable, InvalidData when an answer does not stream.
    """
    chosen = [q for q in questions if q.after is None][:PROMPTS]
    places = asyncio.Semaphore(sampling.concurrency)
    async with open_client(address, sampling) as http:

        async def ask(question: Question, head: str) -> Timing | None:
            async with places:
                body = put_before(request_body(address, sampling, [question], 0, {}), head)
                return await try_again(address, question, lambda: _stream(http, address, question, body))

        await ask(chosen[0], secrets.token_hex(4))
        head, begin = secrets.token_hex(4), time.perf_counter()
        asked = await asyncio.gather(*(ask(question, head) for question in chosen))
        took = time.perf_counter() - begin
    timings = [timing for timing in asked if timing is not None]
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


def put_before(body: Mapping[str, Any], head: str) -> dict[str, Any]:
    """A request that no server knows by its beginning: of prompts that were asked before, as those of an evaluation are, vLLM
    keeps what it has computed, and the first token would come without most of the work.
    """
    first, *others = body["messages"]
    new = {**body, "messages": [{**first, "content": f"[{head}] {first['content']}"}, *others]}
    if "tools" in body:  # which may be rendered before all messages
        tool, *more = body["tools"]
        function = {**tool["function"], "description": f"[{head}] {tool['function'].get('description', '')}"}
        new["tools"] = [{**tool, "function": function}, *more]
    return new


async def _stream(
    http: httpx.AsyncClient, address: Address, question: Question, body: Mapping[str, Any]
) -> Timing | None:
    """None: the server refuses this row."""
    sent = {**body, "stream": True, "stream_options": {"include_usage": True}}
    begin = time.perf_counter()
    first, pieces, counted = 0.0, 0, 0
    try:
        async with http.stream("POST", "/chat/completions", json=sent) as answer:
            if answer.status_code != 200:
                await answer.aread()
                check_status(answer, address, question)
                return None
            async for line in _lines(answer):
                if not line.startswith("data:") or line[5:].strip() == "[DONE]":
                    continue
                told = json.loads(line[5:])
                counted = (told.get("usage") or {}).get("completion_tokens") or counted
                if any(c["delta"].get("content") or c["delta"].get("tool_calls") for c in told.get("choices") or ()):
                    first = first or time.perf_counter() - begin
                    pieces += 1
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidData(f"{address.url} does not stream as an OpenAI server would") from None
    whole = time.perf_counter() - begin
    return Timing(first or whole, whole, counted or pieces)


async def _lines(answer: httpx.Response) -> AsyncIterator[str]:
    """Its lines. httpx (0.28) also ends one at U+2028 and the like, which a model may say in the middle of an event."""
    rest = ""
    async for text in answer.aiter_text():
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield line
    yield rest
