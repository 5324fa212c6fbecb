"""One real vLLM on a tiny random Llama: the parity probe, the gateway and the drain with everything real."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import aiohttp
import jsonschema  # type: ignore[import-untyped]
import openai
import pytest
import pytest_asyncio

from fabrictune.v1 import inference_pb2
from services.common.clusters.local import LocalCluster
from services.common.errors import FailedPrecondition
from services.common.fabric import render_rows, render_system
from services.conversion.readers import openai_tools
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
from services.inference.service import InferenceService
from services.inference.spec import Parity, parse_spec

pytestmark = [pytest.mark.slow, pytest.mark.heavy, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

TEMPLATE = (
    # As Llama 3's, which minds an empty list of tools.
    "{% if tools is not none %}Environment: ipython\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The random weights are made to be touchy: bfloat16, which "auto" picks on some CPUs, would rightly be refused.
SPEC = {"model": "models/tiny", "dtype": "float32", "max_model_len": 2048, "max_concurrency": 16,
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
        max_position_embeddings=2048,
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


CITIES = ["Beijing", "上海", "Paris"]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }
    for name, description, properties, required in (
        (
            "amap_weather",
            "查询天气",
            {
                "city": {"type": "string", "enum": CITIES, "description": "城市"},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            ["city", "days"],
        ),
        (
            "book 车票",
            "Book a ticket.",
            {
                "way": {
                    "type": "object",
                    "properties": {
                        # Not maxLength alone: random weights write surrogates, which xgrammar 0.2.8 counts as one character.
                        "from": {"type": "string", "pattern": "^[A-Za-z车站 ]{1,4}$"},
                        "stops": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
                    },
                    "required": ["from", "stops"],
                },
                "seat": {"anyOf": [{"type": "null"}, {"type": "string", "enum": ["window", 'the "aisle"']}]},
            },
            ["way"],
        ),
        ("now", "The time.", {}, []),
    )
]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
QUESTION: Any = {"role": "user", "content": "How is the weather in Paris?"}
SHORT: Any = {"role": "system", "content": "Help."}


def check_call(call: Any) -> dict[str, Any]:
    """The arguments of a call, which fit its tool's schema."""
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, SCHEMAS[call.function.name])
    assert call.id and isinstance(arguments, dict)
    return arguments


@pytest_asyncio.fixture(loop_scope="module")
async def sdk(running: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=running.url, api_key="EMPTY", max_retries=0) as client:
        yield client


async def test_the_openai_sdk_gets_a_call_whole_and_streamed_and_gives_its_result_back(sdk: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "tools": TOOLS, "max_tokens": 120, "temperature": 0, "seed": 1}
    asked["messages"] = messages = [SHORT, QUESTION]
    whole = (await sdk.chat.completions.create(**asked, tool_choice="required")).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.tool_calls
    [call] = whole.message.tool_calls
    check_call(call)
    chunks = [c async for c in await sdk.chat.completions.create(**asked, tool_choice="required", stream=True)]
    deltas = [d for c in chunks if c.choices for d in c.choices[0].delta.tool_calls or ()]
    assert [(d.index, d.function.name, d.function.arguments) for d in deltas] == [
        (0, call.function.name, call.function.arguments)
    ]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "tool_calls"
    messages += [whole.message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "晴"}]
    told = await sdk.chat.completions.create(**asked, tool_choice="none", extra_body={"return_prompt_text": True})
    prompt = (told.model_extra or {})["prompt_text"]
    assert f"Action: {call.function.name}\nAction Input: {{" in prompt
    assert prompt.endswith("\n\nObservation: <result>晴</result>\nAnswer:<|im_end|>\n<|im_start|>assistant\n")
    assert not told.choices[0].message.tool_calls and "Action:" not in (told.choices[0].message.content or "")


async def test_the_engine_is_asked_with_the_prompt_that_conversion_trains(sdk: openai.AsyncOpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": [SHORT, QUESTION], "max_tokens": 1}
    tooled = await sdk.chat.completions.create(**body, tools=TOOLS, extra_body={"return_prompt_text": True})
    plain = await sdk.chat.completions.create(**body, extra_body={"return_prompt_text": True})
    row = {"tools": TOOLS, "messages": [SHORT, QUESTION, {"role": "assistant", "content": "."}]}
    read = openai_tools.read(row)
    system = render_system(read.tools, read.instruction, "en")
    [trained] = render_rows("split", system, read.tools, read.rounds, "en")
    assert (tooled.model_extra or {})["prompt_text"] == chatml(trained.messages[:-1])
    assert (plain.model_extra or {})["prompt_text"] == chatml([SHORT, QUESTION])


def chatml(messages: Sequence[Mapping[str, Any]]) -> str:
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


async def test_of_more_than_a_hundred_constrained_calls_every_one_fits_its_schema(sdk: openai.AsyncOpenAI) -> None:
    choices: list[Any] = ["required", *({"type": "function", "function": {"name": name}} for name in SCHEMAS)]
    limit = asyncio.Semaphore(16)

    async def ask(number: int) -> Any:
        body: dict[str, Any] = {
            "model": "tiny",
            "messages": [SHORT, QUESTION],
            "tools": TOOLS,
            "max_tokens": 150,
            "seed": number,
        }
        async with limit:
            answer = await sdk.chat.completions.create(**body, tool_choice=choices[number % len(choices)])
        return answer.choices[0]

    answers = await asyncio.gather(*(ask(number) for number in range(104)))
    for number, answer in enumerate(answers):
        [call] = answer.message.tool_calls
        check_call(call)
        named = choices[number % len(choices)]
        assert isinstance(named, str) or call.function.name == named["function"]["name"]
    assert {a.message.tool_calls[0].function.name for a in answers} == set(SCHEMAS)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "amap_weather"}}])
async def test_a_call_that_the_limit_of_tokens_cuts_off_is_none(sdk: openai.AsyncOpenAI, choice: Any) -> None:
    body: dict[str, Any] = {
        "model": "tiny",
        "messages": [SHORT, QUESTION],
        "tools": TOOLS,
        "max_tokens": 12,
        "tool_choice": choice,
    }
    whole = (await sdk.chat.completions.create(**body)).choices[0]
    chunks = [c async for c in await sdk.chat.completions.create(**body, stream=True)]
    assert whole.finish_reason == "length" and not whole.message.tool_calls and not whole.message.content
    streamed = [c.choices[0] for c in chunks if c.choices]
    assert streamed[-1].finish_reason == "length"
    assert not any(c.delta.tool_calls or c.delta.content for c in streamed)


async def test_a_model_that_may_choose_can_answer_in_words(sdk: openai.AsyncOpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": [SHORT, QUESTION], "tools": TOOLS, "max_tokens": 20}
    for free in ({}, {"constrain_tools": False}):
        answer = (await sdk.chat.completions.create(**body, temperature=0, extra_body=free)).choices[0]
        assert answer.message.content and not answer.message.tool_calls


async def test_a_schema_that_no_grammar_can_be_made_of_is_refused_and_the_engine_lives(sdk: openai.AsyncOpenAI) -> None:
    bad = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)["}}, "required": ["a"]}
    tools: Any = [{"type": "function", "function": {"name": "t", "parameters": bad}}]
    with pytest.raises(openai.BadRequestError):
        await sdk.chat.completions.create(model="tiny", messages=[QUESTION], tools=tools, tool_choice="required")
    with pytest.raises(openai.BadRequestError, match=r"tools\[0\]\.function\.name"):
        broken: Any = [{"type": "function", "function": {"name": "a\nb"}}]
        await sdk.chat.completions.create(model="tiny", messages=[QUESTION], tools=broken)
    assert (await sdk.chat.completions.create(model="tiny", messages=[QUESTION], max_tokens=1)).choices


async def test_generate_tells_calls_their_end_and_the_usage(running: Running) -> None:
    service = InferenceService(running.rollout, running.rollout.routes, cast("Any", None), running.url)
    request = inference_pb2.GenerateRequest(
        deployment="deployments/tiny",
        messages=[inference_pb2.Message(**message) for message in (SHORT, QUESTION)],
        sampling=inference_pb2.Sampling(max_tokens=120, seed=3),
        tools=[
            inference_pb2.Tool(name=name, description="x", parameters=json.dumps(schema))
            for name, schema in SCHEMAS.items()
        ],
        tool_choice="amap_weather",
    )
    pieces = [piece async for piece in service.Generate(request, None)]
    [call] = pieces[-1].tool_calls
    assert call.id and call.name == "amap_weather"
    jsonschema.validate(json.loads(call.arguments), SCHEMAS["amap_weather"])
    assert pieces[-1].finish_reason == "stop" and pieces[-1].usage.completion_tokens > 0


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


async def test_a_wrong_engine_setting_is_refused_and_a_rollback_under_load_fails_nobody(running: Running) -> None:
    rollout, are_loaded, is_over = running.rollout, asyncio.Event(), asyncio.Event()

    async def keep_asking(session: aiohttp.ClientSession) -> list[tuple[int, bytes]]:
        answers = []
        body = {"model": "tiny", "prompt": "a", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "stream": True}
        while not is_over.is_set():
            async with session.post(f"{running.url}/completions", json=body) as response:
                answers.append((response.status, (await response.read()).rstrip()))
            if not are_loaded.is_set():
                await asyncio.sleep(0.5)  # two engines import vLLM on these cores
        return answers

    async with aiohttp.ClientSession() as session:
        clients = [asyncio.create_task(keep_asking(session)) for _ in range(4)]
        plain = {key: value for key, value in SPEC.items() if key not in ("adapters", "lora")}
        wrong = {**plain, "engine_args": ['--hf-overrides={"rms_norm_eps": 0.5}']}
        await rollout.create_revision("tiny", "wrong", parse_spec(wrong), take_traffic=True)
        await rollout.create_revision("tiny", "r2", parse_spec(plain))
        refused, healthy = await rollout.wait("tiny", "wrong"), await rollout.wait("tiny", "r2")
        assert refused.state is State.FAILED and "does not compute what the model says" in refused.message
        assert healthy.state is State.READY and running.saved["tiny"].traffic == {"r1": 100}
        are_loaded.set()
        for revision in ("r2", "r1"):  # there, and back
            await rollout.set_traffic("tiny", {revision: 100})
            async with asyncio.timeout(60):
                while not rollout.routes.in_flight("tiny", revision):
                    await asyncio.sleep(0.005)  # between two answers nothing is in flight
            await asyncio.sleep(1)
        is_over.set()
        answers = [answer for told in await asyncio.gather(*clients) for answer in told]
    assert len(answers) > 20
    assert all(status == 200 and raw.endswith(b"data: [DONE]") for status, raw in answers)


async def test_deleting_a_deployment_lets_an_open_answer_end_first(running: Running) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 120, "ignore_eos": True, "stream": True}
    async with aiohttp.ClientSession() as session, session.post(f"{running.url}/completions", json=body) as response:
        first = await response.content.readline()
        deletion = asyncio.create_task(running.rollout.delete("tiny"))
        rest = await response.content.read()
    assert first.startswith(b"data: ") and rest.rstrip().endswith(b"data: [DONE]")
    await deletion
    assert await running.cluster.list("engine") == [] and running.saved == {}
