"""What a training takes is known before it starts, and what cannot fit does not start."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from fabrictune.cli import app
from fabrictune.client import Client
from fabrictune.errors import ApiError
from fabrictune.v1 import training_pb2
from services.common.artifacts import Artifacts
from services.common.clusters.local import LocalCluster
from services.common.config import ServerConfig
from services.common.errors import FailedPrecondition, InvalidData, InvalidSpec, NotFound
from services.common.jobs import Jobs
from services.common.server import Server
from services.common.store import Store
from services.training import admission
from services.training.admission import admit, estimate_folders
from services.training.dataset_size import DatasetSize, measure_dataset
from services.training.estimate import count_flops, estimate_training, find_device
from services.training.memory import MOST_KEPT_WEIGHTS, Load, estimate_memory, trained_parameters
from services.training.service import OFFER, estimate_artifacts
from services.training.shapes import ModelShape, parse_header, read_shape
from services.training.spec import Spec
from tests.conftest import Recorder

NAMES = {"dataset": "datasets/d1", "base_model": "models/m1"}
HIDDEN, LAYERS, WIDE, VOCABULARY = 16, 2, 32, 100
QWEN_7B = ModelShape(
    hidden=3584, layers=28, heads=28, query=3584, key=512, intermediate=18944, vocabulary=152064, parameters=7_615_616_512,
    linears={
        f"model.layers.{n}.{name}": shape
        for n in range(28)
        for name, shape in {
            "self_attn.q_proj": (3584, 3584), "self_attn.k_proj": (512, 3584), "self_attn.v_proj": (512, 3584),
            "self_attn.o_proj": (3584, 3584), "mlp.gate_proj": (18944, 3584), "mlp.up_proj": (18944, 3584),
            "mlp.down_proj": (3584, 18944),
        }.items()
    },
    dtype="bfloat16",
)  # fmt: skip


def _spec(**fields: Any) -> Spec:
    return Spec.model_validate({**NAMES, **fields})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Llama that is nothing but shapes."""
    folder = tmp_path / "model"
    folder.mkdir()
    weights = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        weights[f"model.layers.{layer}.self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
        weights[f"model.layers.{layer}.mlp.up_proj.weight"] = (WIDE, HIDDEN)
    save_file({k: np.zeros(v, np.float32) for k, v in weights.items()}, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "intermediate_size": WIDE}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text("{}")
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    messages = [{"role": "user", "content": "a question " * 20}, {"role": "assistant", "content": "an answer " * 20}]
    rows = [{"id": f"r{n}", "messages": messages} for n in range(100)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_models_shape_is_read_from_headers_alone(model: Path) -> None:
    shape = read_shape(model)
    assert (shape.hidden, shape.layers, shape.query, shape.key, shape.dtype) == (HIDDEN, LAYERS, 16, 8, "float32")
    assert shape.parameters == VOCABULARY * HIDDEN + HIDDEN + LAYERS * (HIDDEN * HIDDEN + WIDE * HIDDEN)
    assert set(shape.linears.values()) == {(HIDDEN, HIDDEN), (WIDE, HIDDEN)} and len(shape.linears) == 2 * LAYERS


def test_a_truncated_safetensors_header_is_refused(model: Path) -> None:
    with pytest.raises(InvalidData, match="header is truncated"):
        parse_header((model / "model.safetensors").read_bytes()[:40])
    with pytest.raises(InvalidData, match="header cannot be read"):
        parse_header((4).to_bytes(8, "little") + b"{no}")


def test_what_is_trained_follows_from_rank_modules_and_variant(model: Path) -> None:
    shape = read_shape(model)
    q, up = 2 * HIDDEN, WIDE + HIDDEN
    assert trained_parameters(shape, {"lora_rank": 8}) == 8 * LAYERS * (q + up)
    assert trained_parameters(shape, {"lora_rank": 8, "target_modules": "q_proj"}) == 8 * LAYERS * q
    assert trained_parameters(shape, {"lora_rank": 8, "target_regex": r".*layers\.1\..*"}) == 8 * (q + up)
    assert trained_parameters(shape, {"lora_rank": 8, "use_dora": True}) == LAYERS * (8 * (q + up) + HIDDEN + WIDE)
    assert trained_parameters(shape, {"tuner_type": "full"}) == shape.parameters


def test_each_choice_moves_its_own_part_of_the_memory() -> None:
    def parts(batch: int = 2, world_size: int = 1, **arguments: Any) -> dict[str, int]:
        load = Load(batch, 1500, world_size)
        return estimate_memory(QWEN_7B, {"lora_rank": 8, "torch_dtype": "bfloat16", **arguments}, load).parts

    plain = parts()
    assert plain["weights"] == 2 * QWEN_7B.parameters
    assert plain["optimizer"] == 2 * plain["adapter"] == 2 * plain["gradients"]
    assert parts(quant_method="bnb", quant_bits=4)["weights"] < plain["weights"] / 2.5
    assert parts(gradient_checkpointing=False)["activations"] > 10 * plain["activations"]
    assert parts(batch=1)["logits"] == plain["logits"] / 2
    assert parts(use_logits_to_keep=True)["logits"] == plain["logits"] / 2
    assert parts(loss_scale="last_round")["logits"] == plain["logits"]
    assert parts(loss_scale="agentfabric")["logits"] == plain["logits"] * (4 * 5 + 2) / (4 * 3 + 2)
    assert parts(world_size=8)["gradients"] == 2 * plain["gradients"]
    assert parts(optim="adamw_8bit")["optimizer"] < plain["optimizer"]
    full = parts(tuner_type="full")
    assert full["optimizer"] == 2 * full["weights"] and full["adapter"] == 0


def test_steps_tokens_time_and_cost_follow_from_rows_and_price() -> None:
    rows = DatasetSize({600: 30_000.0, 7000: 488.0}, exact=True)
    found = estimate_training(_spec(resources={"gpus": 8}), QWEN_7B, rows, "a100-80gb", price_per_hour=2.0)
    assert found.rows == 30_000  # those of 7000 tokens are longer than max_length
    assert found.steps == 938  # two epochs of 64 rows a step
    assert found.tokens == 938 * 64 * 600
    assert found.fits and found.advice == ""
    assert found.seconds is not None and found.cost == pytest.approx(found.seconds / 3600 * 8 * 2.0)
    single = estimate_training(_spec(resources={"gpus": 1}), QWEN_7B, rows, "a100-80gb")
    assert single.seconds == pytest.approx(8 * found.seconds) and single.cost is None


def test_packing_makes_fewer_and_fuller_sequences() -> None:
    rows = DatasetSize({512: 8000.0}, exact=True)
    packed = estimate_training(_spec(preset="agentfabric-packed"), QWEN_7B, rows)
    assert packed.steps == 2 * 63  # 1000 packs of 4096 tokens, 16 a step
    assert packed.tokens == pytest.approx(2 * 8000 * 512, rel=0.02)


def test_recomputing_activations_costs_half_as_much_again() -> None:
    with_it = count_flops(QWEN_7B, {"gradient_checkpointing": True}, 1000)
    assert with_it == pytest.approx(1.5 * count_flops(QWEN_7B, {"gradient_checkpointing": False}, 1000), rel=0.01)


def test_what_does_not_fit_comes_with_advice() -> None:
    rows = DatasetSize({1500: 1000.0}, exact=True)
    found = estimate_training(_spec(resources={"gpus": 1}), QWEN_7B, rows, "t4")
    assert found.fits is False
    assert "agentfabric-qlora" in found.advice and "max_length" in found.advice
    with pytest.raises(InvalidSpec) as caught:
        find_device("a200")
    assert "there are t4, l4" in caught.value.violations[0].description
    assert find_device("NVIDIA A100-80GB").name == "a100-80gb"
    assert find_device("24GiB").memory == 24 << 30


def test_row_lengths_come_from_the_conversions_report_or_from_a_sample() -> None:
    report = {
        "rows_written": {"train": 80},
        "tokens": {"rows": 100, "max": 650, "bin": 100, "histogram": {"2": 90, "6": 10}},
    }
    told = measure_dataset(json.dumps(report).encode(), b"", 0)
    assert told.exact and told.within(None) == pytest.approx((80, 290, 650))
    line = json.dumps({"messages": [{"role": "user", "content": "abcd" * 100}]}).encode() + b"\n"
    sample = measure_dataset(None, line * 10 + line[:30], 100 * len(line))
    assert not sample.exact and sample.within(None) == pytest.approx((100, 120, 120), rel=0.05)
    with pytest.raises(InvalidData, match="no row of the dataset is within max_length 1500"):
        estimate_training(_spec(), QWEN_7B, DatasetSize({2000: 5.0}, exact=True))


@pytest.mark.parametrize(
    "report", [b"{", b"[]", b'{"rows_written": {"train": 1}, "tokens": {"histogram": {"2": 1}}}', b"\xff\xfe{"]
)
def test_a_report_that_is_none_is_refused(report: bytes) -> None:
    with pytest.raises(InvalidData, match=r"report\.json cannot be read \(.*convert again"):
        measure_dataset(report, b"", 0)


def test_a_server_estimates_from_heads_of_artifacts(artifacts: Artifacts, model: Path, dataset: Path) -> None:
    spec = training_pb2.TrainingSpec(dataset=NAMES["dataset"], base_model=NAMES["base_model"])
    request = training_pb2.EstimateTrainingRequest(spec=spec, gpu="l4", price_per_hour=1)
    with pytest.raises(NotFound):
        estimate_artifacts(request, artifacts)
    for folder, name, kind in ((model, NAMES["base_model"], "model"), (dataset, NAMES["dataset"], "dataset")):
        artifacts.publish(folder, name, kind, created_by={}, metadata={})
    answer = estimate_artifacts(request, artifacts)
    assert answer.memory_bytes == sum(part.bytes for part in answer.memory)
    assert (answer.rows, answer.steps, answer.fits) == (100, 4, True)
    assert answer.HasField("cost") and answer.HasField("duration")
    here = estimate_folders(_spec(), dataset, model, "l4", 1)
    assert here["memory_bytes"] == answer.memory_bytes


async def test_the_client_gets_a_plan_with_ms_swifts_command_and_an_estimate_over_the_wire(
    artifacts: Artifacts, store: Store, model: Path, dataset: Path, tmp_path: Path
) -> None:
    for folder, name, kind in ((model, NAMES["base_model"], "model"), (dataset, NAMES["dataset"], "dataset")):
        artifacts.publish(folder, name, kind, created_by={}, metadata={})
    cluster = LocalCluster(tmp_path / "cluster", 1, {})
    jobs = Jobs(OFFER.stage, store, artifacts, cluster)
    server = Server([OFFER.serve(jobs, cluster)], ServerConfig(port=0, metrics_port=0, drain_seconds=0), None)
    await server.start()
    try:
        with Client(f"127.0.0.1:{server.port}") as client:
            spec = {**NAMES, "preset": "agentfabric-full", "resources": {"gpus": 8, "nodes": 2}}
            job = await asyncio.to_thread(client.training.create, spec, "t1", validate_only=True)
            answer = await asyncio.to_thread(client.training.estimate, spec, "h100-80gb", 2.5)
            with pytest.raises(ApiError, match="can be 1, 2, 4, 8"):
                bad = {**spec, "resources": {"gpus": 7}}
                await asyncio.to_thread(client.training.estimate, bad, "", 0.0)
    finally:
        await server.close()
    assert job.output == "models/t1"
    worker, *nodes = job.plan.commands
    assert list(worker.argv[-2:]) == ["-m", "services.training.worker"]
    argvs = [list(node.argv) for node in nodes]
    assert [argv[argv.index("--node_rank") + 1] for argv in argvs if "swift.cli.sft" in argv] == ["0", "1"]
    assert answer.trained_parameters == answer.parameters and answer.fits and answer.cost >= 0


def test_a_dry_run_on_folders_prints_the_command_and_writes_nothing(model: Path, dataset: Path, tmp_path: Path) -> None:
    told = ["train", str(dataset), "--model", str(model), "--gpus", "8", "--output", str(tmp_path / "adapter")]
    done = CliRunner().invoke(app, [*told, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "torch.distributed.run" in done.output and "gradient_accumulation_steps" in done.output
    assert not (tmp_path / "adapter").exists()
    done = CliRunner().invoke(app, [*told[:-2], "--estimate", "--gpu", "l4", "--price", "0.7"])
    assert done.exit_code == 0, done.output
    for words in ("activations", "each process at its peak", "fits", "optimizer steps", "cost", "time assumes 35"):
        assert words in done.output


def test_what_cannot_fit_is_refused_before_the_start_with_the_numbers(
    model: Path, dataset: Path, reporter: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit(_spec(), dataset, model, reporter)
    assert any("each process needs about" in text for _, text in reporter.lines)
    monkeypatch.setattr(admission, "memory_here", lambda gpus: 100 << 20)
    with pytest.raises(FailedPrecondition, match=r"cannot fit: each process needs about .* and 0\.10 GiB is there"):
        admit(_spec(), dataset, model, reporter)


def test_all_that_keeps_a_training_from_starting_is_said_at_once(
    model: Path, dataset: Path, reporter: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (model / "model.safetensors").unlink()
    with (dataset / "train.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(FailedPrecondition) as caught:
        admit(_spec(preset="agentfabric-qlora", resources={"gpus": 8}), dataset, model, reporter)
    said = caught.value.message
    assert said.startswith("4 things keep the training from starting")
    for words in (
        "asks for 8 GPUs on a node, and 0 can",
        "no .safetensors file",
        "lacks bitsandbytes",
        "line 101: not JSON",
    ):
        assert words in said


def test_a_cpu_keeps_the_attention_weights_of_bfloat16_up_to_a_limit() -> None:
    def kept(length: int, **told: str) -> int:
        arguments = {"torch_dtype": "bfloat16", "gradient_checkpointing": False, **told}
        return estimate_memory(QWEN_7B, arguments, Load(1, length, device="cpu")).activations

    assert kept(1000) - kept(1000, attn_impl="eager") == 28 * 2 * 28 * 1000 * 1000 // 2
    assert kept(8000) - kept(8000, attn_impl="eager") == 28 * 2 * MOST_KEPT_WEIGHTS
    assert kept(1000, torch_dtype="float32") == kept(1000, torch_dtype="float32", attn_impl="eager")
