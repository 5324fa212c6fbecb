"""The parity probe: does the engine compute what the model says? It must pass before a revision takes traffic.

The engine is given the reference's token ids and asked for the log-probabilities of the prompt itself, so nothing is
sampled and both see the same text. The top tokens must agree at ≥ 99 % of positions (where the reference's best two
lie closer than the dtype can tell apart, either is right) and the forced tokens' log-probabilities must be close on
average. Exact equality would refuse healthy GPUs.

An engine that takes no token ids is asked with the reference's conversations instead, and must see the same tokens: so its
chat template is compared, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from services.common.errors import FailedPrecondition, Unavailable
from services.inference.connections import OWN_REQUEST
from services.inference.reference import PROMPTS, Conversation, ForcedText, Reference
from services.inference.spec import Parity

TOLERANCE = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.1}
"""Largest mean difference of log-probabilities by the coarser dtype of the two, nats."""
TIE = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.25}
"""The best two tokens of the reference are a tie when they lie no further apart, nats: engines round logits to their dtype, and
bfloat16 has steps of 0.125 from 16 on, one for each of the two."""

OTHER_TOKENS = 8
"""So many at a prompt's end may be other ones: what a chat template adds to begin an answer."""


@dataclass(frozen=True)
class ParityResult:
    """Mirrors fabrictune.v1.ParityResult."""

    positions: int
    agreement: float
    """Part of positions at which the top tokens agree."""
    mean_logprob_difference: float
    """Nats; infinite when the engine computed NaN."""
    tolerance: float
    reference_dtype: str
    engine_dtype: str


@dataclass(frozen=True)
class EngineText:
    """What the engine says of one text; entry i is about token i + 1, as in ForcedText."""

    top: tuple[int, ...]
    logprobs: tuple[float, ...]


async def probe(
    session: aiohttp.ClientSession, address: str, served_name: str, reference: Reference, engine_dtype: str,
    parity: Parity, max_model_len: int = 0, forced_tokens: bool = True,
) -> ParityResult:  # fmt: skip
    """Ask the engine and compare. max_model_len: texts are cut to it if > 0. forced_tokens: it takes token ids as a prompt.

    Raises FailedPrecondition, Unavailable.
    """
    texts, asked = [], []
    if not forced_tokens:
        for turns, text in zip(PROMPTS, reference.sequences, strict=True):
            if turns[0][0] != "text":
                cut, said = await _ask_chat(session, address, served_name, turns, text)
                asked.append(cut)
                texts.append(said)
        return compare(asked, texts, reference.dtype, engine_dtype, parity)
    for text in reference.sequences:
        cut = cut_text(text, max_model_len - 1) if max_model_len else text
        asked.append(cut)
        texts.append(await _ask(session, address, served_name, cut))
    return compare(asked, texts, reference.dtype, engine_dtype, parity)


def compare(
    expected: list[ForcedText], found: list[EngineText], reference_dtype: str, engine_dtype: str, parity: Parity
) -> ParityResult:
    """Agreement and mean difference over all positions of all texts."""
    tolerance = parity.max_logprob_difference or max(TOLERANCE[reference_dtype], TOLERANCE[engine_dtype])
    tie = max(tolerance, TIE[reference_dtype], TIE[engine_dtype])
    positions = agreed = 0
    difference = 0.0
    for want, got in zip(expected, found, strict=True):
        for i, top in enumerate(got.top):
            tied = top == want.second[i] and want.margin[i] <= tie
            agreed += top == want.top[i] or tied
            difference += abs(got.logprobs[i] - want.logprobs[i])
        positions += len(got.top)
    mean = difference / positions
    return ParityResult(
        positions,
        agreed / positions,
        mean if math.isfinite(mean) else math.inf,
        tolerance,
        reference_dtype,
        engine_dtype,
    )


def check(result: ParityResult, parity: Parity) -> None:
    """Raises FailedPrecondition, reason PARITY_FAILED, when the engine is too far from the reference."""
    if result.agreement >= parity.min_agreement and result.mean_logprob_difference <= result.tolerance:
        return
    raise _failed(
        f"the engine ({result.engine_dtype}) does not compute what the model says: its top token agrees with the "
        f"reference's ({result.reference_dtype}) at {result.agreement:.2%} of {result.positions} positions (at least "
        f"{parity.min_agreement:.2%} wanted), log-probabilities differ by {result.mean_logprob_difference:.4f} nats on "
        f"average (at most {result.tolerance:g} allowed). It takes no traffic. Set dtype float32, take out engine_args "
        "that change the computation (compilation, quantization), or, if the difference is meant, loosen spec.parity",
        {"agreement": f"{result.agreement:.6f}", "mean_logprob_difference": f"{result.mean_logprob_difference:.6f}"},
    )


def cut_text(text: ForcedText, length: int) -> ForcedText:
    """The first `length` tokens: what is said of a position depends only on what stands before it."""
    n = max(2, length)
    return ForcedText(
        text.tokens[:n], text.top[: n - 1], text.second[: n - 1], text.margin[: n - 1], text.logprobs[: n - 1]
    )


async def _ask(session: aiohttp.ClientSession, address: str, served_name: str, text: ForcedText) -> EngineText:
    body = {"model": served_name, "prompt": list(text.tokens)}
    answer = await _post(session, f"{address}/v1/completions", body)
    return read_engine_text(text.tokens, answer["choices"][0].get("prompt_logprobs") or [])


async def _ask_chat(
    session: aiohttp.ClientSession, address: str, served_name: str, turns: Conversation, text: ForcedText
) -> tuple[ForcedText, EngineText]:
    """The part of the reference's text that is the engine's prompt, too, and what the engine says of it."""
    messages = [{"role": role, "content": content} for role, content in turns]
    body = {"model": served_name, "messages": messages, "return_details": True}
    answer = await _post(session, f"{address}/v1/chat/completions", body)
    tokens = [int(token) for token in answer.get("prompt_token_ids") or ()]
    both = min(len(tokens), len(text.tokens))
    shared = next((i for i in range(both) if tokens[i] != text.tokens[i]), both)
    if shared < max(2, both - OTHER_TOKENS):
        raise _failed(
            f"the engine renders another prompt than the model's chat template: of {both} tokens the first {shared} agree",
            {},
        )
    positions = (answer.get("prompt_logprobs") or [])[:shared]
    return cut_text(text, shared), read_engine_text(text.tokens[:shared], positions)


async def _post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> dict[str, Any]:
    asked = {**body, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
    try:
        async with session.post(url, json=asked, timeout=OWN_REQUEST) as response:
            if response.status != 200:
                said = (await response.text())[:500]
                raise _failed(f"the engine refused the parity probe with HTTP {response.status}: {said}", {})
            return dict(await response.json())
    except (aiohttp.ClientError, TimeoutError) as error:
        raise Unavailable(f"the engine went away during the parity probe, or did not end it: {error!r}") from None


def read_engine_text(tokens: tuple[int, ...], positions: list[Mapping[str, Mapping[str, Any]] | None]) -> EngineText:
    """VLLM's prompt_logprobs ([null, {token id: {logprob, rank}}, …]) as EngineText. Raises FailedPrecondition."""
    if len(positions) != len(tokens):
        raise _failed(
            f"the engine said something of {len(positions)} of {len(tokens)} tokens; is its vLLM another version?", {}
        )
    top, logprobs = [], []
    for token, position in zip(tokens[1:], positions[1:], strict=True):
        said = {int(key): value for key, value in (position or {}).items()}
        best = next((key for key, value in said.items() if value.get("rank") == 1), -1)
        logprob = said.get(token, {}).get("logprob")
        top.append(best)
        logprobs.append(math.inf if logprob is None or not math.isfinite(logprob) else float(logprob))
    return EngineText(tuple(top), tuple(logprobs))


def _failed(message: str, metadata: Mapping[str, str]) -> FailedPrecondition:
    return FailedPrecondition(message, metadata, reason_override="PARITY_FAILED")
