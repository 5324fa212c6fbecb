"""Asks an OpenAI-compatible address as AgentFabric's RolePlay does, many prompts at a time, and keeps each answer at once."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from services.common.errors import (
    FabrictuneError,
    FailedPrecondition,
    InvalidData,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)

# What modelscope-agent 0.7.1 sends with every request (agents/role_play.py).
STOP = ("Observation:", "Observation:\n")
TRIES = 6
TIMEOUT = httpx.Timeout(600, connect=10)
TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
REFUSALS: Mapping[int, type[FabrictuneError]] = {401: Unauthenticated, 403: PermissionDenied, 404: NotFound}


@dataclass(frozen=True)
class Question:
    """One held-out prompt and what is expected of the answer."""

    id: str
    messages: Sequence[Mapping[str, str]]
    tools: Sequence[Mapping[str, Any]]
    expected: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What came back. seconds: wall time of the request."""

    id: str
    text: str
    finish_reason: str
    completion_tokens: int
    seconds: float


@dataclass(frozen=True)
class Address:
    """Where to ask. url: the base address that ends in /v1; ca_file: an authority to trust beside the public ones."""

    url: str
    model: str
    api_key: str = ""
    ca_file: str = ""


async def ask_all(
    questions: Sequence[Question], address: Address, *, concurrency: int, max_tokens: int, temperature: float
) -> AsyncIterator[Answer]:
    """Answers, in the order in which they arrive. Raises the first error; what is in flight is cancelled then."""
    headers = {"authorization": f"Bearer {address.api_key or 'EMPTY'}"}
    places = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(
        base_url=address.url.rstrip("/"), headers=headers, timeout=TIMEOUT, limits=limits, verify=_trust(address)
    ) as http:

        async def ask(question: Question) -> Answer:
            async with places:
                body = {
                    "model": address.model,
                    "messages": list(question.messages),
                    "stop": list(STOP),
                    "temperature": temperature,
                    "max_tokens": max_tokens,
                }
                return await _post(http, address, question.id, body)

        tasks = [asyncio.create_task(ask(q)) for q in questions]
        try:
            for task in asyncio.as_completed(tasks):
                yield await task
        finally:
            for pending in tasks:
                pending.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _trust(address: Address) -> ssl.SSLContext:
    context = httpx.create_ssl_context()
    if address.ca_file:
        try:
            context.load_verify_locations(address.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise FailedPrecondition(f"the certificate authority {address.ca_file} cannot be used: {error}") from None
    return context


async def _post(http: httpx.AsyncClient, address: Address, row_id: str, body: Mapping[str, Any]) -> Answer:
    wait, said = 0.5, ""
    for attempt in range(TRIES):
        begin = time.perf_counter()
        try:
            answer = await http.post("/chat/completions", json=body)
        except httpx.HTTPError as error:
            said = f"{type(error).__name__}: {error}".rstrip(": ")
        else:
            if answer.status_code == 200:
                return _read(row_id, answer, time.perf_counter() - begin, address)
            said = f"HTTP {answer.status_code}: {answer.text[:300]}"
            if answer.status_code not in TRY_AGAIN:
                raise REFUSALS.get(answer.status_code, InvalidData)(f"{address.url} refuses row {row_id} ({said})")
        if attempt + 1 < TRIES:
            await asyncio.sleep(wait)
            wait = min(wait * 2, 10)
    raise Unavailable(f"{address.url} did not answer row {row_id} in {TRIES} tries; the last said {said}")


def _read(row_id: str, answer: httpx.Response, seconds: float, address: Address) -> Answer:
    try:
        told = answer.json()
        choice = told["choices"][0]
        text, reason = choice["message"]["content"] or "", choice["finish_reason"] or ""
        tokens = (told.get("usage") or {}).get("completion_tokens") or 0
    except (json.JSONDecodeError, KeyError, IndexError, TypeError):
        raise InvalidData(f"{address.url} does not answer as an OpenAI server would: {answer.text[:200]}") from None
    return Answer(row_id, str(text), str(reason), int(tokens), round(seconds, 3))
