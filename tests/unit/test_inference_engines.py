"""What only the engine `swift` needs: parity by conversations, and requests that it cannot answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from services.common.errors import FailedPrecondition, InvalidData
from services.inference import parity
from services.inference.forward import make_rename
from services.inference.generate import generate
from services.inference.limits import check_prompt
from services.inference.reference import PROMPTS, PROMPTS_VERSION, ForcedText, Reference
from services.inference.routes import RouteTable, Target
from services.inference.spec import Parity

TEXT = ForcedText((5, 6, 7, 8), (6, 7, 8), (1, 1, 1), (3.0, 3.0, 3.0), (-0.1, -0.2, -0.3))
REFERENCE = Reference("d", "float32", PROMPTS_VERSION, {}, tuple(TEXT for _ in PROMPTS))


@dataclass
class Swift:
    """A server that answers chats as `swift deploy` of ms-swift 4.6 does."""

    address: str = ""
    tokens: list[int] = field(default_factory=lambda: [5, 6, 7])
    shift: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if not body.get("stream"):
            said = [{str(t): {"logprob": -0.1 * i - self.shift, "rank": 1}} for i, t in enumerate(self.tokens)]
            told = {"prompt_token_ids": self.tokens, "prompt_logprobs": [None, *said[1:]]}
            return web.json_response({"choices": [{"message": {"content": "a"}, "finish_reason": "length"}], **told})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number, (text, reason) in enumerate((("a", None), ("b", None), ("", "stop")), 1):
            delta = {"role": "assistant", "content": text, "tool_calls": None}
            event = {
                "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
                "usage": {"prompt_tokens": 3, "completion_tokens": number},
            }
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
async def swift() -> AsyncIterator[Swift]:
    swift, app = Swift(), web.Application()
    app.router.add_post("/v1/chat/completions", swift.chat)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    swift.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield swift
    await runner.cleanup()


async def probe(swift: Swift) -> parity.ParityResult:
    async with aiohttp.ClientSession() as session:
        return await parity.probe(session, swift.address, "x", REFERENCE, "float32", Parity(), forced_tokens=False)


async def test_an_engine_that_takes_no_token_ids_is_asked_with_the_conversations(swift: Swift) -> None:
    result = await probe(swift)
    chats = [turns for turns in PROMPTS if turns[0][0] != "text"]
    assert [b["messages"][0]["content"] for b in swift.bodies] == [turns[0][1] for turns in chats]
    assert (result.positions, result.agreement, result.mean_logprob_difference) == (2 * len(chats), 1, 0)


async def test_one_that_computes_something_else_is_refused(swift: Swift) -> None:
    swift.shift = 1.0
    with pytest.raises(FailedPrecondition, match=r"1\.0000 nats"):
        parity.check(await probe(swift), Parity())


async def test_one_that_renders_another_prompt_is_refused(swift: Swift) -> None:
    swift.tokens = [9, 5, 6, 7]
    with pytest.raises(FailedPrecondition, match="another prompt") as caught:
        await probe(swift)
    assert caught.value.reason_override == "PARITY_FAILED"


def test_tools_are_refused_where_the_engine_takes_none() -> None:
    target = Target("x", "a", "x", tools=False)
    check_prompt({"messages": []}, target)
    with pytest.raises(InvalidData, match="engine: vllm") as caught:
        check_prompt({"messages": [], "tools": [{}]}, target)
    assert caught.value.reason_override == "TOOLS_NOT_SUPPORTED"


def test_a_prompt_that_is_nested_too_deeply_to_be_counted_is_refused() -> None:
    prompt: object = ""
    for _ in range(1000):
        prompt = {"a": prompt}
    with pytest.raises(InvalidData, match="nested too deeply"):
        check_prompt({"prompt": prompt}, Target("x", "a", "x", max_prompt_characters=1))


def test_any_name_of_the_model_is_put_back_where_the_engine_says_its_folders() -> None:
    said = rb'data: {"model": "a \"folder\"", "choices": [{"delta": {"content": "\"model\": \"mine\""}}]}'
    told = rb'data: {"model":"deployments/x", "choices": [{"delta": {"content": "\"model\": \"mine\""}}]}'
    assert make_rename("", "deployments/x")(said) == told
    assert make_rename("x", "deployments/x")(said) == said


async def test_usage_that_comes_with_each_event_is_told_once_at_the_end(swift: Swift) -> None:
    routes = RouteTable()
    routes.put("x", {"a": Target("x", "a", "x", swift.address, ready=True, tools=False)}, {"a": 100})
    async with aiohttp.ClientSession() as session:
        pieces = [p async for p in generate(routes, session, "x", [{"role": "user", "content": "hi"}], {})]
    assert "".join(p.text for p in pieces) == "ab"
    assert [(p.finish_reason, p.completion_tokens) for p in pieces if p.prompt_tokens] == [("stop", 3)]
