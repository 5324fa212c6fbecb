"""The recorder behind a real gateway on a socket, with a real HTTP server where the engine stands."""

from __future__ import annotations

import asyncio
import gzip
import json
import stat
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from services.common.config import RecordConfig
from services.common.errors import FailedPrecondition, InvalidSpec
from services.common.store import Store
from services.inference.gateway import Gateway
from services.inference.generate import generate
from services.inference.recorder import Recorder, open_recorder, recorded
from services.inference.redaction import load_rules
from services.inference.routes import RouteTable, Target
from services.inference.traffic import Folder, Sink, Unreadable, delete_expired, list_records, put_records, read_stream

MESSAGES = [{"role": "user", "content": "我的邮箱是ann@example.org，朝阳区天气怎样？"}]
ANSWER = '好的，ann@example.org。Action: amap_weather\nAction Input: {"location": "朝阳区"}\n'


@dataclass
class Slow:
    """A folder that answers only when it is let."""

    folder: Folder
    let: threading.Event = field(default_factory=threading.Event)
    broken: bool = False

    def put_bytes(self, key: str, data: bytes) -> None:
        self.let.wait(30)
        if self.broken:
            raise OSError("the disk is full")
        self.folder.put_bytes(key, data)

    def list_keys(self, prefix: str, start_after: str = "") -> Iterator[str]:
        return self.folder.list_keys(prefix, start_after)

    def list_folders(self, prefix: str, start_after: str = "", limit: int = 1000) -> list[str]:
        return self.folder.list_folders(prefix, start_after, limit)

    def delete(self, key: str) -> None:
        self.folder.delete(key)


@dataclass
class Served:
    url: str
    recorder: Recorder
    routes: RouteTable
    session: aiohttp.ClientSession
    sink: Sink

    async def ask(self, path: str = "chat/completions", **body: Any) -> tuple[int, bytes]:
        body = {"model": "x", "messages": MESSAGES, **body}
        async with self.session.post(f"{self.url}/v1/{path}", json=body) as response:
            return response.status, await response.read()

    async def records(self, folder: Path) -> list[dict[str, Any]]:
        assert await asyncio.to_thread(self.recorder.flush, 20)
        return read_records(folder)


def read_records(folder: Path) -> list[dict[str, Any]]:
    lines = [line for file in sorted(folder.rglob("*.gz")) for line in gzip.decompress(file.read_bytes()).splitlines()]
    return [json.loads(line) for line in lines]


def outcomes() -> dict[str, float]:
    return {s.labels["outcome"]: s.value for m in recorded.collect() for s in m.samples if s.name.endswith("_total")}


async def _answer(request: web.Request) -> web.StreamResponse:
    body = orjson.loads(await request.read())
    if body.get("wrong"):
        return web.json_response({"error": {"message": "no"}}, status=400)
    if body.get("large"):
        return web.json_response({"choices": [{"message": {"content": "x" * body["large"]}, "finish_reason": "stop"}]})
    if "prompt" in body:
        return web.json_response({"choices": [{"index": 0, "text": ANSWER, "finish_reason": "length"}]})
    if not body.get("stream"):
        choice = {"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
        return web.json_response({"model": "x", "choices": [choice], "usage": {"prompt_tokens": 3}})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    raw = b"".join(b"data: " + orjson.dumps({"choices": [{"delta": {"content": c}}]}) + b"\n\n" for c in ANSWER)
    raw += b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
    raw += b'data: {"error":{"code":500}}\n\n' if body.get("fail") else b""
    raw += b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\ndata: [DONE]\n\n'
    for start in range(0, len(raw), 97):  # cut anywhere, also inside of a character
        await response.write(raw[start : start + 97])
        if body.get("die") and start > 500:
            assert request.transport is not None
            request.transport.abort()
            return response
    return response


@asynccontextmanager
async def serve(sink: Sink, **options: Any) -> AsyncIterator[Served]:
    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/v1/{rest:.*}", _answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    routes = RouteTable()
    target = Target("x", "r-1", "x", f"http://127.0.0.1:{runner.addresses[0][1]}", ready=True)
    routes.put("x", {"r-1": target}, {"r-1": 100})
    recorder = Recorder(sink, load_rules(None), **{"flush_seconds": 0.05, **options})
    gateway = Gateway(routes, recorder=recorder)
    port = await gateway.start("127.0.0.1", 0)
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer my-very-own-token"}) as session:
        yield Served(f"http://127.0.0.1:{port}", recorder, routes, session, sink)
    await gateway.close()
    await asyncio.to_thread(recorder.close, 0.1)
    await runner.cleanup()


async def test_whole_and_streamed_answers_are_kept_alike_without_headers_tokens_and_who_asked(tmp_path: Path) -> None:
    async with serve(Folder(tmp_path)) as served:
        _, whole = await served.ask(user="ann", metadata={"team": "blue"})
        _, streamed = await served.ask(stream=True)
        first, second = await served.records(tmp_path)
    assert b"ann@example.org" in whole and streamed.endswith(b"data: [DONE]\n\n")  # what the client gets is untouched
    said = ANSWER.replace("ann@example.org", "<email>")
    asked = [{"role": "user", "content": "我的邮箱是<email>，朝阳区天气怎样？"}]
    for record in (first, second):
        assert record["answer"] == {"content": said, "finish_reason": "stop"}
        assert record["request"] == {"messages": asked}
        assert (record["deployment"], record["revision"], record["path"]) == ("x", "r-1", "/v1/chat/completions")
    assert second["usage"] == {"prompt_tokens": 3, "completion_tokens": 4}
    everything = b"".join(gzip.decompress(f.read_bytes()) for f in tmp_path.rglob("*.gz"))
    for secret in (b"my-very-own-token", b"Authorization", b"ann", b"blue"):
        assert secret not in everything


async def test_what_grpc_generates_and_plain_completions_are_kept_too(tmp_path: Path) -> None:
    async with serve(Folder(tmp_path)) as served:
        pieces = generate(served.routes, served.session, "x", MESSAGES, {"max_tokens": 9}, recorder=served.recorder)
        assert "".join([piece.text async for piece in pieces]) == ANSWER
        await served.ask("completions", prompt="Once", messages=None)
        generated, completed = await served.records(tmp_path)
    assert generated["path"] == "Generate" and generated["request"]["max_tokens"] == 9
    assert generated["answer"]["content"].endswith('{"location": "朝阳区"}\n')
    assert completed["request"] == {"prompt": "Once"} and completed["answer"]["finish_reason"] == "length"


async def test_errors_and_answers_that_broke_off_are_not_kept(tmp_path: Path) -> None:
    before = outcomes().get("unfinished", 0)
    async with serve(Folder(tmp_path)) as served:
        assert (await served.ask(wrong=True))[0] == 400
        assert b"ENGINE_LOST" in (await served.ask(stream=True, die=True))[1]
        assert b"[DONE]" not in (await served.ask(stream=True, fail=True))[1]
        stream = generate(served.routes, served.session, "x", MESSAGES, {}, recorder=served.recorder)
        await anext(stream)
        await stream.aclose()
        assert await served.records(tmp_path) == []
    assert outcomes()["unfinished"] - before == 4


async def test_a_store_that_hangs_costs_records_and_no_answer_and_no_more_memory(tmp_path: Path) -> None:
    before = outcomes()
    slow = Slow(Folder(tmp_path))
    async with serve(slow, memory_bytes=1 << 20) as served:
        answers = [await served.ask(large=200_000) for _ in range(12)]
        assert [status for status, _ in answers] == [200] * 12
        assert outcomes()["memory"] - before.get("memory", 0) >= 7
        slow.let.set()
        kept = await served.records(tmp_path)
        assert 3 <= len(kept) <= 5
        assert (await served.ask())[0] == 200  # and there is room again
        assert len(await served.records(tmp_path)) == len(kept) + 1


async def test_a_store_that_refuses_and_an_answer_that_is_too_large_are_counted(tmp_path: Path) -> None:
    before = outcomes()
    slow = Slow(Folder(tmp_path), broken=True)
    slow.let.set()
    async with serve(slow) as served:
        assert (await served.ask())[0] == 200
        assert (await served.ask(large=5 << 20))[0] == 200
        assert await served.records(tmp_path) == []
        slow.broken = False
        await served.ask()
        assert len(await served.records(tmp_path)) == 1
    after = outcomes()
    assert (after["store"] - before.get("store", 0), after["too_large"] - before.get("too_large", 0)) == (1, 1)


async def test_nothing_is_recorded_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FABRICTUNE_RECORD", raising=False)
    async with AsyncExitStack() as stack:
        assert open_recorder(stack, RecordConfig(record_folder=tmp_path), None) is None
        with pytest.raises(FailedPrecondition, match="FABRICTUNE_RECORD_FOLDER"):
            open_recorder(stack, RecordConfig(record=True), None)
        recorder = open_recorder(stack, RecordConfig(record=True, record_folder=tmp_path), None)
        assert recorder is not None
    assert not list(tmp_path.iterdir())


async def test_what_waits_is_written_when_the_gateway_ends(tmp_path: Path) -> None:
    async with serve(Folder(tmp_path), flush_seconds=600) as served:
        await served.ask()
        assert read_records(tmp_path) == []
        await asyncio.to_thread(served.recorder.close)
    assert len(read_records(tmp_path)) == 1


def test_records_in_a_folder_are_their_owners_alone(tmp_path: Path) -> None:
    put_records(Folder(tmp_path / "kept"), [{"deployment": "x"}])
    [file] = (tmp_path / "kept").rglob("*.gz")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "kept").rglob("*") if p.is_dir()} == {0o700}


@pytest.mark.parametrize("kind", ["folder", "store"])
def test_days_that_are_over_go_and_the_others_stay(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    sink: Sink = Folder(tmp_path) if kind == "folder" else request.getfixturevalue("store")
    for deployment in ("x", "y"):
        for day in ("2026-10-31", "2026-11-01", "2026-11-02"):
            sink.put_bytes(f"traffic/{deployment}/{day}/120000-a.jsonl.gz", b"")
    assert delete_expired(sink, 30, date(2026, 12, 1)) == 2
    assert list(list_records(sink, "x")) == [
        "traffic/x/2026-11-01/120000-a.jsonl.gz", "traffic/x/2026-11-02/120000-a.jsonl.gz",
    ]  # fmt: skip
    assert list(list_records(sink, "y", date(2026, 11, 2))) == ["traffic/y/2026-11-02/120000-a.jsonl.gz"]


async def test_old_records_go_also_when_nothing_is_recorded_any_more(tmp_path: Path) -> None:
    old = datetime.now(UTC) - timedelta(days=9)
    key = f"traffic/x/{old:%Y-%m-%d}/120000-a.jsonl.gz"
    Folder(tmp_path).put_bytes(key, b"")
    assert (tmp_path / key).exists()
    async with AsyncExitStack() as stack:
        open_recorder(stack, RecordConfig(record=False, record_days=7, record_folder=tmp_path), None)
        async with asyncio.timeout(10):
            while (tmp_path / key).exists():
                await asyncio.sleep(0.01)


async def test_records_go_into_the_object_store(store: Store) -> None:
    async with serve(store) as served:
        await served.ask()
        assert await asyncio.to_thread(served.recorder.flush, 20)
    [key] = list_records(store, "x")
    [line] = gzip.decompress(store.get_bytes(key)).splitlines()
    assert json.loads(line)["answer"]["content"].startswith("好的，<email>")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("写给ann.b+c@mail.example.org吧", "写给<email>吧"),
        ("电话13912345678，或 139 1234 5678", "电话<phone>，或 <phone>"),
        ("call +1 (555) 010-9999 or 415-555-2671", "call <phone> or <phone>"),
        ("sk-abcdefghijklmnop1234 hf_abcdefghijklmn", "<key> <key>"),
        ('{"password": "hunter22", "city": "Rome"}', '{"password": "<secret>", "city": "Rome"}'),
        ("https://a.example/w?city=1&api_key=0123456789abcdef", "https://a.example/w?city=1&api_key=<secret>"),
        ("密码是abc12345。好", "密码是<secret>。好"),
        ("Authorization: Bearer abcdefgh12345678", "Authorization: Bearer <bearer>"),
        ("11010519491231002X 和 6222 0210 0112 3456", "<id> 和 <card>"),
        # What looks like it and is none.
        ("1024*1024, 2024-05-14, 朝阳区 25度, 3.14159265358979, sku 10518244314", None),
        ('{"token": {"type": "string"}, "required": ["password", "city"]}', None),
    ],
)
def test_what_is_private_is_taken_out_by_name(text: str, kept: str | None) -> None:
    assert load_rules(None).clean_text(text) == (text if kept is None else kept)


@pytest.mark.parametrize("letter", ["a", "1", "@", "a.", "a@a.", "1 ", "+1 ", "eyJ", "password: ", "sk-", "("])
def test_no_text_makes_the_default_rules_slow(letter: str) -> None:
    text = letter * (400_000 // len(letter))  # a quadratic one would take minutes, which the test's limit ends
    load_rules(None).clean_text(text)


def test_rules_of_a_file_are_added_replace_and_turn_off(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text("customer: 'C-\\d{6}'\nphone: false\nemail: 'nobody'\n")
    rules = load_rules(file)
    assert rules.clean_text("C-123456 13912345678 a@b.example nobody") == "<customer> 13912345678 a@b.example <email>"
    file.write_text("a: '('\nb: 7\nc: 'x*'\n")
    with pytest.raises(InvalidSpec) as caught:
        load_rules(file)
    assert len(caught.value.violations) == 3
    file.write_text("- a")
    with pytest.raises(InvalidSpec, match="must hold a mapping"):
        load_rules(file)


def test_streamed_tool_calls_are_put_together() -> None:
    pieces: list[dict[str, Any]] = [
        {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "w", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}, {"index": 1, "function": {"name": "v"}}]},
    ]
    events = [{"choices": [{"index": 0, "delta": piece}]} for piece in pieces]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    raw = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events)
    answer, _ = read_stream(raw)
    assert answer["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "w", "arguments": '{"a": 1}'}},
        {"function": {"name": "v", "arguments": ""}},
    ]
    with pytest.raises(Unreadable, match="broke off"):
        read_stream(raw[: raw.index(b"\n\n") + 2])
