from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import aiohttp
import orjson
import pytest
from aiohttp import web

from services.common.errors import PermissionDenied, ResourceExhausted, Unauthenticated
from services.inference import outcomes
from services.inference.gateway import Gateway
from services.inference.generate import generate
from services.inference.routes import RouteTable, Target
from services.inference.tools import render_tools

CALL_IN_PARTS = (
    {"delta": {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "amap_weather", "arguments": ""}}]}},
    {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}},
    {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}, "finish_reason": "tool_calls"},
)


@dataclass
class Upstream:
    """A real HTTP server that stands where engines stand and keeps what it was sent."""

    address: str = ""
    bodies: list[dict[str, object]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.raw.append(await request.read())
        body = orjson.loads(self.raw[-1])
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if not body.get("stream"):
            return web.json_response({"model": body["model"], "choices": [{"text": 'he said "model":"x"'}]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        # Cut in the middle of the name, so that putting it back must wait for the line's end.
        await response.write(b'data: {"model":"' + str(body["model"]).encode()[:1])
        await asyncio.sleep(0.01)
        rest = b'","choices":[{"delta":{"content":"hi"},"finish_reason":"stop"}]}\n\n'
        await response.write(str(body["model"]).encode()[1:] + rest)
        if body.get("calls"):
            for part in CALL_IN_PARTS:
                await response.write(b"data: " + orjson.dumps({"choices": [part]}) + b"\n\n")
        try:
            if body.get("die"):
                assert request.transport is not None
                request.transport.abort()
                return response
            if body.get("hang"):
                await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        await response.write(
            b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1}}\n\ndata: [DONE]\n\n'
        )
        return response


@dataclass
class Served:
    url: str
    upstream: Upstream
    routes: RouteTable
    session: aiohttp.ClientSession


async def _authorize(token: str, path: str) -> None:
    if token == "viewer" and not path.startswith("/v1/models"):
        raise PermissionDenied("a viewer asks no model")
    if token == "broken":
        raise RuntimeError("a secret")
    if token not in ("good", "viewer"):
        raise Unauthenticated("this server asks for a token")


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    upstream = Upstream()
    app = web.Application()
    app.router.add_post("/v1/{rest:.*}", upstream.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    upstream.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    routes = RouteTable()
    routes.put("x", {"a": target("a", upstream.address)}, {"a": 100})
    gateway = Gateway(routes, authorize=_authorize, wait_seconds=1, max_body_bytes=2000)
    port = await gateway.start("127.0.0.1", 0)
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer good"}) as session:
        yield Served(f"http://127.0.0.1:{port}", upstream, routes, session)
    await gateway.close()
    await runner.cleanup()


def target(revision: str, address: str = "", loading: bool = False) -> Target:
    return Target("x", revision, "x", address, ready=bool(address), loading=loading)


async def post(served: Served, **body: object) -> tuple[int, dict[str, str], bytes]:
    async with served.session.post(f"{served.url}/v1/chat/completions", json=body) as response:
        return response.status, dict(response.headers), await response.read()


async def test_the_answer_names_the_model_as_the_client_did_and_leaves_the_text_alone(served: Served) -> None:
    for name in ("x", "deployments/x", "x@a", "deployments/x/revisions/a"):
        status, headers, raw = await post(served, model=name)
        answer = orjson.loads(raw)
        assert (status, answer["model"], headers["X-Fabrictune-Revision"]) == (200, name, "a")
        assert answer["choices"][0]["text"] == 'he said "model":"x"'
    assert {b["model"] for b in served.upstream.bodies} == {"x"}


async def test_a_streams_model_name_is_put_back_even_when_it_arrives_in_two_parts(served: Served) -> None:
    _, headers, raw = await post(served, model="x@a", stream=True)
    assert headers["Content-Type"] == "text/event-stream"
    assert raw.startswith(b'data: {"model":"x@a","choices"') and raw.endswith(b"data: [DONE]\n\n")


async def test_engines_never_see_the_clients_token(served: Served) -> None:
    await post(served, model="x")
    assert "Authorization" not in served.upstream.headers[0]


async def test_a_request_without_a_token_is_refused(served: Served) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{served.url}/v1/models") as response:
        assert response.status == 401 and (await response.json())["error"]["code"] == "UNAUTHENTICATED"
    async with aiohttp.ClientSession() as session, session.get(f"{served.url}/healthz") as response:
        assert response.status == 200


async def test_who_may_only_read_sees_the_models_and_asks_none(served: Served) -> None:
    viewer = {"Authorization": "Bearer viewer"}
    for path, status in (("models", 200), ("models/x@a", 200), ("chat/completions", 403)):
        ask = served.session.post if status == 403 else served.session.get
        async with ask(f"{served.url}/v1/{path}", headers=viewer) as response:
            assert response.status == status, path


@pytest.mark.parametrize(
    ("raw", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b'{"model": "\xff"}', 400, "not JSON"),
        (b"[]", 400, "JSON object"),
        (b"{}", 400, '"model"'),
        (b'{"model": "y"}', 404, "there are: x"),
        (b'{"model": "x@b"}', 404, "x@b"),
        (b'{"model": "x", "a": "' + b"b" * 3000 + b'"}', 413, "larger than 2000 bytes"),
    ],
)
async def test_a_bad_request_gets_a_typed_error(served: Served, raw: bytes, status: int, words: str) -> None:
    async with served.session.post(f"{served.url}/v1/completions", data=raw) as response:
        error = (await response.json())["error"]
        assert response.status == status and words in error["message"] and error["type"]


@pytest.mark.parametrize("depth", [250, 900])
async def test_json_that_is_nested_too_deeply_to_be_changed_is_a_typed_400(served: Served, depth: int) -> None:
    deep = b"[" * depth + b"]" * depth
    for fields in (
        b'"model": "x@a", "a": [[[[[%b]]]]]' % deep,
        b'"model": "x", "tools": [{"function": {"name": "a", "parameters": {"default": [[%b]]}}}]' % deep,
        b'"model": "x", "tools": [{"function": {"name": "a"}}], "tool_choice": %b' % deep,
    ):
        raw = b'{"messages": [{"role": "user", "content": "q"}], %b}' % fields
        async with served.session.post(f"{served.url}/v1/chat/completions", data=raw) as response:
            assert response.status == 400 and (await response.json())["error"]["type"] == "invalid_request_error"
    assert served.upstream.raw == []


async def test_a_body_that_is_not_what_its_encoding_says_is_a_typed_400(served: Served) -> None:
    url, headers = f"{served.url}/v1/completions", {"Content-Encoding": "gzip"}
    async with served.session.post(url, data=b"no gzip", headers=headers) as response:
        error = (await response.json())["error"]
        assert response.status == 400 and "cannot be read" in error["message"] and error["code"] == "INVALID_DATA"


async def test_what_nobody_knew_of_is_a_typed_500_with_a_number_to_ask_about_and_nothing_else(
    served: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    headers = {"Authorization": "Bearer broken", "X-Request-Id": "r-7"}
    async with served.session.get(f"{served.url}/v1/models", headers=headers) as response:
        error = (await response.json())["error"]
    assert (response.status, error["type"], error["code"]) == (500, "internal_error", "INTERNAL")
    assert "r-7" in error["message"] and "secret" not in error["message"]
    said = "".join(capfd.readouterr())
    assert "r-7" in said and "a secret" in said


async def test_an_unknown_path_is_a_typed_404(served: Served) -> None:
    async with served.session.get(f"{served.url}/v1/nothing") as response:
        assert response.status == 404 and "is not served here" in (await response.json())["error"]["message"]


async def test_models_lists_deployments_and_shows_one(served: Served) -> None:
    async with served.session.get(f"{served.url}/v1/models") as response:
        assert [m["id"] for m in (await response.json())["data"]] == ["x"]
    async with served.session.get(f"{served.url}/v1/models/x@a") as response:
        assert (await response.json())["id"] == "x@a"


async def test_a_request_waits_while_its_revision_loads(served: Served) -> None:
    served.routes.put("x", {"a": target("a", loading=True)}, {})
    waiting = asyncio.create_task(post(served, model="x"))
    await asyncio.sleep(0.1)
    assert served.routes.waiting("x") == 1 and not waiting.done()
    served.routes.put("x", {"a": target("a", served.upstream.address)}, {"a": 100})
    assert (await waiting)[0] == 200


async def test_a_revision_that_loads_too_long_or_failed_is_a_503_that_says_when_to_ask_again(served: Served) -> None:
    served.routes.put("x", {"a": target("a", loading=True)}, {"a": 100})
    status, headers, raw = await post(served, model="x")
    assert status == 503 and headers["Retry-After"] and b"still loading" in raw
    served.routes.put("x", {"a": target("a")}, {"a": 100})
    assert (await post(served, model="x"))[0] == 503
    served.routes.put("x", {"a": target("a", "http://127.0.0.1:9")}, {"a": 100})  # nobody listens there
    assert (await post(served, model="x"))[0] == 503


async def test_an_engine_that_dies_in_mid_stream_ends_it_with_an_error_and_without_done(served: Served) -> None:
    status, _, raw = await post(served, model="x", stream=True, die=True)
    assert status == 200 and b"ENGINE_LOST" in raw and b"[DONE]" not in raw


async def test_a_client_that_goes_away_cancels_its_request_at_the_engine(served: Served) -> None:
    body = {"model": "x", "stream": True, "hang": True}
    async with served.session.post(f"{served.url}/v1/chat/completions", json=body) as response:
        await response.content.readline()
        assert served.routes.in_flight("x", "a") == 1
    await asyncio.wait_for(served.upstream.cancelled.wait(), 5)
    assert await served.routes.drained("x", "a", 1)


async def test_clients_who_give_up_before_the_first_byte_count_as_slow_answers(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "PATIENCE_SECONDS", 0.2)

    async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(never_answer, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    served.routes.put("x", {"a": target("a", address)}, {"a": 100})
    for seconds in (0.05, 0.4):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                await post(served, model="x")
        with pytest.raises(TimeoutError):
            async with (
                asyncio.timeout(seconds),
                aclosing(
                    generate(served.routes, served.session, "x", [{"role": "user", "content": "q"}], {})
                ) as pieces,
            ):
                await anext(pieces)
    async with asyncio.timeout(5):
        while (found := served.routes.outcomes.figures("x", "a")).answers < 2:
            await asyncio.sleep(0.02)
    silent.close()
    assert (found.answers, found.failures) == (2, 0) and 0.3 < found.p95 < 1


async def test_draining_waits_for_open_answers_and_gives_up_after_its_time(served: Served) -> None:
    body = {"model": "x", "stream": True, "hang": True}
    async with served.session.post(f"{served.url}/v1/chat/completions", json=body) as response:
        await response.content.readline()
        assert not await served.routes.drained("x", "a", 0.05)
        draining = asyncio.create_task(served.routes.drained("x", "a", 5))
        served.upstream.release.set()
        assert (await response.content.read()).endswith(b"data: [DONE]\n\n")
        assert await draining


@pytest.mark.parametrize(("seconds", "is_whole"), [(30, True), (1, False), (0, False)])
async def test_a_gateway_that_closes_gives_the_answers_in_flight_its_time_and_no_more(
    served: Served, seconds: float, is_whole: bool
) -> None:
    gateway = Gateway(served.routes, drain_seconds=seconds)
    url = f"http://127.0.0.1:{await gateway.start('127.0.0.1', 0)}/v1/chat/completions"
    async with served.session.post(url, json={"model": "x", "stream": True, "hang": True}) as response:
        await response.content.readline()
        begin = time.monotonic()
        closing = asyncio.create_task(gateway.close())
        if is_whole:
            await asyncio.sleep(0.2)
            served.upstream.release.set()
            assert (await response.content.read()).endswith(b"data: [DONE]\n\n")
        await closing
    took = time.monotonic() - begin
    assert took < seconds if is_whole else seconds - 0.1 <= took < seconds + 0.7


async def test_closing_generate_closes_the_request_at_the_engine(served: Served) -> None:
    messages = [{"role": "user", "content": "hi"}]
    stream = generate(served.routes, served.session, "x", messages, {"hang": True})
    assert (await anext(stream)).text == "hi"
    await stream.aclose()
    await asyncio.wait_for(served.upstream.cancelled.wait(), 5)
    assert served.routes.in_flight("x", "a") == 0


def test_traffic_is_shared_exactly_by_weight() -> None:
    routes = RouteTable()
    routes.put("x", {"a": target("a", "http://a"), "b": target("b", "http://b")}, {"a": 90, "b": 10})
    chosen = [t.revision for _ in range(100) if (t := routes.choose("x")) is not None]
    assert (chosen.count("a"), chosen.count("b")) == (90, 10)
    assert "b" in chosen[:10]


TOOLS = [{"type": "function", "function": {"name": "amap_weather", "description": "查天气"}}]
MESSAGES = [{"role": "user", "content": "天气？"}]


async def test_a_chat_with_tools_reaches_the_engine_as_agentfabrics_prompt(served: Served) -> None:
    status, _, _ = await post(served, model="x@a", messages=MESSAGES, tools=TOOLS, temperature=0)
    [sent] = served.upstream.bodies
    assert status == 200 and sent["model"] == "x" and sent["temperature"] == 0
    assert sent["messages"] == render_tools({"messages": MESSAGES, "tools": TOOLS})["messages"]


async def test_a_chat_without_tools_reaches_the_engine_byte_for_byte(served: Served) -> None:
    raw = b'{"model": "x",  "messages": [{"role":"user","content":"\\u5929"}], "tools": null, "tool_choice": "none"}'
    async with served.session.post(f"{served.url}/v1/chat/completions", data=raw) as response:
        assert response.status == 200
    assert served.upstream.raw == [raw]


async def test_tools_that_cannot_be_used_are_refused_with_all_that_is_wrong(served: Served) -> None:
    tools = [
        {"type": "function", "function": {"name": "a\nb"}},
        {"type": "function", "function": {"name": "b", "parameters": 1}},
    ]
    status, _, raw = await post(served, model="x", messages=MESSAGES, tools=tools)
    error = orjson.loads(raw)["error"]
    assert status == 400 and error["type"] == "invalid_request_error" and error["code"] == "INVALID_SPEC"
    assert error["param"] == "tools[0].function.name" and "tools[1].function.parameters" in error["message"]
    assert served.upstream.bodies == []


async def test_generate_puts_the_parts_of_a_call_together(served: Served) -> None:
    stream = generate(served.routes, served.session, "x", MESSAGES, {"tools": TOOLS, "calls": True})
    pieces = [piece async for piece in stream]
    assert [(c.id, c.name, c.arguments) for c in pieces[-1].tool_calls] == [("c1", "amap_weather", '{"a": 1}')]
    assert pieces[-1].finish_reason == "tool_calls"


async def test_a_request_for_which_there_is_no_room_is_a_429_at_once_and_the_others_go_on(served: Served) -> None:
    served.routes.put("x", {"a": replace(target("a", served.upstream.address), room=1)}, {"a": 100})
    body = {"model": "x", "stream": True, "hang": True}
    async with served.session.post(f"{served.url}/v1/chat/completions", json=body) as response:
        await response.content.readline()
        status, headers, raw = await post(served, model="x")
        assert (status, headers["Retry-After"]) == (429, "1") and b"OVERLOADED" in raw
        served.upstream.release.set()
        assert (await response.content.read()).endswith(b"data: [DONE]\n\n")
    assert (await post(served, model="x"))[0] == 200


async def test_generate_says_when_to_ask_again_when_there_is_no_room(served: Served) -> None:
    served.routes.put("x", {"a": replace(target("a", served.upstream.address), room=1)}, {"a": 100})
    async with served.routes.hold("x", 1):
        with pytest.raises(ResourceExhausted) as caught:
            await anext(generate(served.routes, served.session, "x", [{"role": "user", "content": "hi"}], {}))
    assert any(detail.TypeName() == "google.rpc.RetryInfo" for detail in caught.value.to_status().details)


async def test_only_so_many_requests_wait_while_a_revision_loads(served: Served) -> None:
    served.routes.put("x", {"a": replace(target("a", loading=True), room=1)}, {})
    waiting = asyncio.create_task(post(served, model="x"))
    await asyncio.sleep(0.1)
    assert (await post(served, model="x"))[0] == 429
    served.routes.put("x", {"a": target("a", served.upstream.address)}, {"a": 100})
    assert (await waiting)[0] == 200


async def test_a_prompt_over_the_limit_never_reaches_the_engine(served: Served) -> None:
    served.routes.put("x", {"a": replace(target("a", served.upstream.address), max_prompt_characters=5)}, {"a": 100})
    status, _, raw = await post(served, model="x", messages=[{"role": "user", "content": "好好好好好好"}])
    assert status == 400 and b"PROMPT_TOO_LONG" in raw and served.upstream.bodies == []
    assert (await post(served, model="x", messages=[{"role": "user", "content": "好好好好好"}]))[0] == 200


async def test_an_adapter_is_asked_for_by_its_id_and_an_unknown_one_is_a_404(served: Served) -> None:
    given = replace(target("a", served.upstream.address), adapters={"l1": "x:l1:abc"})
    served.routes.put("x", {"a": given}, {"a": 100})
    for name in ("x:l1", "x@a:l1", "deployments/x/adapters/l1"):
        status, _, raw = await post(served, model=name)
        assert (status, orjson.loads(raw)["model"]) == (200, name)
    assert {b["model"] for b in served.upstream.bodies} == {"x:l1:abc"}
    status, _, raw = await post(served, model="x:l2")
    assert status == 404 and b"it serves: l1" in raw
