"""Asking over real HTTP: what is sent, what is tried again, what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest
from aiohttp import web

from services.common.errors import FabrictuneError, InvalidData, Unauthenticated, Unavailable
from services.evaluation.ask import Address, Sampling, ask_all
from services.evaluation.latency import measure_latency
from services.evaluation.questions import Answer, Question
from services.evaluation.wire import Wire

SAMPLING = Sampling(concurrency=2, max_tokens=9)
QUESTIONS = [Question(str(n), [{"role": "user", "content": f"q{n}"}], [], []) for n in range(5)]


@dataclass
class Server:
    """Answers with `said`, or does what `behave` does with the request's number."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    behave: Callable[[int], web.Response | None] = lambda _: None
    pieces: tuple[str, ...] = ("a", "b ", "c")

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append({**body, "authorization": request.headers.get("authorization")})
        other = self.behave(len(self.asked))
        if other is not None:
            return other
        if body.get("stream"):
            return await self.stream(request)
        message: dict[str, Any] = {"content": f"answer to {body['messages'][-1]['content']}"}
        if "tools" in body:
            function = {"name": body["tools"][0]["function"]["name"], "arguments": '{"a": 1}'}
            message = {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
        told = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 7}}
        return web.json_response(told)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """As OpenAI streams: a role, pieces of text, the end, the usage."""
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        deltas: list[dict[str, Any]] = [
            {"role": "assistant", "content": ""},
            *({"content": p} for p in self.pieces),
            {},
        ]
        told: list[dict[str, Any]] = [{"choices": [{"delta": delta}]} for delta in deltas]
        for chunk in (*told, {"choices": [], "usage": {"completion_tokens": 12}}):
            await answer.write(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode())
        await answer.write(b"data: [DONE]\n\n")
        return answer


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield server
    await runner.cleanup()


async def collect(server: Server, key: str = "") -> list[Answer]:
    address = Address(server.url, "m", key)
    return await ask(QUESTIONS, address)


async def ask(
    questions: Sequence[Question], address: Address, kept: Mapping[str, Answer] | None = None
) -> list[Answer]:
    return [answer async for _, answer in ask_all(questions, [address], SAMPLING, [kept or {}])]


async def test_what_is_sent_and_what_comes_back(server: Server) -> None:
    answers = await collect(server, "secret")
    assert {a.id: a.text for a in answers} == {str(n): f"answer to q{n}" for n in range(5)}
    assert {a.completion_tokens for a in answers} == {7}
    sent = server.asked[0]
    assert sent["stop"] == ["Observation:", "Observation:\n"]  # as AgentFabric sends it
    assert "tools" not in sent
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("m", 0, 9)
    assert sent["authorization"] == "Bearer secret"


async def test_a_busy_server_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio, "sleep", _no_sleep(asyncio.sleep))
    server.behave = lambda number: web.Response(status=503, text="busy") if number < 4 else None
    assert len(await collect(server)) == 5


async def test_a_server_that_stays_away(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio, "sleep", _no_sleep(asyncio.sleep))
    server.behave = lambda _: web.Response(status=500, text="broken")
    with pytest.raises(Unavailable, match="in 6 tries; the last said HTTP 500: broken"):
        await collect(server)


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (lambda: web.Response(status=401, text="who?"), Unauthenticated, "HTTP 401"),
        (lambda: web.Response(status=418, text="a teapot"), InvalidData, "teapot"),
        (lambda: web.json_response({"hello": 1}), InvalidData, "not answer as an OpenAI server"),
    ],
)
async def test_refusals_are_not_tried_again(
    server: Server, answer: Callable[[], web.Response], kind: type[Exception], said: str
) -> None:
    server.behave = lambda _: answer()
    with pytest.raises(kind, match=said):
        await collect(server)
    assert len(server.asked) <= 3


@pytest.mark.parametrize("status", [200, 401, 503])
async def test_a_key_that_the_server_quotes_is_not_told_on(
    server: Server, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio, "sleep", _no_sleep(asyncio.sleep))
    text = "x" * 290 + " no such key: sk-1234567890"
    server.behave = lambda _: web.Response(status=status, text=text if status != 200 else text[-40:])
    with pytest.raises(FabrictuneError) as refused:
        await collect(server, "sk-1234567890")
    assert "sk-" not in refused.value.message
    assert "sk-1234567890" not in repr(Address(server.url, "m", "sk-1234567890"))


async def test_a_row_that_is_refused_is_an_answer_of_its_own_kind(server: Server) -> None:
    server.behave = lambda number: web.Response(status=400, text="prompt too long") if number == 1 else None
    answers = await collect(server)
    (refused,) = [a for a in answers if a.refused]
    assert (refused.text, refused.refused) == ("", "HTTP 400: prompt too long")
    assert len(answers) == 5


@pytest.mark.parametrize("first", [1, 5])
async def test_a_server_that_refuses_the_first_rows_refuses_all(server: Server, first: int) -> None:
    server.behave = lambda _: web.Response(status=422, text="no such field: stop")
    asked = [*QUESTIONS, *(replace(q, id=f"more {q.id}") for q in QUESTIONS)][: 1 if first == 1 else None]
    with pytest.raises(
        InvalidData, match=r"refuses row \d \(HTTP 422: no such field: stop\), and all that came before"
    ):
        await ask(asked, Address(server.url, "m"))
    assert first <= len(server.asked) <= first + 1


async def test_refusals_after_an_answer_are_of_their_rows_only(server: Server) -> None:
    server.behave = lambda _: web.Response(status=400, text="too long")
    kept = {"0": Answer("0", "kept", "stop", 1, 0.1)}
    answers = await ask(QUESTIONS, Address(server.url, "m"), kept)
    assert [bool(a.refused) for a in answers] == [True] * 4


@pytest.mark.parametrize("half", [b"\\ud83d", b"\xf0\x9f", b"\xff"])
async def test_half_a_character_is_replaced_and_can_be_written(server: Server, half: bytes) -> None:
    call = b'{"id": "1", "type": "function", "function": {"name": "t", "arguments": "{\\"a\\": \\"%b\\"}"}}' % half
    message = b'{"content": "a%bb\xe2\x80\xa8c", "tool_calls": [%b]}' % (half, call)
    body = b'{"choices": [{"message": %b, "finish_reason": "stop"}]}' % message
    server.behave = lambda _: web.Response(body=body, content_type="application/json")
    address = Address(server.url, "m", wire=Wire(tools=True))
    (answer,) = await ask(QUESTIONS[:1], address)
    assert answer.text.startswith("a\ufffd") and answer.text.endswith("b\u2028c")
    assert answer.calls is not None
    json.dumps(asdict(answer), ensure_ascii=False).encode()


async def test_answers_that_are_kept_are_not_asked_for_again(server: Server) -> None:
    kept = {str(n): Answer(str(n), "kept", "stop", 1, 0.1) for n in (0, 3)}
    answers = await ask(QUESTIONS, Address(server.url, "m"), kept)
    assert sorted(a.id for a in answers) == ["1", "2", "4"]
    assert len(server.asked) == 3


async def test_what_is_asked_in_two_ways_is_asked_one_right_after_the_other(server: Server) -> None:
    tool = {"type": "function", "function": {"name": "area", "parameters": {}}}
    questions = [replace(q, tools=[tool]) for q in QUESTIONS]
    ways = [Address(server.url, "m"), Address(server.url, "m", wire=Wire(tools=True))]
    assert ways[0].server == ways[1].server != replace(ways[0], model="n").server
    kept = [{"3": Answer("3", "kept", "stop", 1, 0.1)}, {}]
    found = [each async for each in ask_all(questions, ways, replace(SAMPLING, concurrency=1), kept)]
    wanted = [(way, q.id) for q in QUESTIONS for way in (0, 1) if (way, q.id) != (0, "3")]
    assert [(way, answer.id) for way, answer in found] == wanted
    assert [(int("tools" in asked), asked["messages"][-1]["content"]) for asked in server.asked] == [
        (way, f"q{number}") for way, number in wanted
    ]


async def test_tools_are_sent_and_tool_calls_read_under_their_own_names(server: Server) -> None:
    tool = {"type": "function", "function": {"name": "math.area", "parameters": {}}}
    question = Question("a", [{"role": "user", "content": "(. you can use tools: [math.area])How big?"}], [tool], [])
    address = Address(server.url, "m", wire=Wire(tools=True, ours=False))
    (answer,) = await ask([question], address)
    assert server.asked[0]["tools"][0]["function"]["name"] == "math_area"
    assert server.asked[0]["messages"][-1]["content"] == "How big?"
    assert answer.calls == [{"name": "math.area", "arguments": '{"a": 1}'}]


async def test_a_server_is_asked_again_when_it_says(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def note(seconds: float, sleep: Any = asyncio.sleep) -> None:
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    busy = {"retry-after": "7"}
    server.behave = lambda number: web.Response(status=429, headers=busy) if number == 1 else None
    assert len(await collect(server)) == 5
    assert 7 in slept


async def test_leaving_early_leaves_nothing_in_flight(server: Server) -> None:
    stream = ask_all(QUESTIONS, [Address(server.url, "m")], SAMPLING)
    async for _ in stream:
        break
    await stream.aclose()  # type: ignore[attr-defined]
    assert len(server.asked) < 5


async def test_latency_is_measured_on_streams(server: Server) -> None:
    told = await measure_latency(QUESTIONS, Address(server.url, "m"), SAMPLING)
    assert (told["requests"], told["concurrency"], told["tokens"]) == (5, 2, 60)
    assert 0 < told["first_token"]["p50"] <= told["first_token"]["p95"] <= told["whole"]["p95"]
    assert told["tokens_per_second"]["p50"] > 0
    assert all(asked["stream_options"] == {"include_usage": True} for asked in server.asked)
    assert len(server.asked) == 6  # one warms up


async def test_no_prompt_that_is_timed_begins_as_one_that_was_asked_before(server: Server) -> None:
    """Else the server has most of the work for the first token behind it already."""
    tool = {"type": "function", "function": {"name": "t", "description": "d", "parameters": {}}}
    questions = [replace(question, tools=[tool]) for question in QUESTIONS]
    for wire in (Wire(), Wire(tools=True)):
        server.asked.clear()
        await measure_latency(questions, Address(server.url, "m", wire=wire), SAMPLING)
        heads = [asked["messages"][0]["content"].partition(" ") for asked in server.asked]
        assert [len(head) for head, _, _ in heads] == [10] * 6
        assert {rest for _, _, rest in heads} == {f"q{n}" for n in range(5)}
        assert heads[0][0] != heads[1][0] == heads[5][0]  # what warms up has another
        if wire.tools:
            told = [asked["tools"][0]["function"]["description"] for asked in server.asked]
            assert told == [f"{head} d" for head, _, _ in heads]


async def test_a_busy_server_is_timed_again_and_a_refused_row_is_not_timed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio, "sleep", _no_sleep(asyncio.sleep))
    busy, long = web.Response(status=503, text="busy"), web.Response(status=400, text="too long")
    server.behave = lambda number: {2: busy, 3: long}.get(number)
    told = await measure_latency(QUESTIONS, Address(server.url, "m"), SAMPLING)
    assert (told["requests"], len(server.asked)) == (4, 7)


async def test_what_else_ends_lines_does_not_end_an_event(server: Server) -> None:
    server.pieces = ("a\u2028b", "c\x85")
    assert (await measure_latency(QUESTIONS, Address(server.url, "m"), SAMPLING))["requests"] == 5


@pytest.mark.parametrize(
    ("told", "stop_string"),
    [
        ({}, ""),
        ({"stop_reason": None}, ""),
        ({"stop_reason": 151645}, ""),
        ({"stop_reason": "Observation:"}, "Observation:"),
    ],
)
async def test_what_stopped_an_answer_is_kept(server: Server, told: dict[str, Any], stop_string: str) -> None:
    choice = {"message": {"content": "x"}, "finish_reason": "stop", **told}
    server.behave = lambda _: web.json_response({"choices": [choice]})
    assert {a.stop_string for a in await collect(server)} == {stop_string}


async def test_a_server_that_does_not_stream_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio, "sleep", _no_sleep(asyncio.sleep))
    server.behave = lambda _: web.Response(status=500, text="broken")
    with pytest.raises(Unavailable, match="HTTP 500: broken"):
        await measure_latency(QUESTIONS, Address(server.url, "m"), SAMPLING)
    server.behave = lambda _: web.Response(text="data: {nonsense\n")
    with pytest.raises(InvalidData, match="does not stream as an OpenAI server would"):
        await measure_latency(QUESTIONS, Address(server.url, "m"), SAMPLING)


def _no_sleep(sleep: Callable[[float], Awaitable[None]]) -> Callable[[float], Awaitable[None]]:
    return lambda _: sleep(0)
