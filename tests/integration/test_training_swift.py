"""Training with the real ms-swift: a Llama of two tiny layers, a few steps; about half a minute for each run of it.

One run is shared by all tests that only look at it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from services.common.config import StoreConfig
from services.common.errors import InvalidData
from services.common.records import accept_record, plan_record
from services.common.reporter import Progress
from services.common.store import Store
from services.training.presets import swift_argument_names
from services.training.spec import Spec
from services.training.swift import PLUGIN
from services.training.worker import STAGE, run
from tests.faults import WorkerProcess

pytestmark = [pytest.mark.slow, pytest.mark.heavy]

CALL = 'Action: get_weather\nAction Input: {"city": "Paris"}\n'
SUMMARY = "It is sunny in Paris today."
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STEPS = 40
ARGUMENTS = {
    **{"max_steps": STEPS, "save_steps": 5, "eval_steps": 5, "eval_strategy": "steps", "logging_steps": 1},
    **{"max_length": 128, "lora_dropout": 0.1, "learning_rate": 1e-2, "lora_rank": 4, "save_total_limit": 10},
    # The preset's upper layers are not there in a model of two.
    **{"target_regex": r".*_proj", "effective_batch_size": 16, "per_device_train_batch_size": 2},
}


@dataclass
class Listener:
    """A Reporter that remembers, and copies checkpoints as the store would."""

    kept: Path
    events: list[Progress] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)
    checkpoints: dict[int, Path] = field(default_factory=dict)
    on_progress: Callable[[Progress], None] = lambda progress: None

    def progress(self, progress: Progress) -> None:
        self.events.append(progress)
        self.on_progress(progress)

    def log(self, text: str, severity: str = "INFO") -> None:
        self.lines.append((severity, text))

    def checkpoint(self, step: int, folder: Path) -> None:
        self.checkpoints[step] = self.kept / f"step-{step}"
        shutil.copytree(folder, self.checkpoints[step])


def _row(number: int, answer: str, question: str = "What is the weather in Paris?") -> dict[str, Any]:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": f"{question} ({number})"},
        {"role": "assistant", "content": answer},
    ]
    return {"id": f"r{number}/0", "source": "test", "messages": messages}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers whose tokenizer was trained on the rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([CALL, SUMMARY, "system user assistant"] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=2, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 rows to train on, the last of which is longer than max_length, and 2 to validate on."""
    folder = tmp_path_factory.mktemp("dataset")
    rows = [_row(n, CALL if n % 2 else SUMMARY) for n in range(12)]
    rows.append(_row(12, SUMMARY, "Tell me all about it. " * 60))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "validation.jsonl").write_text("".join(json.dumps(_row(n, CALL)) + "\n" for n in (20, 21)))
    return folder


def _spec(**arguments: Any) -> Spec:
    values = {"dataset": "datasets/d1", "base_model": "models/tiny", "preset": "smollm2-cpu", "checkpoint": "best"}
    return Spec.model_validate({**values, "arguments": {**ARGUMENTS, **arguments}})


@dataclass
class Run:
    """A finished run."""

    output: Path
    metadata: dict[str, Any]
    listener: Listener

    @property
    def losses(self) -> dict[int, float]:
        return {e.step: e.loss for e in self.listener.events if e.loss is not None and e.eval_loss is None}


@pytest.fixture(scope="session")
def trained(tiny_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One whole run."""
    folder = tmp_path_factory.mktemp("trained")
    output, listener = folder / "adapter", Listener(folder)
    output.mkdir()
    metadata = run(_spec(), {"dataset": dataset, "base_model": tiny_model}, output, listener)
    return Run(output, metadata, listener)


def test_training_leaves_an_adapter_that_says_nothing_of_this_machine(trained: Run, tiny_model: Path) -> None:
    names = {file.name for file in trained.output.iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "loss.png",
        "tensorboard",
    } <= names
    assert {"training_args.json", "train.log", "chat_template.jinja"} <= names
    assert ".work" not in names
    config = (trained.output / "adapter_config.json").read_text()
    assert json.loads(config)["base_model_name_or_path"] == "models/tiny"
    assert str(tiny_model) not in config + (trained.output / "training_args.json").read_text()
    assert (trained.output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_progress_is_typed_and_ends_at_the_last_step(trained: Run) -> None:
    trains = [e for e in trained.listener.events if e.loss is not None and e.eval_loss is None]
    assert {e.step for e in trains} == set(range(1, STEPS + 1))
    last = trains[-1]
    assert (last.step, last.total_steps, last.phase) == (STEPS, STEPS, "training")
    assert last.tokens_per_second and last.tokens_per_second > 0
    assert last.memory_bytes and last.memory_bytes > 100 << 20
    assert last.learning_rate is not None and last.grad_norm and last.token_accuracy is not None and last.epoch
    assert [e for e in trained.listener.events if e.eval_loss is not None]
    recorded = [json.loads(line) for line in (trained.output / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in recorded if "eval_loss" not in r] == list(range(1, STEPS + 1))


def test_rows_in_are_rows_trained_and_rows_refused_by_name(trained: Run) -> None:
    assert trained.metadata["rows"] == 13
    assert trained.metadata["rows_trained"] == 12
    assert trained.metadata["rows_refused"] == ["r12/0"]
    assert any("r12/0" in text for severity, text in trained.listener.lines if severity == "WARNING")


def test_each_checkpoint_is_handed_over_complete(trained: Run) -> None:
    assert STEPS in trained.listener.checkpoints
    for step, folder in trained.listener.checkpoints.items():
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step
        assert (folder / "optimizer.pt").exists()


def test_the_best_checkpoint_is_the_output(trained: Run) -> None:
    losses = {e.step: e.eval_loss for e in trained.listener.events if e.eval_loss is not None}
    assert losses[trained.metadata["step"]] == min(losses.values())


@pytest.fixture
def worker(
    tiny_model: Path, dataset: Path, store: Store, object_store: StoreConfig, tmp_path: Path
) -> Iterator[WorkerProcess]:
    """A worker for the job that `trained` did, on a store of its own."""
    made = WorkerProcess("training", "trainingJobs/t1", store, object_store, tmp_path / "data")
    made.artifacts.publish(tiny_model, "models/tiny", "model", created_by={}, metadata={})
    made.artifacts.publish(dataset, "datasets/d1", "dataset", created_by={}, metadata={})
    accept_record(store, plan_record(STAGE, made.artifacts, _spec().model_dump(mode="json", exclude_unset=True), "t1"))
    yield made
    made.close()


def test_a_run_that_was_told_to_stop_and_then_killed_ends_with_the_curve_of_one_without_a_break(
    trained: Run, worker: WorkerProcess, store: Store, tmp_path: Path
) -> None:
    worker.start()
    first = worker.wait_for_checkpoint(after=0)
    assert worker.terminate() == 143
    stopped_at = worker.checkpoints()[-1]
    assert first <= stopped_at < STEPS, "it saves where it is told to stop"
    assert store.get_json("trainingJobs/t1/outcome.json") is None

    # What a worker that died while it uploaded leaves: files without a manifest.
    store.put_bytes(f"checkpoints/trainingJobs-t1/step-{STEPS:08d}/0/optimizer.pt", b"half")
    worker.start()
    second = worker.wait_for_checkpoint(after=stopped_at)
    assert worker.kill() == -signal.SIGKILL
    worker.wait_until_all_are_gone()
    assert second < STEPS, "the kill came in the middle of training"

    worker.start()
    assert worker.wait() == 0, worker.log[-3000:]
    worker.artifacts.fetch("adapters/t1", tmp_path / "adapter")
    records = [json.loads(line) for line in (tmp_path / "adapter" / "metrics.jsonl").read_text().splitlines()]
    resumed = {r["step"]: r["loss"] for r in records if "eval_loss" not in r}
    assert set(resumed) == set(range(1, STEPS + 1))
    for step, loss in resumed.items():
        assert loss == pytest.approx(trained.losses[step], abs=1e-5), f"step {step}"
    evaluations = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    recorded = {e.step: e.eval_loss for e in trained.listener.events if e.eval_loss is not None}
    # A run that is told to stop does not evaluate first.
    assert set(recorded) - set(evaluations) <= {stopped_at}
    assert evaluations == pytest.approx({step: recorded[step] for step in evaluations}, abs=1e-5)


def test_full_training_leaves_a_whole_model_that_has_changed(tiny_model: Path, dataset: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    output = tmp_path / "model"
    output.mkdir()
    arguments = {"tuner_type": "full", "target_regex": None, "target_modules": None, "lora_rank": None}
    left = {k: v for k, v in {**ARGUMENTS, **arguments}.items() if v is not None}
    more = {
        "max_steps": 2,
        "save_steps": 2,
        "eval_strategy": "no",
        "group_by_length": True,
        "use_logits_to_keep": False,
    }
    spec = _spec().model_copy(update={"arguments": {**left, **more}})
    assert spec.output == ("model", "models")
    metadata = run(spec, {"dataset": dataset, "base_model": tiny_model}, output, Listener(tmp_path))
    assert (metadata["rows_trained"], metadata["rows_refused"]) == (12, ["r12/0"])
    names = {file.name for file in output.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl"} <= names
    assert not {name for name in names if name.startswith("adapter")}
    before, after = load_file(tiny_model / "model.safetensors"), load_file(output / "model.safetensors")
    assert set(before) == set(after)
    assert all((before[name] != after[name]).any() for name in before if "proj" in name)


def test_a_dataset_that_is_all_too_long_is_refused_before_ms_swift_starts(
    tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    begin = time.monotonic()
    with pytest.raises(InvalidData, match="all 13 rows are longer than max_length 4"):
        run(_spec(max_length=4), {"dataset": dataset, "base_model": tiny_model}, tmp_path, Listener(tmp_path))
    assert time.monotonic() - begin < 5
    assert list(tmp_path.iterdir()) == []


MASK = """
import dataclasses, json, os, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from swift.arguments import SftArguments
from swift.model import get_processor
from swift.template import get_template
sys.path.insert(0, sys.argv[2])
import swift_mean, swift_plugin
from transformers import AutoModelForCausalLM
def average(folder, first, last, resume=None):
    "Weights that are all 1 after step 1, all 2 after step 2, …, of 7 steps; a checkpoint after the last one."
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), LoraConfig(r=2, target_modules="all-linear"))
    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    args = SimpleNamespace(output_dir=folder, resume_from_checkpoint=resume)
    mean = swift_mean.MeanOfWeights(args, SimpleNamespace(model=model, accelerator=accelerator))
    state = SimpleNamespace(global_step=first - 1, max_steps=7, is_world_process_zero=True)
    mean.on_train_begin(args, state, None)
    for state.global_step in range(first, last + 1):
        for name, weight in model.named_parameters():
            if weight.requires_grad: torch.nn.init.constant_(weight, state.global_step)
        mean.on_step_end(args, state, None)
    checkpoint = Path(folder) / f"checkpoint-{last}"
    model.save_pretrained(checkpoint)
    mean.on_save(args, state, None)
    own, of_all = (load_file(f / "adapter_model.safetensors") for f in (checkpoint, checkpoint / "mean")) \
        if (checkpoint / "mean").exists() else (load_file(checkpoint / "adapter_model.safetensors"), {})
    return {"same_names": set(own) == set(of_all), "means": sorted({v for t in of_all.values() for v in t.unique().tolist()})}
def adjust(template):
    "What a logit adjustment of 1.5 takes from each logit, in training and in serving; and the first token of a call."
    os.environ["FABRICTUNE_LOGIT_ADJUSTMENT"] = "1.5"
    model, asked = AutoModelForCausalLM.from_pretrained(sys.argv[1]), torch.tensor([[1, 2, 3]])
    before = model(asked).logits
    trainer = SimpleNamespace(model=model, template=template, accelerator=SimpleNamespace(unwrap_model=lambda model: model))
    state = SimpleNamespace(is_world_process_zero=False)
    swift_plugin.Fabrictune(SimpleNamespace(), trainer).on_train_begin(None, state, None)
    less = [(before - getattr(model, mode)()(asked).logits)[0, -1].tolist() for mode in ("train", "eval")]
    first = template.tokenizer("Action: x", add_special_tokens=False).input_ids[0]
    return {"first": first, "less": [{i: round(v, 4) for i, v in enumerate(values) if v} for values in less]}
processor = get_processor(sys.argv[1], model_type="llama")
def encode(template, loss_scale, rows):
    template = get_template(processor, template_type=template, loss_scale=loss_scale, max_length=4096)
    template.set_mode("train")
    return [weigh(template, row) for row in rows]
def weigh(template, row):
    encoded = template.encode({"messages": row["messages"]})
    weights = encoded.get("loss_scale") or [1.0] * len(encoded["labels"])
    weights = [w if label != -100 else 0.0 for w, label in zip(weights, encoded["labels"])]
    runs = []
    for token, weight in zip(encoded["input_ids"], weights):
        if runs and runs[-1][0] == weight: runs[-1][1].append(token)
        else: runs.append([weight, [token]])
    return [[weight, template.tokenizer.decode(tokens)] for weight, tokens in runs]
rows = list(map(json.loads, sys.stdin))
wanted = [("chatml", "agentfabric"), ("qwen3", "agentfabric"), ("llama3", "agentfabric"), ("chatml", "default"),
          ("chatml", "first_word")]
found = {f"{template} {scale}": encode(template, scale, rows) for template, scale in wanted}
found["mean"] = {
    "before": average(sys.argv[3] + "/a", 1, 3), "cut off": average(sys.argv[3] + "/b", 1, 5),
    "resumed": average(sys.argv[3] + "/c", 6, 7, sys.argv[3] + "/b/checkpoint-5"), "whole": average(sys.argv[3] + "/d", 1, 7),
}
found["adjusted"] = adjust(get_template(processor, template_type="chatml"))
print("RESULT" + json.dumps({**found, "arguments": [f.name for f in dataclasses.fields(SftArguments)]}))
"""
TWO_CALLS = (
    "Action: get_weather\nAction Input: {'city': 'Paris', 'note': 'Observation: none, Thought: none'}\n"
    "Observation: {'sky': 'sunny'}\n"
    "Action: get_weather\nAction Input: {'city': 'Rome'}\nObservation: {'sky': 'Final Answer: rain'}\n"
    "Thought: I now know the final answer\nFinal Answer: Sunny in Paris. Action: take no umbrella. Observation: done."
)
PROMPT = (
    "Answer the following questions as best you can. You have access to the following APIs:\n"
    "1. get_weather: Call this tool to interact with the get_weather API. What is the get_weather API useful for? "
    'The weather. Parameters: [{"name": "city", "description": "a city", "required": "True"}, '
    '{"name": "note", "description": "a note", "required": "False"}]\n\nUse the following format:\n\nThought: …\nBegin!'
)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What conversion makes of two rounds, the first with two calls, in both layouts."""
    from services.conversion.worker import STAGE as CONVERSION

    folder = tmp_path_factory.mktemp("converted")
    turns = [("system", PROMPT), ("user", "Paris and Rome?"), ("assistant", TWO_CALLS), ("user", "Thanks."),
             ("assistant", "Thought: I now know the final answer\nFinal Answer: You are welcome.")]  # fmt: skip
    row = {"id": "row-0", "conversations": [{"from": role, "value": text} for role, text in turns]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "out").mkdir()
    spec = {"sources": [{"uri": "datasets/rows", "layout": "both"}], "split": {"validation": 0, "test": 0}}
    inputs = {"sources/0": folder / "rows.jsonl"}
    CONVERSION.run(CONVERSION.spec.model_validate(spec), inputs, folder / "out", Listener(folder))
    return [json.loads(line) for line in (folder / "out" / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def encoded(
    tiny_model: Path, converted: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What ms-swift's own templates make of rows, the arguments that it knows, and means of weights; in a process of its own."""
    rows = [*converted, _row(0, f"Let me look.\n{CALL}"), _row(1, SUMMARY)]
    stdin = "\n".join(json.dumps(row) for row in rows)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "USE_HF": "1", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", MASK, str(tiny_model), str(PLUGIN.parent), str(tmp_path_factory.mktemp("mean"))]
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.rsplit("RESULT", 1)[1])
    return {**result, "rows": rows}


def _trained_pieces(row: dict[str, Any], call_weight: float) -> list[tuple[float, str]]:
    """What must be trained of a row: calls, and all else that the assistant says; where neighbours weigh alike, as one."""
    pieces: list[tuple[float, str]] = []
    for message in row["messages"]:
        if message["role"] != "assistant" or message.get("loss") is False:
            continue
        start = message["content"].find("Action: get_weather\nAction Input: ")
        prose, call = (
            (message["content"], "") if start < 0 else (message["content"][:start], message["content"][start:])
        )
        pieces += [(weight, text) for weight, text in ((1.0, prose), (call_weight, call)) if text]
    return pieces


ENDS = {"chatml": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>"}


@pytest.mark.parametrize(
    ("case", "call_weight"),
    [("chatml agentfabric", 2.0), ("qwen3 agentfabric", 2.0), ("llama3 agentfabric", 2.0), ("chatml default", 1.0)],
)
def test_calls_count_double_answers_once_and_results_and_prompts_nothing_to_the_token(
    encoded: dict[str, Any], case: str, call_weight: float
) -> None:
    end = ENDS[case.split()[0]]
    layouts = set()
    for row, runs in zip(encoded["rows"], encoded[case], strict=True):
        layouts.add(row.get("layout", len(row["messages"])))
        found = [(weight, text) for weight, text in runs if weight]
        wanted = _trained_pieces(row, call_weight)
        assert "".join(text for _, text in found).replace(end, "").strip() == "".join(t for _, t in wanted).strip()
        for weight, text in wanted:
            assert any(w == weight and text.strip() in t for w, t in found), (case, weight, text, found)
        doubled = "".join(text for weight, text in found if weight == 2.0)
        assert doubled == "".join(text for weight, text in wanted if weight == 2.0)
    assert len(encoded["rows"]) >= 5


def test_the_mean_is_of_the_weights_after_each_step_of_the_second_half_also_over_a_break(
    encoded: dict[str, Any],
) -> None:
    mean = encoded["mean"]
    assert mean["before"] == {"same_names": False, "means": []}, "the first half of 7 steps are 3"
    assert mean["cut off"] == {"same_names": True, "means": [4.5]}
    assert mean["whole"] == mean["resumed"] == {"same_names": True, "means": [5.5]}


def test_the_mean_is_the_output_where_it_is_wanted(tiny_model: Path, dataset: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (output := tmp_path / "adapter").mkdir()
    spec = _spec(max_steps=4, save_steps=4, eval_strategy="no").model_copy(update={"checkpoint": "mean"})
    run(spec, {"dataset": dataset, "base_model": tiny_model}, output, listener := Listener(tmp_path))
    weights = "adapter_model.safetensors"
    made, last = load_file(output / weights), load_file(listener.checkpoints[4] / weights)
    mean = load_file(listener.checkpoints[4] / "mean" / weights)
    assert set(made) == set(last) == set(mean)
    assert all((made[name] == mean[name]).all() for name in made)
    assert any((made[name] != last[name]).any() for name in made), "the mean of two steps is not the last one"


def test_a_logit_adjustment_is_against_a_call_s_first_word_and_in_training_only(encoded: dict[str, Any]) -> None:
    adjusted = encoded["adjusted"]
    assert adjusted["less"] == [{str(adjusted["first"]): 1.5}, {}]


def test_the_first_word_of_a_turn_counts_more_and_that_of_a_call_most(encoded: dict[str, Any]) -> None:
    for row, runs in zip(encoded["rows"], encoded["chatml first_word"], strict=True):
        turns = [m["content"] for m in row["messages"] if m["role"] == "assistant" and m.get("loss") is not False]
        words = [word[0] for turn in turns if (word := re.match("[A-Za-z]+", turn))]
        assert [(weight, text) for weight, text in runs if weight > 1] == [
            (7.5 if word == "Action" else 3.0, word) for word in words
        ]
        assert all(weight in (0.0, 1.0, 3.0, 7.5) for weight, _ in runs)


def test_the_list_of_arguments_is_that_of_the_installed_ms_swift(encoded: dict[str, Any]) -> None:
    assert set(encoded["arguments"]) == swift_argument_names()
