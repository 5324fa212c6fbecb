"""Training with the real ms-swift: a Llama of two tiny layers, a few steps; about half a minute for each run of it.

One run is shared by all tests that only look at it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import Cancelled, InvalidData
from services.common.reporter import Progress
from services.training.presets import swift_argument_names
from services.training.spec import Spec
from services.training.worker import run

pytestmark = [pytest.mark.slow, pytest.mark.heavy]

CALL = 'Action: get_weather\nAction Input: {"city": "Paris"}\n'
SUMMARY = "It is sunny in Paris today."
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STEPS = 6
ARGUMENTS = {
    **{"max_steps": STEPS, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "logging_steps": 1},
    **{"max_length": 128, "lora_dropout": 0.1, "learning_rate": 1e-2, "lora_rank": 4, "save_total_limit": 10},
    # The preset's upper layers are not there in a model of two.
    **{"target_regex": r".*_proj", "effective_batch_size": 2, "per_device_train_batch_size": 2},
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
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "metrics.jsonl", "loss.png"} <= names
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


def test_a_cancelled_run_keeps_a_checkpoint_and_resuming_it_equals_a_run_without_a_break(
    trained: Run, tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    def cancel_at_step_3(progress: Progress) -> None:
        if progress.step == 3 and progress.loss is not None:
            listener.on_progress = lambda progress: None
            raise Cancelled("told to stop")

    listener = Listener(tmp_path, on_progress=cancel_at_step_3)
    (tmp_path / "cut").mkdir()
    with pytest.raises(Cancelled):
        run(_spec(), {"dataset": dataset, "base_model": tiny_model}, tmp_path / "cut", listener)
    newest = max(listener.checkpoints)
    assert newest >= 3

    rest = Listener(tmp_path / "rest")
    (tmp_path / "resumed").mkdir()
    metadata = run(
        _spec(),
        {"dataset": dataset, "base_model": tiny_model, "checkpoint": listener.checkpoints[2]},
        tmp_path / "resumed",
        rest,
    )
    assert metadata["total_steps"] == STEPS
    resumed = Run(tmp_path / "resumed", metadata, rest)
    assert set(resumed.losses) == set(range(3, STEPS + 1))
    for step, loss in resumed.losses.items():
        assert loss == pytest.approx(trained.losses[step], abs=1e-5)


def test_a_dataset_that_is_all_too_long_is_refused_before_ms_swift_starts(
    tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    begin = time.monotonic()
    with pytest.raises(InvalidData, match="all 13 rows are longer than max_length 4"):
        run(_spec(max_length=4), {"dataset": dataset, "base_model": tiny_model}, tmp_path, Listener(tmp_path))
    assert time.monotonic() - begin < 5
    assert list(tmp_path.iterdir()) == []


MASK = """
import json, sys
from swift.arguments import SftArguments
from swift.model import get_processor
from swift.template import get_template
import dataclasses
processor = get_processor(sys.argv[1], model_type="llama")
def encode(loss_scale, rows):
    template = get_template(processor, template_type="chatml", loss_scale=loss_scale, max_length=512)
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
found = {scale: encode(scale, rows) for scale in ("react", "default")}
print("RESULT" + json.dumps({**found, "arguments": [f.name for f in dataclasses.fields(SftArguments)]}))
"""


@pytest.fixture(scope="session")
def encoded(tiny_model: Path) -> dict[str, Any]:
    """What ms-swift's own template makes of rows, and the arguments that it knows; in a process of its own."""
    split_summary = _row(2, SUMMARY)
    split_summary["messages"][1]["content"] += f"\n{CALL}Observation: <result>sunny</result>\nAnswer:"
    inline = _row(3, "")
    inline["messages"][2:] = [
        {"role": "assistant", "content": CALL, "loss": True},
        {"role": "assistant", "content": "Observation: <result>sunny</result>\nAnswer:", "loss": False},
        {"role": "assistant", "content": f" {SUMMARY}", "loss": True},
    ]
    rows = [_row(0, CALL), _row(1, f"Let me look.\n{CALL}"), split_summary, inline]
    stdin = "\n".join(json.dumps(row) for row in rows)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "USE_HF": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MASK, str(tiny_model)], input=stdin, capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.rsplit("RESULT", 1)[1])
    return result


def test_tool_calls_count_double_answers_once_and_the_rest_nothing_token_by_token(encoded: dict[str, Any]) -> None:
    call, prose, summary, inline = encoded["react"]
    assert [w for w, _ in call] == [0.0, 2.0, 1.0] and call[1][1] == CALL and call[2][1].startswith("<|im_end|>")
    assert [w for w, _ in prose] == [0.0, 1.0, 2.0, 1.0] and prose[1][1] == "Let me look.\n" and prose[2][1] == CALL
    assert [w for w, _ in summary] == [0.0, 1.0] and summary[1][1].startswith(f"{SUMMARY}<|im_end|>")
    assert [w for w, _ in inline] == [0.0, 2.0, 0.0, 1.0]
    assert inline[1][1] == CALL and inline[3][1].startswith(f" {SUMMARY}<|im_end|>")


def test_with_the_default_scale_calls_and_answers_count_alike_and_results_nothing(encoded: dict[str, Any]) -> None:
    call, prose, summary, inline = encoded["default"]
    for row, text in ((call, CALL), (prose, f"Let me look.\n{CALL}"), (summary, SUMMARY)):
        assert [w for w, _ in row] == [0.0, 1.0]
        assert row[1][1].startswith(f"{text}<|im_end|>")
    assert [w for w, _ in inline] == [0.0, 1.0, 0.0, 1.0]
    assert inline[1][1] == CALL and inline[3][1].startswith(f" {SUMMARY}<|im_end|>")


def test_the_list_of_arguments_is_that_of_the_installed_ms_swift(encoded: dict[str, Any]) -> None:
    assert set(encoded["arguments"]) == swift_argument_names()
