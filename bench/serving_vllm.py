"""The gateway beside a real vLLM asked directly: tokens a second, time to the first token. Goal: at least 98 % of its throughput.

SmolLM2-135M with random prompts of 100 words, 64 tokens an answer at most, greedy, all streamed, by clients that ask again once
they are answered. The ways take turns in each round, with the same prompts: no prefix is cached. Engine, gateway and clients
share the machine's cores: on few of them the gateway's CPU time is taken from the engine, as it is for users of such a machine.
BENCH_ENGINE_CORES=1 gives the engine so many for itself and the others the rest, as where cores are enough.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import grpc
from rich.console import Console
from rich.table import Table

from bench.measure import ROOT
from bench.serving import start_gateway
from fabrictune import local
from fabrictune.v1 import inference_pb2, inference_pb2_grpc

TOKENS, ROUNDS = 64, int(os.environ.get("BENCH_ROUNDS", "3"))
ENGINE_CORES = int(os.environ.get("BENCH_ENGINE_CORES", "0"))
"""0: all share all."""
CLIENTS = {1: 3, 8: 2, 32: 1}
"""Clients at a time → requests of each in a round."""
READY_SECONDS = 300
GOAL = 0.98
WORDS = "sun river table green seven walk music paper cold bright stone letter window"
Prompts = list[list[str]]
"""What each client asks, one after the other."""


class Found(NamedTuple):
    """One way, in one round."""

    tokens_per_second: float
    first_token: float
    """Median milliseconds to the first event."""


def run() -> bool:
    """Print the table; True: the goal is met with every number of clients."""
    with local.prepared_model("smollm2-135m-instruct") as (model, _), tempfile.TemporaryFile() as log:
        cores = sorted(os.sched_getaffinity(0))
        if not 0 <= ENGINE_CORES < len(cores):
            raise SystemExit(f"BENCH_ENGINE_CORES must be 0 to {len(cores) - 1}: there are {len(cores)}")
        os.sched_setaffinity(0, cores[: ENGINE_CORES or None])  # for the engine, which looks how many it has
        address, engine = _start_vllm(model, log)
        os.sched_setaffinity(0, cores[ENGINE_CORES:])
        try:
            return asyncio.run(_run(address))
        finally:
            os.sched_setaffinity(0, cores)
            engine.terminate()
            engine.wait()


async def _run(engine: str) -> bool:
    await _wait(engine)
    addresses, _, end_gateway = start_gateway(engine)
    address, port = addresses.split()
    ways: dict[str, Callable[[Prompts], Awaitable[Found]]] = {
        "vLLM directly": partial(_ask_http, engine),
        "gateway, HTTP": partial(_ask_http, address),
        "gateway, gRPC": partial(_ask_grpc, port),
    }
    where = f"cores for vLLM alone: {ENGINE_CORES}" if ENGINE_CORES else "all on the same cores"
    table = Table(title=f"{TOKENS} tokens an answer at most, median of {ROUNDS}, {where}", title_justify="left")
    for column in ("clients", "", "tokens/s", "of vLLM's in its round", "least to most", "first token ms"):
        table.add_column(column, justify="left" if not column else "right")
    good = True
    try:
        for way in ways.values():
            await way(_draw(1, 0))  # warm
        for clients in CLIENTS:
            rounds = [
                {name: await ways[name](_draw(clients, turn)) for name in _in_turn(list(ways), turn)}
                for turn in range(ROUNDS)
            ]
            for name in ways:
                speeds = [found[name].tokens_per_second for found in rounds]
                parts = [found[name].tokens_per_second / found["vLLM directly"].tokens_per_second for found in rounds]
                good &= statistics.median(parts) >= GOAL
                first = statistics.median(found[name].first_token for found in rounds)
                cells = (
                    *(f"{statistics.median(speeds):.0f}", f"{statistics.median(parts):.1%}"),
                    *(f"{min(parts):.0%} to {max(parts):.0%}", f"{first:.0f}"),
                )
                table.add_row(str(clients), name, *cells)
                print(clients, name, *cells, flush=True)
    finally:
        end_gateway()
    Console(width=120).print(table)
    print(f"goal: at least {GOAL:.0%} of vLLM's throughput; {'met' if good else 'missed'}")
    return good


def _in_turn(names: list[str], turn: int) -> list[str]:
    """Each is first as often as the others: the second and third of a round meet a machine that the first has warmed."""
    start = turn % len(names)
    return names[start:] + names[:start]


def _draw(clients: int, seed: int) -> Prompts:
    """The same for each way, whose answers then have as many tokens."""
    words = random.Random(seed)
    return [[" ".join(words.choices(WORDS.split(), k=100)) for _ in range(CLIENTS[clients])] for _ in range(clients)]


Ask = Callable[[str], Awaitable[tuple[float, int]]]
"""A prompt → (seconds to the first text, tokens of the answer)."""


async def _gather(prompts: Prompts, ask: Ask) -> Found:
    async def client(own: list[str]) -> list[tuple[float, int]]:
        return [await ask(prompt) for prompt in own]

    begin = time.perf_counter()
    answers = [answer for each in await asyncio.gather(*map(client, prompts)) for answer in each]
    seconds = time.perf_counter() - begin
    first = statistics.median(first for first, _ in answers)
    return Found(sum(tokens for _, tokens in answers) / seconds, first * 1000)


async def _ask_http(address: str, prompts: Prompts) -> Found:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(prompt: str) -> tuple[float, int]:
            body: dict[str, Any] = {"model": "x", "stream": True, "max_tokens": TOKENS, "temperature": 0}
            body["messages"] = [{"role": "user", "content": prompt}]
            body["stream_options"] = {"include_usage": True}
            begin, first, last = time.perf_counter(), 0.0, b""
            async with session.post(f"{address}/v1/chat/completions", json=body) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        last = line[6:]
                        first = first or (time.perf_counter() - begin if _says(last) else 0.0)
            return first, int(json.loads(last)["usage"]["completion_tokens"])

        return await _gather(prompts, ask)


def _says(event: bytes) -> bool:
    """Whether an event holds text, and not only the role."""
    choices = json.loads(event)["choices"]
    return bool(choices and choices[0]["delta"].get("content"))


async def _ask_grpc(port: str, prompts: Prompts) -> Found:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)

        async def ask(prompt: str) -> tuple[float, int]:
            request = inference_pb2.GenerateRequest(
                deployment="deployments/x",
                messages=[inference_pb2.Message(role="user", content=prompt)],
                sampling=inference_pb2.Sampling(max_tokens=TOKENS, temperature=0),
            )
            begin, first, tokens = time.perf_counter(), 0.0, 0
            async for piece in stub.Generate(request):
                first = first or (time.perf_counter() - begin if piece.text else 0.0)
                tokens = piece.usage.completion_tokens or tokens
            return first, tokens

        return await _gather(prompts, ask)


def _start_vllm(folder: Path, log: Any) -> tuple[str, subprocess.Popen[bytes]]:
    """The engine that a revision of this model would have, but that each way is to compute every prompt."""
    from services.inference.engine import describe_model, detect_hardware, render_engine
    from services.inference.spec import RevisionSpec

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = describe_model("models/x", "0" * 64, folder)
    spec = RevisionSpec(
        model="models/x", max_model_len=1024, max_concurrency=max(CLIENTS), engine_args=["--no-enable-prefix-caching"]
    )
    work = render_engine("x", "r-1", spec, model, detect_hardware())
    argv = [word.replace("{port}", str(port)) for word in work.argv]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **work.env}
    return f"http://127.0.0.1:{port}", subprocess.Popen(argv, env=env, stdout=log, stderr=log)


async def _wait(engine: str) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(READY_SECONDS):
            try:
                async with session.get(f"{engine}/health") as response:
                    if response.ok:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(1)
    raise RuntimeError(f"vLLM was not ready after {READY_SECONDS} s")
