"""Asking over real HTTP: what is sent, what is tried again, what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from services.common.errors import InvalidData, Unauthenticated, Unavailable
from services.evaluation.ask import Address, Answer, Question, ask_all
from services.evaluation.worker import STAGE
from tests.conftest import Recorder

QUESTIONS = [Question(str(n), [{"role": "user", "content": f"q{n}"}], [], []) for n in range(5)]


@dataclass
class Server:
    """Answers with `said`, or does what `behave` does with the request's number."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    behave: Callable[[int], web.Response | None] = lambda _: None

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append({**body, "authorization": request.headers.get("authorization")})
        other = self.behave(len(self.asked))
        if other is not None:
            return other
        message = {"content": f"answer to {body['messages'][-1]['content']}"}
        told = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 7}}
        return web.json_response(told)


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
    stream = ask_all(QUESTIONS, address, concurrency=2, max_tokens=9, temperature=0)
    return [answer async for answer in stream]


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
        (lambda: web.Response(status=400, text="too long"), InvalidData, "too long"),
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


def test_the_stage_writes_a_report_and_compares_with_a_baseline(tmp_path: Path, reporter: Recorder) -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    replies = {"before": "I do not know.", "after": 'Action: w\nAction Input: {"a": 1}\n'}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            message = {"message": {"content": replies[body["model"]]}, "finish_reason": "stop"}
            raw = json.dumps({"choices": [message]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    data = tmp_path / "data"
    data.mkdir()
    row = {
        "id": "a",
        "source": "s",
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}],
    }
    tools = [{"type": "function", "function": {"name": "w", "parameters": {"properties": {"a": {"type": "integer"}}}}}]
    (data / "test.jsonl").write_text(json.dumps(row))
    beside = {"id": "a", "tools": tools, "expected": [{"name": "w", "arguments": {"a": 1}}]}
    (data / "tools.jsonl").write_text(json.dumps(beside))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        inputs = {"dataset": data}
        for label in ("before", "after"):
            output = tmp_path / label
            output.mkdir()
            target = {"address": f"http://127.0.0.1:{http.server_port}/v1", "model": label}
            spec = {"dataset": "datasets/d", "target": target, "gate": {"calls": 1.0}}
            told = STAGE.run(STAGE.spec.model_validate(spec), inputs, output, reporter)
            inputs = {"dataset": data, "baseline": tmp_path / "before"}
        http.shutdown()
    report = json.loads((tmp_path / "after/report.json").read_text())
    assert [c["label"] for c in report["columns"]] == ["before", "after"]
    assert [c["groups"]["all"]["exact_arguments"]["k"] for c in report["columns"]] == [0, 1]
    assert told["gate"][0]["met"]
    assert (tmp_path / "after/report.html").stat().st_size > 2000


def _no_sleep(sleep: Callable[[float], Awaitable[None]]) -> Callable[[float], Awaitable[None]]:
    return lambda _: sleep(0)
