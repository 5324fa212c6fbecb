"""Asks an OpenAI-compatible address, many questions at a time, and hands on each answer as it arrives."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from services.evaluation.questions import Answer, Question, chains_of
from services.evaluation.wire import Wire

TRIES = 6
TIMEOUT = httpx.Timeout(600, connect=10)
LONGEST_WAIT = 60.0
"""Seconds between two tries, whatever a server's Retry-After says."""
TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
REFUSALS: Mapping[int, type[FabrictuneError]] = {401: Unauthenticated, 403: PermissionDenied, 404: NotFound}


@dataclass(frozen=True)
class Address:
    """Where to ask. url: the base address that ends in /v1; ca_file: an authority to trust beside the public ones."""

    url: str
    model: str
    api_key: str = field(default="", repr=False)
    ca_file: str = ""
    wire: Wire = field(default_factory=Wire)

    def hide_key(self, text: str) -> str:
        """A text without the key: servers quote it when they refuse it, and logs and errors may be read by any viewer."""
        return text.replace(self.api_key, "[API key]") if self.api_key else text


@dataclass(frozen=True)
class Sampling:
    """How a model answers. concurrency: requests in flight."""

    concurrency: int = 8
    max_tokens: int = 200
    temperature: float = 0.0


def open_client(address: Address, sampling: Sampling) -> httpx.AsyncClient:
    """A client for an address. Raises FailedPrecondition when its authority cannot be used."""
    # Without TLS no authorities are loaded: that takes longer than many an answer.
    context: ssl.SSLContext | bool = httpx.create_ssl_context() if address.url.startswith("https:") else False
    if isinstance(context, ssl.SSLContext) and address.ca_file:
        try:
            context.load_verify_locations(address.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise FailedPrecondition(f"the certificate authority {address.ca_file} cannot be used: {error}") from None
    return httpx.AsyncClient(
        base_url=address.url.rstrip("/"),
        headers={"authorization": f"Bearer {address.api_key or 'EMPTY'}"},
        timeout=TIMEOUT,
        limits=httpx.Limits(max_connections=sampling.concurrency),
        verify=context,
    )


async def ask_all(
    questions: Sequence[Question], address: Address, sampling: Sampling, kept: Mapping[str, Answer] | None = None
) -> AsyncIterator[Answer]:
    """Answers, in the order in which they arrive; those that are kept already are not asked for again.

    Raises the first error; what is in flight is cancelled then.
    """
    known = dict(kept or {})
    chains = [chain for chain in chains_of(questions) if any(q.id not in known for q in chain)]
    arrived: asyncio.Queue[Answer | None] = asyncio.Queue()
    waiting = iter(chains)
    async with open_client(address, sampling) as http:

        async def work() -> None:
            for chain in waiting:
                for number, question in enumerate(chain):
                    if question.id not in known:
                        body = request_body(address, sampling, chain, number, known)
                        known[question.id] = await _post(http, address, question, body)
                        arrived.put_nowait(known[question.id])

        workers = [asyncio.create_task(work()) for _ in range(min(sampling.concurrency, len(chains)))]
        done = asyncio.gather(*workers)
        done.add_done_callback(lambda _: arrived.put_nowait(None))
        try:
            while (answer := await arrived.get()) is not None:
                yield answer
            await done
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, done, return_exceptions=True)


def request_body(
    address: Address, sampling: Sampling, chain: Sequence[Question], number: int, answers: Mapping[str, Answer]
) -> dict[str, Any]:
    """What is sent for one question."""
    asked = address.wire.body(chain, number, answers)
    return {
        **asked,
        "model": address.model,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
    }


async def _post(http: httpx.AsyncClient, address: Address, question: Question, body: Mapping[str, Any]) -> Answer:
    wait, said = 0.5, ""
    for attempt in range(TRIES):
        begin, least = time.perf_counter(), 0.0
        try:
            answer = await http.post("/chat/completions", json=body)
        except httpx.HTTPError as error:
            said = address.hide_key(f"{type(error).__name__}: {error}".rstrip(": "))
        else:
            if answer.status_code == 200:
                return _read(question, answer, time.perf_counter() - begin, address)
            said = f"HTTP {answer.status_code}: {address.hide_key(answer.text)[:300]}"
            if answer.status_code not in TRY_AGAIN:
                raise REFUSALS.get(answer.status_code, InvalidData)(f"{address.url} refuses row {question.id} ({said})")
            least = _read_retry_after(answer)
        if attempt + 1 < TRIES:
            await asyncio.sleep(min(max(wait, least), LONGEST_WAIT))
            wait = min(wait * 2, 10)
    raise Unavailable(f"{address.url} did not answer row {question.id} in {TRIES} tries; the last said {said}")


def _read_retry_after(answer: httpx.Response) -> float:
    """Seconds; 0 without a number."""
    told = answer.headers.get("retry-after", "")
    return float(told) if told.isdigit() else 0.0


def _read(question: Question, answer: httpx.Response, seconds: float, address: Address) -> Answer:
    try:
        told = answer.json()
        choice = told["choices"][0]
        text, reason = choice["message"].get("content") or "", choice["finish_reason"] or ""
        tokens = (told.get("usage") or {}).get("completion_tokens") or 0
        calls = _read_calls(question, choice["message"], address.wire)
    except (json.JSONDecodeError, KeyError, IndexError, TypeError, AttributeError):
        said = address.hide_key(answer.text)[:200]
        raise InvalidData(f"{address.url} does not answer as an OpenAI server would: {said}") from None
    return Answer(question.id, str(text), str(reason), int(tokens), round(seconds, 3), calls, question.digest)


def _read_calls(question: Question, message: Mapping[str, Any], wire: Wire) -> list[dict[str, str]] | None:
    if not wire.tools:
        return None
    functions = [call["function"] for call in message.get("tool_calls") or []]
    return [{"name": wire.read_name(question, f["name"]), "arguments": f["arguments"] or "{}"} for f in functions]
