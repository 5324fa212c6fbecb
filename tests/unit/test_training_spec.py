"""What a training spec may say, and the command that follows from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from services.common.errors import InvalidSpec
from services.training.presets import CONTROLLED, OWN, fit_accumulation, load_preset, preset_names, swift_argument_names
from services.training.spec import Spec
from services.training.swift import PLUGIN, Command, Hardware, Paths, infer_family, plan_children, plan_sft
from services.training.values import VALUES

NAMES = {"dataset": "datasets/d1", "base_model": "models/m1"}
WORK = Path("/work/j1")


def _plan(hardware: Hardware, **spec: Any) -> Command:
    parsed = Spec.model_validate({**NAMES, **spec})
    return plan_sft(parsed, load_preset(parsed.preset), Paths(Path("/models/m1"), WORK, validation=True), hardware)


def _flags(command: Command) -> dict[str, str]:
    """Flag → its words."""
    flags: dict[str, list[str]] = {}
    for word in command.argv[command.argv.index("--model") :]:
        if word.startswith("--"):
            words = flags.setdefault(word, [])
        else:
            words.append(word)
    return {flag: " ".join(words) for flag, words in flags.items()}


GOLDEN = Path(__file__).parents[1] / "data" / "argv"


@pytest.mark.parametrize(
    ("case", "resources"),
    [("cpu", {}), ("1-gpu", {"gpus": 1}), ("8-gpus", {"gpus": 8}), ("2-nodes-of-8-gpus", {"gpus": 8, "nodes": 2})],
)
def test_the_published_recipe_is_reproduced_flag_by_flag_with_a_batch_of_64(
    case: str, resources: dict[str, int]
) -> None:
    children = plan_children(Spec.model_validate({**NAMES, "resources": resources}))
    lines = [" ".join(child.argv).replace(str(PLUGIN), PLUGIN.name).replace(" --", "\n  --") for child in children]
    assert "\n".join(lines) + "\n" == (GOLDEN / f"{case}.txt").read_text()
    gpus, nodes = resources.get("gpus", 1), resources.get("nodes", 1)
    flags = dict(re.findall(r"--(\w+) (\S+)", lines[0]))
    assert int(flags["per_device_train_batch_size"]) * int(flags["gradient_accumulation_steps"]) * gpus * nodes == 64


def test_every_node_is_told_its_place_and_where_the_first_one_is() -> None:
    hardware = Hardware(gpus=8, nodes=2, node_rank=1, master_addr="train-0", master_port=29400)
    argv = _plan(hardware).argv
    said = "--nproc_per_node 8 --nnodes 2 --node_rank 1 --master_addr train-0 --master_port 29400"
    assert argv[1 : argv.index("--model")] == ["-m", "torch.distributed.run", *said.split(), "-m", "swift.cli.sft"]


def test_the_child_asks_no_hub_and_sees_no_gpu_that_was_not_asked_for() -> None:
    env = _plan(Hardware(threads=2)).env
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["OMP_NUM_THREADS"] == "2" and env["GOMP_SPINCOUNT"] == "4000"
    assert "CUDA_VISIBLE_DEVICES" not in _plan(Hardware(gpus=1)).env


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_description_and_only_arguments_of_ms_swift(name: str) -> None:
    preset = load_preset(name)
    assert preset.description
    assert set(preset.arguments) <= swift_argument_names() - set(CONTROLLED)


def test_controlled_and_checked_arguments_are_arguments_of_ms_swift() -> None:
    stale = {*CONTROLLED, *VALUES} - {*swift_argument_names(), *OWN}
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
    arguments = {"lora_rnak": 8, "output_dir": "/tmp", "tuner_type": ["adalora"], "effective_batch_size": 0}
    with pytest.raises(ValidationError) as caught:
        Spec.model_validate({**NAMES, "arguments": arguments})
    said = str(caught.value)
    assert "did you mean 'lora_rank'?" in said
    assert "output_dir: fabrictune sets this itself" in said
    assert "makes no adapter" in said
    assert "effective_batch_size: 0 is not a whole number" in said


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("per_device_train_batch_size", 0, "a whole number above 0"),
        ("per_device_train_batch_size", [2], "a whole number above 0"),
        ("effective_batch_size", None, "a whole number above 0"),
        ("effective_batch_size", float("inf"), "a whole number above 0"),
        ("max_length", "abc", "a whole number above 0"),
        ("num_train_epochs", "two", "a number above 0"),
        ("lora_rank", "x", "a whole number above 0"),
        ("lora_dropout", 1.5, "a number from 0 to 1"),
        ("target_regex", "[", "a regular expression"),
        ("save_strategy", "no", "steps, epoch or best: without a checkpoint"),
        ("save_strategy", False, "steps, epoch or best: without a checkpoint"),
        ("eval_strategy", False, 'steps, epoch or "no" (in quotes,'),
    ],
)
def test_a_value_that_training_would_stumble_over_is_refused(name: str, value: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(f"{name}: {value!r} is not {said}")):
        Spec.model_validate({**NAMES, "arguments": {name: value}})


def test_numbers_that_yaml_takes_for_words_are_numbers() -> None:
    arguments = {"learning_rate": "1e-4", "save_steps": 0.1, "max_steps": -1, "save_strategy": "epoch"}
    assert Spec.model_validate({**NAMES, "arguments": arguments}).arguments == arguments


def test_packing_without_flash_attention_and_a_quantized_full_training_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"arguments\.packing: needs attn_impl: flash_attn"):
        Spec.model_validate({**NAMES, "arguments": {"packing": True}})
    with pytest.raises(ValidationError, match=r"arguments\.quant_method: tuner_type: full trains every weight"):
        Spec.model_validate({**NAMES, "preset": "agentfabric-full", "arguments": {"quant_method": "bnb"}})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"use_liger_kernel": True, "logit_adjustment": 1}, "Liger's fused loss makes no logits to adjust"),
        ({"logit_adjustment": "much"}, "logit_adjustment: 'much' is not a number from -20 to 20"),
        ({"logit_adjustment": True}, "logit_adjustment: True is not a number"),
        ({"logit_adjustment": float("nan")}, "logit_adjustment: nan is not a number"),
        ({"logit_adjustement": 1}, "did you mean 'logit_adjustment'"),
    ],
)
def test_a_logit_adjustment_that_cannot_be_made_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Spec.model_validate({**NAMES, "arguments": arguments})


def test_a_logit_adjustment_reaches_the_child_by_its_environment() -> None:
    adjusted = _plan(Hardware(), preset="smollm2-cpu", arguments={"logit_adjustment": 0.5})
    assert adjusted.env["FABRICTUNE_LOGIT_ADJUSTMENT"] == "0.5"
    assert not any("logit_adjustment" in word for word in adjusted.argv), "ms-swift has no argument of this name"
    plain = _plan(Hardware(), preset="smollm2-cpu", arguments={"logit_adjustment": 0})
    assert "FABRICTUNE_LOGIT_ADJUSTMENT" not in plain.env


def test_variants_of_lora_are_values_and_full_training_makes_a_model() -> None:
    flags = {name: _flags(_plan(Hardware(gpus=1), preset=f"agentfabric-{name}")) for name in ("dora", "qlora", "full")}
    assert flags["dora"]["--use_dora"] == "true"
    assert (flags["qlora"]["--quant_method"], flags["qlora"]["--quant_bits"]) == ("bnb", "4")
    assert flags["full"]["--tuner_type"] == "full" and "--lora_rank" not in flags["full"]
    assert Spec.model_validate({**NAMES, "preset": "agentfabric-full"}).output == ("model", "models")
    assert Spec.model_validate({**NAMES, "preset": "agentfabric-dora"}).output == ("adapter", "adapters")


def test_the_preset_says_which_weights_become_the_adapter_unless_the_spec_does() -> None:
    chosen = {word: Spec.model_validate({**NAMES, "preset": "smollm2-cpu", **told}).chosen_checkpoint
              for word, told in {"preset": {}, "spec": {"checkpoint": "last"}}.items()}  # fmt: skip
    assert chosen == {"preset": "mean", "spec": "last"}
    assert Spec.model_validate(NAMES).chosen_checkpoint == "best"


def test_the_mean_is_kept_by_a_plugin_of_its_own_before_a_checkpoint_is_told_of() -> None:
    command = _plan(Hardware(), preset="smollm2-cpu")
    after = command.argv[command.argv.index("--external_plugins") + 1 :]
    assert [Path(word).name for word in after[:2]] == ["swift_plugin.py", "swift_mean.py"]
    after = command.argv[command.argv.index("--callbacks") + 1 :]
    assert after[:2] == ["fabrictune_mean", "fabrictune"]
    assert "fabrictune_mean" not in _plan(Hardware(), preset="smollm2-cpu", checkpoint="last").argv


@pytest.mark.parametrize("arguments", [{"tuner_type": "full"}, {"fsdp": "fsdp2"}])
def test_the_mean_of_more_than_an_adapter_is_refused(arguments: dict[str, Any]) -> None:
    told = {**NAMES, "preset": "smollm2-cpu", "arguments": arguments}
    with pytest.raises(
        ValidationError, match="checkpoint: mean is of an adapter that every process has whole, so not with"
    ):
        Spec.model_validate(told)
    assert Spec.model_validate({**told, "checkpoint": "last"}).chosen_checkpoint == "last"


def test_an_unknown_preset_lists_those_that_exist() -> None:
    with pytest.raises(ValidationError, match=r"no preset .agentfabric.; there are agentfabric-dora, .*smollm2-cpu"):
        Spec.model_validate({**NAMES, "preset": "agentfabric"})


def test_whole_numbers_of_json_reach_the_command_line_as_integers() -> None:
    flags = _flags(_plan(Hardware(), arguments={"lora_rank": 16.0, "learning_rate": 0.001}))
    assert (flags["--lora_rank"], flags["--learning_rate"]) == ("16", "0.001")


def test_the_spec_overrides_the_preset_and_its_batch() -> None:
    flags = _flags(_plan(Hardware(), arguments={"max_length": 8192, "effective_batch_size": 16}, seed=7))
    assert (flags["--max_length"], flags["--gradient_accumulation_steps"], flags["--seed"]) == ("8192", "8", "7")


@pytest.mark.parametrize(
    ("hardware", "dtype", "told"),
    [
        (Hardware(), "float32", False),
        (Hardware(bfloat16=True), "bfloat16", True),
        (Hardware(gpus=1), "bfloat16", False),
    ],
)
def test_an_auto_dtype_is_what_the_hardware_multiplies_fast(hardware: Hardware, dtype: str, told: bool) -> None:
    flags = _flags(_plan(hardware, preset="smollm2-cpu"))
    assert flags["--torch_dtype"] == dtype
    assert [flags.get("--bf16"), flags.get("--use_cpu")] == (["true", "true"] if told else [None, None])


def test_bfloat16_that_a_spec_names_is_computed_on_a_cpu_too() -> None:
    flags = _flags(_plan(Hardware(), preset="smollm2-cpu", arguments={"torch_dtype": "bfloat16"}))
    assert [flags["--torch_dtype"], flags["--bf16"], flags["--use_cpu"]] == ["bfloat16", "true", "true"]


def test_attention_in_blocks_is_for_a_cpu_that_multiplies_bfloat16_and_a_spec_that_names_no_other() -> None:
    told = {
        "fast CPU": _plan(Hardware(bfloat16=True), preset="smollm2-cpu"),
        "CPU": _plan(Hardware(), preset="smollm2-cpu"),
        "GPU": _plan(Hardware(gpus=1, bfloat16=True), preset="smollm2-cpu"),
        "named": _plan(Hardware(bfloat16=True), preset="smollm2-cpu", arguments={"attn_impl": "eager"}),
    }
    loaded = {name: "swift_attention.py" in _flags(command)["--external_plugins"] for name, command in told.items()}
    assert loaded == {"fast CPU": True, "CPU": False, "GPU": False, "named": False}


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
