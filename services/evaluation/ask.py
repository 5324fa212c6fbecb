"""Asks an OpenAI-compatible address, many questions at a time, and hands on each answer as it arrives."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

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
OF_ONE_ROW = frozenset({400, 413, 422})
"""A server that answers others says so of one row, such as a prompt that is too long for its model."""
FIRST = 5
"""When so many rows at the beginning are all refused, it is not the rows."""
REFUSALS: Mapping[int, type[FabrictuneError]] = {401: Unauthenticated, 403: PermissionDenied, 404: NotFound}

_HALF = re.compile("[\ud800-\udfff]")
T = TypeVar("T")


class Busy(Exception):
    """A server that may answer later."""

    def __init__(self, said: str, seconds: float) -> None:
        super().__init__(said)
        self.seconds = seconds
        """How long it asks to be left alone; 0: it does not say."""


@dataclass(frozen=True)
class Address:
    """Where to ask. url: the base address that ends in /v1; ca_file: an authority to trust beside the public ones."""

    url: str
    model: str
    api_key: str = field(default="", repr=False)
    ca_file: str = ""
    wire: Wire = field(default_factory=Wire)

    @property
    def server(self) -> Address:
        """Whom it asks, whatever the way."""
        return replace(self, wire=Wire())

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
    questions: Sequence[Question],
    addresses: Sequence[Address],
    sampling: Sampling,
    kept: Sequence[Mapping[str, Answer]] = (),
) -> AsyncIterator[tuple[int, Answer]]:
    """Answers with the index of who gave them, as they arrive; those that are kept already are not asked for again.

    addresses: one server and one model, asked in several ways. Each question is asked in all of them before the next one:
    where prompts are alike, the server still has the keys and values of the first.

    A row that the server refuses is an answer, too, unless each of the FIRST is refused and none was answered. Raises the
    first error; what is in flight is cancelled then.
    """
    known = [dict(kept[n]) if kept else {} for n in range(len(addresses))]
    chains = [chain for chain in chains_of(questions) if any(q.id not in each for q in chain for each in known)]
    first = {chain[0].id for chain in chains[:FIRST]}
    arrived: asyncio.Queue[tuple[int, Answer] | None] = asyncio.Queue()
    waiting = iter(chains)
    async with open_client(addresses[0], sampling) as http:

        async def ask(chain: Sequence[Question], way: int) -> None:
            address, answers = addresses[way], known[way]
            for number, question in enumerate(chain):
                if question.id in answers:
                    continue
                body = request_body(address, sampling, chain, number, answers)
                answer = answers[question.id] = await _post(http, address, question, body)
                if first <= answers.keys() and all(a.refused for a in answers.values()):
                    raise InvalidData(
                        f"{address.url} refuses row {question.id} ({answer.refused}), and all that came before"
                    )
                arrived.put_nowait((way, answer))

        async def work() -> None:
            for chain in waiting:
                for way in range(len(addresses)):
                    await ask(chain, way)

        workers = [asyncio.create_task(work()) for _ in range(min(sampling.concurrency, len(chains)))]
        done = asyncio.gather(*workers)
        done.add_done_callback(lambda _: arrived.put_nowait(None))
        try:
            while (found := await arrived.get()) is not None:
                yield found
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


async def try_again(address: Address, question: Question, attempt: Callable[[], Awaitable[T]]) -> T:
    """What an attempt returns; where the server is away or busy, another is made. Raises Unavailable after the last."""
    wait, said = 0.5, ""
    for number in range(TRIES):
        least = 0.0
        try:
            return await attempt()
        except httpx.HTTPError as error:
            said = address.hide_key(f"{type(error).__name__}: {error}".rstrip(": "))
        except Busy as busy:
            said, least = str(busy), busy.seconds
        if number + 1 < TRIES:
            await asyncio.sleep(min(max(wait, least), LONGEST_WAIT))
            wait = min(wait * 2, 10)
    raise Unavailable(f"{address.url} did not answer row {question.id} in {TRIES} tries; the last said {said}")


def check_status(answer: httpx.Response, address: Address, question: Question) -> str:
    """What a server says that refuses this row, "" when it answers. Raises Busy, and the error of what refuses every row."""
    if answer.status_code == 200:
        return ""
    said = f"HTTP {answer.status_code}: {address.hide_key(answer.text)[:300]}"
    if answer.status_code in TRY_AGAIN:
        raise Busy(said, _read_retry_after(answer))
    if answer.status_code not in OF_ONE_ROW:
        raise REFUSALS.get(answer.status_code, InvalidData)(f"{address.url} refuses row {question.id} ({said})")
    return said


async def _post(http: httpx.AsyncClient, address: Address, question: Question, body: Mapping[str, Any]) -> Answer:
    async def attempt() -> Answer:
        begin = time.perf_counter()
        answer = await http.post("/chat/completions", json=body)
        seconds = round(time.perf_counter() - begin, 3)
        if said := check_status(answer, address, question):
            return Answer(question.id, "", "", 0, seconds, refused=said, question=question.digest)
        return _read(question, answer, seconds, address, body.get("stop", ()))

    return await try_again(address, question, attempt)


def _read_retry_after(answer: httpx.Response) -> float:
    """Seconds; 0 without a number."""
    told = answer.headers.get("retry-after", "")
    return float(told) if told.isdigit() else 0.0


def _read(question: Question, answer: httpx.Response, seconds: float, address: Address, stop: Sequence[str]) -> Answer:
    try:
        # A model may say half a character: a byte that is no UTF-8, an escaped surrogate without its other half.
        told = json.loads(answer.content.decode("utf-8", "replace"))
        choice = told["choices"][0]
        text, reason = choice["message"].get("content") or "", choice["finish_reason"] or ""
        tokens = int((told.get("usage") or {}).get("completion_tokens") or 0)
        calls = _read_calls(question, choice["message"], address.wire)
        # vLLM tells by it what OpenAI's finish_reason does not: "stop" is also said of an answer that a stop string cut off.
        stopped_at = choice["stop_reason"] if choice.get("stop_reason") in stop else ""
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        said = address.hide_key(answer.text)[:200]
        raise InvalidData(f"{address.url} does not answer as an OpenAI server would: {said}") from None
    return Answer(
        question.id, _whole(text), _whole(reason), tokens, seconds, calls, stopped_at, question=question.digest
    )


def _read_calls(question: Question, message: Mapping[str, Any], wire: Wire) -> list[dict[str, str]] | None:
    if not wire.tools:
        return None
    functions = [call["function"] for call in message.get("tool_calls") or []]
    return [
        {"name": wire.read_name(question, _whole(f["name"])), "arguments": _whole(f["arguments"] or "{}")}
        for f in functions
    ]


def _whole(text: Any) -> str:
    """A text that can be written as UTF-8."""
    return _HALF.sub("\N{REPLACEMENT CHARACTER}", str(text))
