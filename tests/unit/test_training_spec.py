"""What a training spec may say, and the command that follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from services.common.errors import InvalidSpec
from services.training.presets import CONTROLLED, fit_accumulation, load_preset, preset_names, swift_argument_names
from services.training.spec import Spec
from services.training.swift import PLUGIN, Command, Hardware, Paths, infer_family, plan_sft

NAMES = {"dataset": "datasets/d1", "base_model": "models/m1"}
WORK = Path("/work/j1")


def _plan(hardware: Hardware, **spec: Any) -> Command:
    parsed = Spec.model_validate({**NAMES, **spec})
    return plan_sft(parsed, load_preset(parsed.preset), Paths(Path("/models/m1"), WORK, validation=True), hardware)


def _flags(command: Command) -> dict[str, str]:
    words = command.argv[command.argv.index("--model") :]
    return dict(zip(words[::2], words[1::2], strict=True))


def _torchrun(flags: str) -> list[str]:
    return ["-m", "torch.distributed.run", *flags.split(), "-m", "swift.cli.sft"]


RECIPE = {
    # the published command, flag by flag (formats.md 5.1)
    **{"--tuner_type": "lora", "--lora_rank": "8", "--lora_alpha": "32", "--lora_dropout": "0.05"},
    **{"--target_modules": "all-linear", "--num_train_epochs": "2", "--max_length": "1500"},
    **{"--learning_rate": "5e-05", "--weight_decay": "0.1", "--max_grad_norm": "0.5", "--warmup_ratio": "0.03"},
    **{"--per_device_train_batch_size": "2", "--gradient_checkpointing": "true", "--loss_scale": "react"},
    **{"--eval_steps": "100", "--save_steps": "100", "--save_total_limit": "2"},
}


@pytest.mark.parametrize(
    ("hardware", "launcher", "accumulation"),
    [
        (Hardware(), ["-m", "swift.cli.sft"], "32"),
        (Hardware(gpus=1), ["-m", "swift.cli.sft"], "32"),
        (
            Hardware(gpus=8),
            _torchrun("--nproc_per_node 8 --nnodes 1 --node_rank 0 --master_addr 127.0.0.1 --master_port 29500"),
            "4",
        ),
        (
            Hardware(gpus=8, nodes=2, node_rank=1, master_addr="train-0", master_port=29400),
            _torchrun("--nproc_per_node 8 --nnodes 2 --node_rank 1 --master_addr train-0 --master_port 29400"),
            "2",
        ),
    ],
    ids=["cpu", "1-gpu", "8-gpus", "2-nodes-of-8"],
)
def test_the_published_recipe_is_reproduced_flag_by_flag_with_a_batch_of_64(
    hardware: Hardware, launcher: list[str], accumulation: str
) -> None:
    command = _plan(hardware, preset="agentfabric-lora")
    assert command.argv[1 : command.argv.index("--model")] == launcher
    assert _flags(command) == {
        **RECIPE,
        "--gradient_accumulation_steps": accumulation,
        **{"--model": "/models/m1", "--dataset": "train.jsonl", "--val_dataset": "validation.jsonl"},
        **{"--eval_strategy": "steps", "--per_device_eval_batch_size": "2", "--logging_steps": "10"},
        **{"--report_to": "none", "--dataloader_persistent_workers": "false"},
        **{"--truncation_strategy": "delete", "--strict": "true", "--lazy_tokenize": "false"},
        **{"--seed": "42", "--data_seed": "42", "--output_dir": "run", "--add_version": "false"},
        **{"--check_model": "false", "--save_only_model": "false", "--disable_tqdm": "true"},
        **{"--logging_nan_inf_filter": "false", "--external_plugins": str(PLUGIN), "--callbacks": "fabrictune"},
    }


def test_the_child_asks_no_hub_and_sees_no_gpu_that_was_not_asked_for() -> None:
    env = _plan(Hardware(threads=2)).env
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["OMP_NUM_THREADS"] == "2"
    assert "CUDA_VISIBLE_DEVICES" not in _plan(Hardware(gpus=1)).env


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_description_and_only_arguments_of_ms_swift(name: str) -> None:
    preset = load_preset(name)
    assert preset.description
    assert set(preset.arguments) <= swift_argument_names() - set(CONTROLLED)


def test_controlled_arguments_are_arguments_of_ms_swift() -> None:
    stale = set(CONTROLLED) - swift_argument_names()
    assert not stale


def test_a_batch_that_no_accumulation_makes_says_which_numbers_fit() -> None:
    with pytest.raises(InvalidSpec) as caught:
        fit_accumulation(64, 2, 6)
    said = caught.value.violations[0].description
    assert "64 rows a step cannot be made of 2 rows x 6 GPUs" in said
    assert "GPUs over all nodes can be 1, 2, 4, 8, 16, 32" in said
    with pytest.raises(ValidationError, match="can be 1, 2, 4, 8, 16, 32"):
        Spec.model_validate({**NAMES, "resources": {"gpus": 6}})


@pytest.mark.parametrize("accumulation", range(1, 33))
def test_every_accumulation_gives_the_batch_back(accumulation: int) -> None:
    assert fit_accumulation(2 * accumulation * 3, 2, 3) == accumulation


def test_all_bad_arguments_are_named_at_once() -> None:
    arguments = {"lora_rnak": 8, "output_dir": "/tmp", "tuner_type": "full", "effective_batch_size": 0}
    with pytest.raises(ValidationError) as caught:
        Spec.model_validate({**NAMES, "arguments": arguments})
    said = str(caught.value)
    assert "did you mean 'lora_rank'?" in said
    assert "output_dir: fabrictune sets this itself" in said
    assert "makes no adapter" in said
    assert "effective_batch_size: 0 is not a whole number" in said


def test_an_unknown_preset_lists_those_that_exist() -> None:
    with pytest.raises(ValidationError, match="no preset 'agentfabric'; there are agentfabric-lora, smollm2-cpu"):
        Spec.model_validate({**NAMES, "preset": "agentfabric"})


def test_whole_numbers_of_json_reach_the_command_line_as_integers() -> None:
    flags = _flags(_plan(Hardware(), arguments={"lora_rank": 16.0, "learning_rate": 0.001}))
    assert (flags["--lora_rank"], flags["--learning_rate"]) == ("16", "0.001")


def test_the_spec_overrides_the_preset_and_its_batch() -> None:
    flags = _flags(_plan(Hardware(), arguments={"max_length": 8192, "effective_batch_size": 16}, seed=7))
    assert (flags["--max_length"], flags["--gradient_accumulation_steps"], flags["--seed"]) == ("8192", "8", "7")


def test_a_preset_without_evaluation_takes_no_validation_set() -> None:
    flags = _flags(_plan(Hardware(), preset="smollm2-cpu"))
    assert flags["--eval_strategy"] == "no"
    assert "--val_dataset" not in flags


@pytest.mark.parametrize(
    ("architecture", "template", "model_type", "name"),
    [
        ("LlamaForCausalLM", "<|im_start|>", "llama", "chatml"),
        ("LlamaForCausalLM", "<|start_header_id|>", "llama", "llama3"),
        ("LlamaForCausalLM", "<|start_header_id|> Cutting Knowledge Date", "llama", "llama3_2"),
        ("Qwen2ForCausalLM", "<|im_start|> You are Qwen, created by Alibaba Cloud.", "qwen2", "qwen2_5"),
        ("QWenLMHeadModel", "", "qwen", "qwen"),
    ],
)
def test_models_that_ms_swift_cannot_tell_apart_are_named_for_it(
    architecture: str, template: str, model_type: str, name: str
) -> None:
    family = infer_family({"architectures": [architecture]}, template)
    assert family and (family.model_type, family.template) == (model_type, name)


def test_an_unknown_architecture_is_left_to_ms_swift() -> None:
    assert infer_family({"architectures": ["Glm4ForCausalLM"]}, "<|im_start|>") is None
