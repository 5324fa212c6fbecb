"""The gateway's HTTP path and gRPC's Generate beside the upstream asked directly, on an upstream that streams at a fixed rate.

The fixed rate keeps two cores from hiding the gateway's own cost: what it adds is CPU time and milliseconds to the first
byte, not throughput. Upstream and gateway are processes of their own; clients run in this one. With all of them on two cores,
256 clients that come within one pause wait for CPU time, also where the upstream is asked directly.
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
CLIENTS = (1, 8, 32, 256)
END = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":20}}\n\ndata: [DONE]\n\n'
TOKEN = b'data: {"id":"c","model":"x","choices":[{"index":0,"delta":{"content":" token"}}]}\n\n'


def run() -> bool:
    """Print the table."""
    asyncio.run(_run())
    return True


async def _run() -> None:
    upstream, _, end_upstream = _start(_upstream, "")
    addresses, gateway_cpu, end_gateway = start_gateway(upstream)
    address, port = addresses.split()
    table = Table(title=f"{TOKENS} tokens a stream, one each {PAUSE * 1000:.0f} ms", title_justify="left")
    for column in ("clients", "direct p50 ms", "HTTP added ms", "CPU µs / token", "gRPC added ms", "CPU µs / token"):
        table.add_column(column, justify="right")
    ways: list[Callable[[int], Awaitable[float]]] = [partial(_measure, address), partial(_measure_grpc, port)]
    try:
        for way in ways:
            await way(1)  # warm
        for clients in CLIENTS:
            direct = await _measure(upstream, clients)
            row = [str(clients), f"{direct:.2f}"]
            for way in ways:
                before = gateway_cpu()
                through = await way(clients)
                cost = (gateway_cpu() - before) / (clients * TOKENS) * 1e6
                row += [f"{through - direct:.2f}", f"{cost:.0f}"]
            table.add_row(*row)
    finally:
        end_gateway()
        end_upstream()
    Console().print(table)


async def _measure(address: str, clients: int) -> float:
    """Median milliseconds to the first byte of `clients` streams, which start spread over one pause."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def ask(number: int) -> float:
            await asyncio.sleep(PAUSE * number / clients)
            begin = time.perf_counter()
            body = {"model": "x", "stream": True}
            async with session.post(f"{address}/v1/chat/completions", json=body) as response:
                await response.content.readany()
                first = time.perf_counter() - begin
                await response.read()
                return first * 1000

        return statistics.median(await asyncio.gather(*(ask(i) for i in range(clients))))


async def _measure_grpc(port: str, clients: int) -> float:
    """The same of Generate."""
    asked = inference_pb2.GenerateRequest(
        deployment="deployments/x", messages=[inference_pb2.Message(role="user", content="hi")]
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)

        async def ask(number: int) -> float:
            await asyncio.sleep(PAUSE * number / clients)
            begin, first = time.perf_counter(), 0.0
            async for _ in stub.Generate(asked):
                first = first or time.perf_counter() - begin
            return first * 1000

        return statistics.median(await asyncio.gather(*(ask(i) for i in range(clients))))


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
