"""One real vLLM on a tiny random Llama: the parity probe, the gateway and the drain with everything real."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from services.common.clusters.local import LocalCluster
from services.common.errors import FailedPrecondition
from services.inference import parity
from services.inference.adapters import Adapter, describe_adapter
from services.inference.engine import Model, describe_model, detect_hardware
from services.inference.gateway import Gateway
from services.inference.generate import generate
from services.inference.launch import Artifacts, Limits
from services.inference.reference import PROMPTS, Reference
from services.inference.revisions import Deployment, State
from services.inference.rollout import Rollout
from services.inference.routes import RouteTable
from services.inference.spec import Parity, parse_spec

pytestmark = [pytest.mark.slow, pytest.mark.heavy, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The random weights are made to be touchy: bfloat16, which "auto" picks on some CPUs, would rightly be refused.
SPEC = {"model": "models/tiny", "dtype": "float32", "max_model_len": 512, "max_concurrency": 4,
        "adapters": ["adapters/one"], "lora": {"max_adapters": 2}}  # fmt: skip


def make_tiny_model(folder: Path) -> Path:
    """A random Llama of 64 dimensions with a byte-level BPE tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([content for turns in PROMPTS for _, content in turns], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_adapter(model: Path, folder: Path) -> Path:
    """A random LoRA of rank 4 that changes what the model says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    return folder


@dataclass
class Running:
    rollout: Rollout
    cluster: LocalCluster
    url: str
    references: dict[str, Reference]
    saved: dict[str, Any]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    home = tmp_path_factory.mktemp("inference")
    given = os.environ.get("FABRICTUNE_TEST_MODEL", "")
    model = Path(given) if given else await asyncio.to_thread(make_tiny_model, home / "model")
    references: dict[str, Reference] = {}
    saved: dict[str, Any] = {}
    cluster = LocalCluster(home / "cluster")
    await cluster.start()

    async def fetch_model(_: str) -> Model:
        return describe_model("models/m", "d1", model)

    async def fetch_reference(digest: str, dtype: str) -> Reference | None:
        return references.get(f"{digest}-{dtype}")

    async def store_reference(reference: Reference) -> None:
        references[f"{reference.model_digest}-{reference.dtype}"] = reference

    async def save(deployment: Deployment) -> None:
        saved[deployment.id] = deployment

    async def forget(deployment: str) -> None:
        saved.pop(deployment)

    adapter = await asyncio.to_thread(make_adapter, model, home / "adapter")

    async def fetch_adapter(name: str) -> Adapter:
        base = "d2" if name.endswith("foreign") else "d1"
        by = {"inputs": [{"name": "models/m", "digest": base}]}
        return describe_adapter(name, f"digest-of-{name[9:]}", adapter, by)

    routes = RouteTable()
    artifacts = Artifacts(fetch_model, fetch_reference, store_reference, save, forget, fetch_adapter)
    rollout = Rollout(cluster, routes, artifacts, detect_hardware(), Limits(start=600))
    gateway = Gateway(routes)
    port = await gateway.start("127.0.0.1", 0)
    try:
        await rollout.create_revision("tiny", "r1", parse_spec(SPEC), take_traffic=True)
        made = await rollout.wait("tiny", "r1")
        assert made.state is State.READY, made.message
        print("READY after", made.seconds, made.parity)
        while not saved["tiny"].traffic:
            await asyncio.sleep(0.05)
        yield Running(rollout, cluster, f"http://127.0.0.1:{port}/v1", references, saved)
    finally:
        await rollout.close()
        await gateway.close()
        await cluster.close()


async def test_a_healthy_engine_agrees_with_transformers_and_takes_traffic(running: Running) -> None:
    revision = running.rollout.get_revision("tiny", "r1")
    assert revision.parity["agreement"] >= 0.99
    assert revision.parity["mean_logprob_difference"] < 0.01
    assert 200 <= revision.parity["positions"] <= 640
    assert running.saved["tiny"].traffic == {"r1": 100}


async def test_a_reference_of_other_weights_is_refused_with_both_numbers(running: Running) -> None:
    status = (await running.cluster.list("engine"))[0]
    [reference] = running.references.values()
    shifted = [replace(s, top=(0, *s.top[:-1]), logprobs=tuple(v - 1 for v in s.logprobs)) for s in reference.sequences]
    wrong = replace(reference, sequences=tuple(shifted))
    result = await parity.probe(running.rollout.session, status.address, "tiny", wrong, "float32", Parity(), 512)
    with pytest.raises(FailedPrecondition, match=r"agrees .* at .*% .* nats on average") as caught:
        parity.check(result, Parity())
    assert caught.value.reason_override == "PARITY_FAILED"


async def test_a_chat_is_answered_whole_and_streamed_with_the_same_words(running: Running) -> None:
    body = {
        "model": "deployments/tiny",
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{running.url}/chat/completions", json=body) as response:
            assert response.status == 200, await response.text()
            whole = await response.json()
        async with session.post(f"{running.url}/chat/completions", json={**body, "stream": True}) as response:
            lines = [line async for line in response.content if line.startswith(b"data: ")]
    events = [json.loads(line[6:]) for line in lines[:-1]]
    assert lines[-1].strip() == b"data: [DONE]"
    assert whole["model"] == "deployments/tiny" and {e["model"] for e in events} == {"deployments/tiny"}
    text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events)
    assert text == whole["choices"][0]["message"]["content"]


async def test_generate_yields_the_text_then_the_reason_and_the_usage(running: Running) -> None:
    messages, sampling = [{"role": "user", "content": "Hi"}], {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    stream = generate(running.rollout.routes, running.rollout.session, "tiny", messages, sampling)
    pieces = [piece async for piece in stream]
    assert pieces[-1].finish_reason == "length" and pieces[-1].completion_tokens == 4
    assert running.rollout.routes.in_flight("tiny", "r1") == 0


async def say(running: Running, model: str) -> tuple[int, str]:
    body = {"model": model, "prompt": "abc", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    async with aiohttp.ClientSession() as session, session.post(f"{running.url}/completions", json=body) as response:
        told = await response.json()
        return response.status, told["choices"][0]["text"] if response.status == 200 else told["error"]["code"]


async def test_adapters_are_loaded_and_unloaded_while_the_engine_runs_and_are_there_after_a_crash(
    running: Running,
) -> None:
    base, one = await say(running, "tiny"), await say(running, "tiny:one")
    assert base[0] == one[0] == 200 and base[1] != one[1]
    with pytest.raises(FailedPrecondition, match="was trained on") as caught:
        await running.rollout.change_adapters("tiny", "r1", ("adapters/one", "adapters/foreign"))
    assert caught.value.reason_override == "ADAPTER_OF_ANOTHER_BASE"
    await running.rollout.change_adapters("tiny", "r1", ("adapters/two",))
    assert await say(running, "tiny:two") == one and await say(running, "tiny:one") == (404, "NOT_FOUND")
    [engine] = [json.loads(f.read_text()) for f in (running.cluster._folder / "journal").glob("*.json")]
    os.killpg(engine["pid"], signal.SIGKILL)
    async for deployment in running.rollout.watch("tiny"):
        revision = deployment.revisions["r1"]
        if revision.restarts and revision.state is State.READY:
            break
    assert await say(running, "tiny:two") == one and await say(running, "tiny") == base


async def test_deleting_a_deployment_lets_an_open_answer_end_first(running: Running) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 120, "ignore_eos": True, "stream": True}
    async with aiohttp.ClientSession() as session, session.post(f"{running.url}/completions", json=body) as response:
        first = await response.content.readline()
        deletion = asyncio.create_task(running.rollout.delete("tiny"))
        rest = await response.content.read()
    assert first.startswith(b"data: ") and rest.rstrip().endswith(b"data: [DONE]")
    await deletion
    assert await running.cluster.list("engine") == [] and running.saved == {}
