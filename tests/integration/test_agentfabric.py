"""The real RolePlay on a deployed model, through our gateway, and what it said there as rows to train on.

The deployment, its gateway, the recorder, the object store, the command, modelscope-agent 0.7.1 and its tool amap_weather
are the real ones. What is scripted is the engine: a small server where vLLM stands, which answers as a model would that was
trained on such rows. So this tests the wire; test_agentfabric_trained.py trains one and serves it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from services.common.clusters import Workload, WorkloadStatus
from services.common.clusters.local import LocalCluster
from services.common.config import StoreConfig
from services.inference.reference import PROMPTS_VERSION, ForcedText, Reference
from tests.house import House, open_house

pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("roleplay"),
    pytest.mark.asyncio(loop_scope="module"),
]  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
WEATHER = ROOT / "examples/agentfabric/weather.py"
TOLD = "朝阳区现在的天气是晴，气温25度。"
ENGINE = r"""
import asyncio, json, re, sys
from aiohttp import web
async def models(_): return web.json_response({"object": "list", "data": [{"id": "weather"}]})
async def completions(_):
    said = [None, {"6": {"logprob": -0.1, "rank": 1}}, {"7": {"logprob": -0.2, "rank": 1}}]
    return web.json_response({"choices": [{"prompt_logprobs": said}]})
def say(asked):
    place = re.search(r"([\u4e00-\u9fff]+区)天气", asked)
    result = re.search(r"<result>(.+?)的天气是(.+?)温度是(\d+)度。</result>\nAnswer:$", asked)
    if result:
        return "{}现在的天气是{}，气温{}度。".format(*result.groups())
    if "</result>" in asked or not place:
        return "很抱歉，我现在查不到。"
    return '我来查询一下。\nAction: amap_weather\nAction Input: {"location": "%s"}\n' % place[1]
async def chat(request):
    body = await request.json()
    text = say(body["messages"][-1]["content"])
    if not body.get("stream"):
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return web.json_response({"id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
                                  "choices": [choice]})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for delta, reason in [*(({"content": c}, None) for c in text), ({}, "stop")]:
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": body["model"],
                 "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response
app = web.Application()
app.add_routes([web.get("/v1/models", models), web.post("/v1/completions", completions)])
app.router.add_post("/v1/chat/completions", chat)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[sys.argv.index("--port") + 1]), print=None)
"""
REFERENCE = Reference("", "", PROMPTS_VERSION, {}, (ForcedText((5, 6, 7), (6, 7), (1, 1), (3.0, 3.0), (-0.1, -0.2)),))


class ScriptedEngines(LocalCluster):
    """The local cluster, running the small server with vLLM's arguments."""

    async def create(self, workload: Workload) -> WorkloadStatus:
        return await super().create(replace(workload, argv=(sys.executable, "-c", ENGINE, *workload.argv[3:])))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(object_store: StoreConfig, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("agentfabric")
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text("{}")
    (folder / "model/model.safetensors").write_bytes(b"")
    async with open_house(folder, object_store, ScriptedEngines(folder / "cluster"), REFERENCE) as house:
        yield house


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def said(house: House, role_play_python: Path) -> str:
    """The recipe's acceptance, as a user runs it, on the entry that the command writes."""
    there = {"qwen-max": {"type": "dashscope", "model": "qwen-max"}}
    (house.folder / "model_config.json").write_text(json.dumps(there))
    await house.fabrictune("agentfabric", "config", "--write", "model_config.json")
    return await house.call(str(role_play_python), str(WEATHER), "--config", "model_config.json", "--model", "weather")


async def test_role_play_calls_the_tool_and_tells_its_result(house: House, said: str) -> None:
    entries = json.loads((house.folder / "model_config.json").read_text(encoding="utf-8"))
    assert entries["qwen-max"] == {"type": "dashscope", "model": "qwen-max"}
    assert entries["weather"]["api_base"] == f"{house.gateway}/v1"
    assert f"<result>朝阳区的天气是晴温度是25度。</result>\nAnswer:{TOLD}" in said
    assert "✗" not in said


async def test_what_was_said_becomes_a_row_that_trains_what_role_play_asks(house: House, said: str) -> None:
    argv = ("datasets", "from-traffic", "--deployment", "deployments/weather", "--since", "1h", "-o", "rows.jsonl")
    told = json.loads(await house.fabrictune("--json", *argv))
    assert told["rows"] == 1 and {code: left["count"] for code, left in told["left_out"].items()} == {"CONTINUED": 1}
    assert [left["reason"] for left in house.lines("rows.left-out.jsonl")] == ["CONTINUED"]

    await house.fabrictune("convert", "rows.jsonl", "--format", "agentfabric", "--layout", "split", "-o", "dataset")
    assert house.lines("dataset/rejects.jsonl") == []
    call, summary = house.lines("dataset/train.jsonl")
    assert call["messages"][-2]["content"] == "(。你可以使用工具：[amap_weather])朝阳区天气怎样？"
    assert call["messages"][-1]["content"] == (
        '我来查询一下。\nAction: amap_weather\nAction Input: {"location": "朝阳区"}\n'
    )
    assert summary["messages"][-2]["content"].endswith(
        "\nObservation: <result>朝阳区的天气是晴温度是25度。</result>\nAnswer:"
    )
    assert summary["messages"][-1]["content"] == TOLD


async def test_traffic_that_there_is_none_of_says_how_it_is_recorded(house: House) -> None:
    argv = ("datasets", "from-traffic", "--deployment", "deployments/other", "-o", "none.jsonl")
    assert "`fabrictune up --record`" in await house.fabrictune(*argv, status=65)
    assert not list(house.folder.glob("none*"))


async def test_deploy_says_how_long_it_took_to_the_first_token_step_by_step(house: House) -> None:
    told = await house.fabrictune("deploy", "models/m", "--as", "timed")
    assert re.search(
        r"first token after [\d.]+ s: fetch [\d.]+ s, place .+, load .+, reference .+, probe .+, first token [\d.]+ s",
        told,
    )
    [revision] = json.loads(await house.fabrictune("--json", "deploy", "models/m", "--as", "timed"))["revisions"]
    seconds = revision["start_seconds"]
    assert set(seconds) == {"fetch", "place", "load", "reference", "probe", "first_token", "total"}
    assert sum(seconds.values()) - 2 * seconds["total"] < 0.2
    await house.fabrictune("undeploy", "deployments/timed")
