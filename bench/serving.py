"""The gateway's HTTP path and gRPC's Generate beside the upstream asked directly, on an upstream that streams at a fixed rate.

The fixed rate keeps two cores from hiding the gateway's own cost: what it adds is CPU time and milliseconds to the first
byte, not throughput. Upstream and gateway are processes of their own; clients run in this one. A client asks again once it is
answered, over the connection that it has, and clients begin spread over one answer; in the last row all of them begin within
one pause, and wait for CPU time on two cores also where the upstream is asked directly.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import aiohttp
import grpc
from aiohttp import web
from rich.console import Console
from rich.table import Table

from fabrictune.v1 import inference_pb2, inference_pb2_grpc

TOKENS, PAUSE = 20, 0.2
LOADS = ((1, 12, TOKENS), (8, 5, TOKENS), (32, 3, TOKENS), (256, 3, TOKENS), (256, 1, 1))
"""Clients at a time, requests of each, and how many pauses their begins are spread over."""
GOAL = 2.0
"""Milliseconds to the first byte that the gateway may add, with any number of clients that are not all new."""
END = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":20}}\n\ndata: [DONE]\n\n'
TOKEN = b'data: {"id":"c","model":"x","choices":[{"index":0,"delta":{"content":" token"}}]}\n\n'


def run() -> bool:
    """Print the table; True: the goal is met."""
    return asyncio.run(_run())


async def _run() -> bool:
    upstream, _, end_upstream = _start(_upstream, "")
    addresses, gateway_cpu, end_gateway = start_gateway(upstream)
    address, port = addresses.split()
    title = f"{TOKENS} tokens a stream, one each {PAUSE * 1000:.0f} ms; milliseconds to the first byte, CPU µs a token"
    table = Table(title=title, title_justify="left")
    for column in ("clients", "requests", "direct p50", "HTTP added p50", "CPU", "gRPC added p50", "CPU"):
        table.add_column(column, justify="right")
    ways: list[Way] = [partial(_ask_http, address), partial(_ask_grpc, port)]
    good = True
    try:
        for clients, each, spread in LOADS:
            direct = await _ask_http(upstream, clients, each, spread)
            row = [f"{clients}{' at once' if spread == 1 else ''}", str(clients * each), f"{direct:.2f}"]
            for way in ways:
                before = gateway_cpu()
                added = await way(clients, each, spread) - direct
                good &= added <= GOAL or spread == 1
                cost = (gateway_cpu() - before) / (clients * each * TOKENS) * 1e6
                row += [f"{added:.2f}", f"{cost:.0f}"]
            table.add_row(*row)
            print(*row, flush=True)
    finally:
        end_gateway()
        end_upstream()
    Console(width=100).print(table)
    print(f"goal: at most {GOAL:g} ms added, but for the last row; {'met' if good else 'missed'}")
    return good


Way = Callable[[int, int, int], Awaitable[float]]
"""(clients, requests of each, pauses that their begins are spread over) → median milliseconds to the first byte."""


async def _gather(clients: int, each: int, spread: int, ask: Callable[[], Awaitable[float]]) -> float:
    async def client(number: int) -> list[float]:
        await asyncio.sleep(PAUSE * spread * number / clients)
        return [await ask() for _ in range(each)]

    answers = await asyncio.gather(*map(client, range(clients)))
    return statistics.median(seconds * 1000 for own in answers for seconds in own)


async def _ask_http(address: str, clients: int, each: int, spread: int) -> float:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask() -> float:
            begin = time.perf_counter()
            body = {"model": "x", "stream": True}
            async with session.post(f"{address}/v1/chat/completions", json=body) as response:
                await response.content.readany()
                first = time.perf_counter() - begin
                await response.read()
                return first

        return await _gather(clients, each, spread, ask)


async def _ask_grpc(port: str, clients: int, each: int, spread: int) -> float:
    asked = inference_pb2.GenerateRequest(
        deployment="deployments/x", messages=[inference_pb2.Message(role="user", content="hi")]
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)

        async def ask() -> float:
            begin, first = time.perf_counter(), 0.0
            async for _ in stub.Generate(asked):
                first = first or time.perf_counter() - begin
            return first

        return await _gather(clients, each, spread, ask)


def _start(
    target: Callable[[Connection, str], None], upstream: str
) -> tuple[str, Callable[[], float], Callable[[], None]]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(theirs, upstream), daemon=True)
    process.start()
    address = ours.recv()

    def cpu() -> float:
        ours.send("cpu")
        return float(ours.recv())

    return address, cpu, process.kill


def start_gateway(upstream: str) -> tuple[str, Callable[[], float], Callable[[], None]]:
    """A gateway of its own process in front of an address: ("http://… gRPC-port", seconds of CPU so far, what ends it).

    Its only deployment is `x`, which the upstream calls x too.
    """
    return _start(_gateway, upstream)


def _upstream(pipe: Connection, _: str) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(TOKENS):
            await response.write(TOKEN)
            await asyncio.sleep(PAUSE)
        await response.write(END)
        return response

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        pipe.send(f"http://127.0.0.1:{runner.addresses[0][1]}")
        await asyncio.Event().wait()

    asyncio.run(serve())


def _gateway(pipe: Connection, upstream: str) -> None:
    from services.common.clusters.local import LocalCluster
    from services.common.config import ServerConfig
    from services.common.logs import configure
    from services.common.server import Server, service
    from services.inference.engine import Hardware
    from services.inference.gateway import Gateway
    from services.inference.rollout import Rollout
    from services.inference.routes import RouteTable, Target
    from services.inference.service import InferenceService

    async def serve() -> None:
        routes = RouteTable()
        routes.put("x", {"a": Target("x", "a", "x", upstream, ready=True)}, {"a": 100})
        gateway, nothing = Gateway(routes), cast("Any", None)
        configure("json", "WARNING")
        rollout = Rollout(LocalCluster(Path()), routes, nothing, Hardware(0, 1, 1))
        added = service(
            InferenceService(rollout, routes, nothing, ""), inference_pb2_grpc.add_InferenceServiceServicer_to_server
        )
        server = Server([added], ServerConfig(port=0, metrics_port=0), None)
        await server.start()
        pipe.send(f"http://127.0.0.1:{await gateway.start('127.0.0.1', 0)} {server.port}")
        while await asyncio.to_thread(pipe.recv):
            used = resource.getrusage(resource.RUSAGE_SELF)
            pipe.send(used.ru_utime + used.ru_stime)

    asyncio.run(serve())
