"""Answers that come late, broken or in odd pieces: real gRPC and HTTP over sockets, and a scripted server for an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import aiohttp
import grpc
import openai
import orjson
import pytest
from aiohttp import web
from grpc_status import rpc_status

from fabrictune.v1 import inference_pb2, inference_pb2_grpc
from services.common.clusters.local import LocalCluster
from services.common.config import ServerConfig
from services.common.server import Server, service
from services.inference.engine import Hardware
from services.inference.gateway import Gateway
from services.inference.rollout import Rollout
from services.inference.routes import RouteTable, Target
from services.inference.service import InferenceService

DONE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1}}\n\ndata: [DONE]\n\n'
WORDS = "朝阳区🌤️今天晴"


@dataclass
class Script:
    """An engine that writes `parts` one by one, then waits for `release` if `hangs`."""

    parts: list[bytes] = field(default_factory=list)
    hangs: bool = False
    status: int = 200
    silent: bool = False
    """Nothing is sent, not even headers, before `release`."""
    release: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        if body["messages"][-1]["content"] == "another":
            return await self._write(request, [event("fine"), DONE])
        try:
            if self.silent:
                await self.release.wait()
            if self.status != 200:
                return web.Response(status=self.status)
            if not body.get("stream"):
                return web.Response(body=b"".join(self.parts), content_type="application/json")
            return await self._write(request, self.parts)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _write(self, request: web.Request, parts: list[bytes]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0.01)
        if self.hangs and parts is self.parts:
            await self.release.wait()
        return response


def event(text: str) -> bytes:
    return b"data: " + orjson.dumps({"model": "x", "choices": [{"index": 0, "delta": {"content": text}}]}) + b"\n\n"


@dataclass
class House:
    script: Script
    routes: RouteTable
    stub: inference_pb2_grpc.InferenceServiceStub
    url: str

    def generate(self, said: str = "hi", timeout: float | None = 20) -> Any:
        messages = [inference_pb2.Message(role="user", content=said)]
        return self.stub.Generate(
            inference_pb2.GenerateRequest(deployment="deployments/x", messages=messages), timeout=timeout
        )


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    script, routes = Script(), RouteTable()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", script.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    routes.put("x", {"a": Target("x", "a", "x", address, ready=True)}, {"a": 100})
    nothing: Any = None
    rollout = Rollout(LocalCluster(tmp_path), routes, nothing, Hardware(0, 2, 1 << 30))
    servicer = InferenceService(rollout, routes, nothing, "")
    add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    server = Server([service(servicer, add)], ServerConfig(port=0, metrics_port=0, drain_seconds=0), None)
    await server.start()
    gateway = Gateway(routes, wait_seconds=5)
    port = await gateway.start("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = cast("Any", inference_pb2_grpc.InferenceServiceStub)(channel)
        yield House(script, routes, stub, f"http://127.0.0.1:{port}/v1")
    script.release.set()
    await gateway.close()
    await server.close()
    await rollout.close()
    await runner.cleanup()


async def post(house: House, **body: Any) -> tuple[int, bytes]:
    asked = {"model": "x", "stream": True, "messages": [{"role": "user", "content": "hi"}], **body}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{house.url}/chat/completions", json=asked) as response,
    ):
        return response.status, await response.read()


@pytest.mark.parametrize("silent", [False, True], ids=["after a piece", "before the first byte"])
async def test_generate_ends_at_its_deadline_and_so_does_the_engines_work(house: House, silent: bool) -> None:
    house.script.parts, house.script.hangs, house.script.silent = [event("hi")], True, silent
    stream, pieces = house.generate(timeout=0.5), []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for piece in stream:
            pieces.append(piece.text)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert pieces == ([] if silent else ["hi"])
    await asyncio.wait_for(house.script.cancelled.wait(), 5)
    assert await house.routes.drained("x", "a", 5)
    assert "fine" in [p.text async for p in house.generate("another")]


async def test_a_deadline_that_ends_while_the_revision_loads_leaves_nobody_waiting(house: House) -> None:
    house.routes.put("x", {"a": Target("x", "a", "x", loading=True)}, {})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in house.generate(timeout=0.3):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    for _ in range(100):
        await asyncio.sleep(0.02)
        if not house.routes.waiting("x"):
            return
    raise AssertionError("it still waits")


async def test_a_client_that_cancels_generate_ends_the_engines_work_and_no_other_clients(house: House) -> None:
    house.script.parts, house.script.hangs = [event("hi")], True
    stream, other = house.generate(), house.generate()
    assert (await anext(aiter(stream))).text == (await anext(aiter(other))).text == "hi"
    stream.cancel()
    await asyncio.wait_for(house.script.cancelled.wait(), 5)
    assert house.routes.in_flight("x", "a") == 1
    house.script.parts.clear()
    house.script.release.set()


async def test_characters_that_arrive_in_parts_are_whole_in_both_answers(house: House) -> None:
    raw = event(WORDS) + DONE
    house.script.parts = [raw[i : i + 1] for i in range(len(raw))]
    assert await post(house) == (200, raw)
    assert await post(house, model="x@a") == (200, raw.replace(b'"model":"x"', b'"model":"x@a"'))
    assert "".join([piece.text async for piece in house.generate()]) == WORDS
    for house.script.parts in ([raw[:i], raw[i:]] for i in range(45, len(event(WORDS)), 5)):
        assert await post(house) == (200, raw)
        assert "".join([piece.text async for piece in house.generate()]) == WORDS


BROKEN = event(WORDS).replace("阳".encode(), "阳".encode()[:2])


async def test_a_stream_that_is_not_utf_8_ends_in_a_typed_error_and_the_next_one_is_answered(house: House) -> None:
    house.script.parts = [event("hi"), BROKEN, event("never seen"), DONE]
    status, raw = await post(house)
    first, _, told = raw.partition(b"\n\n")
    assert status == 200 and first + b"\n\n" == event("hi")
    assert orjson.loads(told.strip().removeprefix(b"data: "))["error"]["code"] == "ENGINE_STREAM_INVALID"
    raw.decode()

    pieces = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for piece in house.generate():
            pieces.append(piece.text)
    assert pieces == ["hi"] and caught.value.code() is grpc.StatusCode.ABORTED
    status_told = rpc_status.from_call(caught.value)
    assert status_told is not None and b"ENGINE_STREAM_INVALID" in status_told.details[0].value

    async with openai.AsyncOpenAI(base_url=house.url, api_key="EMPTY", max_retries=0) as client:
        asked: Any = {"model": "x", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        with pytest.raises(openai.APIError, match="not UTF-8"):
            async for _ in await client.chat.completions.create(**asked):
                pass
    assert "fine" in [p.text async for p in house.generate("another")]
    assert house.routes.in_flight("x", "a") == 0


async def test_a_whole_answer_that_is_not_utf_8_is_a_502(house: House) -> None:
    house.script.parts = [b'{"choices": [{"text": "\xe6\x9c"}]}']
    status, raw = await post(house, stream=False)
    assert status == 502 and orjson.loads(raw)["error"]["code"] == "ENGINE_STREAM_INVALID"


async def test_an_event_of_a_megabyte_passes(house: House) -> None:
    long = "晴" * 400_000
    raw = event(long) + DONE
    house.script.parts = [raw]
    assert await post(house) == (200, raw)
    assert "".join([piece.text async for piece in house.generate()]) == long


FAILED = (
    b'data: {"error": {"message": "EngineCore died", "type": "InternalServerError", "param": null, "code": 500}}\n\n'
)


async def test_an_engine_that_fails_in_mid_stream_and_says_done_has_failed(house: House) -> None:
    raw = event("hi") + FAILED + b"data: [DONE]\n\n"
    for tries, cut in enumerate(range(0, len(raw), 7), 1):
        house.script.parts = [raw[:cut], raw[cut:]]
        assert await post(house) == (200, event("hi") + FAILED)
        assert house.routes.outcomes.figures("x", "a").failures == tries
    house.script.parts = [event("hi"), FAILED.strip()]  # it breaks off there
    assert await post(house) == (200, event("hi") + FAILED)


async def test_generate_counts_an_engines_failure_in_mid_stream_and_before_it(house: House) -> None:
    house.script.parts = [event("hi"), FAILED, b"data: [DONE]\n\n"]
    pieces = []
    with pytest.raises(grpc.aio.AioRpcError, match="EngineCore died") as caught:
        async for piece in house.generate():
            pieces.append(piece.text)
    assert pieces == ["hi"] and caught.value.code() is grpc.StatusCode.ABORTED
    assert house.routes.outcomes.figures("x", "a").failures == 1
    house.script.status = 500
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in house.generate():
            pass
    assert house.routes.outcomes.figures("x", "a").failures == 2


async def test_what_an_engine_refuses_in_mid_stream_is_no_failure_of_its_revision(house: House) -> None:
    refused = FAILED.replace(b"500", b"400")
    house.script.parts = [event("hi"), refused, b"data: [DONE]\n\n"]
    assert await post(house) == (200, event("hi") + refused)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in house.generate():
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert house.routes.outcomes.figures("x", "a").failures == 0


@pytest.mark.parametrize("default", ['"\\ud83d"', "[" * 300 + "]" * 300, "[" * 1000 + "]" * 1000])
async def test_parameters_that_no_json_can_pass_on_are_an_invalid_argument(house: House, default: str) -> None:
    request = inference_pb2.GenerateRequest(
        deployment="deployments/x",
        messages=[inference_pb2.Message(role="user", content="hi")],
        tools=[inference_pb2.Tool(name="t", parameters=f'{{"type": "object", "default": {default}}}')],
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in house.stub.Generate(request):
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_number_over_64_bits_in_parameters_is_read_as_over_http(house: House) -> None:
    house.script.parts = [event("hi"), DONE]
    parameters = (
        '{"type": "object", "properties": {"a": {"type": "integer", "maximum": 123456789012345678901234567890}}}'
    )
    request = inference_pb2.GenerateRequest(
        deployment="deployments/x",
        messages=[inference_pb2.Message(role="user", content="hi")],
        tools=[inference_pb2.Tool(name="t", parameters=parameters)],
    )
    assert "".join([piece.text async for piece in house.stub.Generate(request)]) == "hi"
