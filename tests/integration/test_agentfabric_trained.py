"""The recipe's acceptance with everything real: rows, ms-swift, the merge, both engines, RolePlay and its tool.

SmolLM2-135M is trained on 16 of the rows of examples/agentfabric, none of which asks for 朝阳区, in 32 steps (about a minute
and a half on two idle cores), merged, and served. Nothing constrains its answers. FABRICTUNE_WEATHER_MODEL names a folder
where the merged model is kept, or is found again.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import yaml

from services.common.base_models import EMBEDDED, prepare
from services.common.clusters.local import LocalCluster
from services.common.config import StoreConfig
from tests.house import House, open_house

pytestmark = [
    pytest.mark.slow, pytest.mark.heavy, pytest.mark.timeout(1200), pytest.mark.xdist_group("roleplay"),
    pytest.mark.asyncio(loop_scope="module"),
]  # fmt: skip
EXAMPLE = Path(__file__).resolve().parents[2] / "examples/agentfabric"
ROWS = 16
TRAINING = {"num_train_epochs": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def weather_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged model, made by the commands that a user types."""
    folder = tmp_path_factory.mktemp("weather")
    kept = os.environ.get("FABRICTUNE_WEATHER_MODEL")
    merged = Path(kept) if kept else folder / "merged"
    if not merged.exists():
        base, _ = prepare(EMBEDDED, folder)
        lines = (EXAMPLE / "weather.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
        assert not any("朝阳区" in line for line in lines)
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        told = yaml.safe_load((EXAMPLE / "weather.yaml").read_text(encoding="utf-8"))
        spec = {"instructions": told["conversion"]["instructions"]}
        (folder / "conversion.yaml").write_text(yaml.safe_dump(spec, allow_unicode=True), encoding="utf-8")
        values = [word for name, value in TRAINING.items() for word in ("--set", f"{name}={value}")]
        call(folder, "convert", "rows.jsonl", "--layout", "split", "--spec", "conversion.yaml", "-o", "dataset")
        call(folder, "train", "dataset", "--model", str(base), "--preset", "smollm2-cpu", *values, "-o", "adapter")
        call(folder, "merge", "--model", str(base), "--adapter", "adapter", "-o", str(merged))
    return merged


def call(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fabrictune", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["vllm", "swift"])
async def house(
    request: pytest.FixtureRequest, weather_model: Path, object_store: StoreConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[House]:  # fmt: skip
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "model").symlink_to(weather_model)
    # RolePlay names no temperature. As weather.yaml deploys it, and what that is called at each engine.
    steady = {
        "vllm": ["--override-generation-config", '{"temperature": 0}'],
        "swift": ["--temperature", "0"],
    }
    spec: dict[str, Any] = {"engine": request.param, "max_model_len": 2048, "engine_args": steady[request.param]}
    async with open_house(folder, object_store, LocalCluster(folder / "cluster"), **spec) as house:
        yield house


async def test_the_engine_computes_what_the_model_says(house: House) -> None:
    print("READY after", house.revision.seconds, house.revision.parity)
    assert house.revision.parity["positions"] > 250
    assert house.revision.parity["agreement"] >= 0.99


async def test_a_trained_model_calls_the_tool_once_for_the_right_place_and_tells_its_result(
    house: House, role_play_python: Path
) -> None:
    script = EXAMPLE / "weather.py"
    said = await house.call(
        str(role_play_python), str(script), "--api-base", f"{house.gateway}/v1", "--model", "weather"
    )
    print(said)
    assert 'Action: amap_weather\nAction Input: {"location": "朝阳区"}\n' in said
    assert said.count("Action Input:") == 1 and said.count("✓") == 4 and "✗" not in said
    told = said.rpartition("Answer:")[2].partition("✓")[0]
    assert "朝阳区" in told and "晴" in told and "25" in told


async def test_an_answer_names_the_model_as_it_was_asked_for(house: House) -> None:
    body = {"model": "deployments/weather", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    tools = [{"type": "function", "function": {"name": "amap_weather", "parameters": {"type": "object"}}}]
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{house.gateway}/v1/chat/completions", json=body) as response:
            assert (await response.json())["model"] == "deployments/weather"
        async with session.post(f"{house.gateway}/v1/chat/completions", json={**body, "tools": tools}) as response:
            told = await response.json()
    if house.revision.spec.engine == "swift":
        assert response.status == 400 and told["error"]["code"] == "TOOLS_NOT_SUPPORTED"
    else:
        assert response.status == 200, told


async def test_several_ask_at_once(house: House) -> None:
    async with aiohttp.ClientSession() as session:

        async def ask(number: int) -> bytes:
            body = {"model": "weather", "stream": True, "max_tokens": 8}
            body["messages"] = [{"role": "user", "content": f"{number} + 1"}]
            async with session.post(f"{house.gateway}/v1/chat/completions", json=body) as response:
                return await response.read()

        answers = await asyncio.gather(*(ask(number) for number in range(6)))
    assert all(answer.endswith(b"data: [DONE]\n\n") for answer in answers)
