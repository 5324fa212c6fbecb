"""Presets: named sets of ms-swift arguments, kept as YAML in recipes/, and which arguments a spec may set.

Nothing here imports ms-swift: the server checks specs where neither it nor torch is installed, so the names that
`swift sft` knows are a checked-in list.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from services.common.errors import InvalidSpec, Violation
from services.training.values import describe_wrong

SWIFT_VERSION = "4.6.0"
_RECIPES = Path(__file__).parent / "recipes"

CONTROLLED: Mapping[str, str] = {
    # argument → why a spec may not set it
    "model": "it comes from base_model",
    "model_revision": "it comes from base_model",
    "adapters": "it comes from the checkpoint that a job resumes from",
    "dataset": "it comes from dataset",
    "val_dataset": "it is the dataset's validation.jsonl",
    "cached_dataset": "it comes from dataset",
    "cached_val_dataset": "it comes from dataset",
    "split_dataset_ratio": "conversion makes the validation split, by tool",
    "dataset_shuffle": "the order of rows must be the same in each attempt",
    "strict": "rows are never dropped in silence",
    "truncation_strategy": "rows that are too long are left out and named; a cut row would teach a cut call",
    "lazy_tokenize": "rows that are too long are found before the first step",
    "streaming": "rows that are too long are found before the first step",
    "output_dir": "the adapter artifact is the output",
    "add_version": "the adapter artifact is the output",
    "create_checkpoint_symlink": "the adapter artifact is the output",
    "logging_dir": "the adapter artifact is the output",
    "resume_from_checkpoint": "use Resume",
    "resume_only_model": "use Resume",
    "ignore_data_skip": "a resumed job must see the rows in the same order",
    "save_only_model": "a checkpoint without the optimizer cannot be resumed",
    "safe_serialization": "weights are always safetensors",
    "load_best_model_at_end": "use checkpoint: best",
    "seed": "use spec.seed",
    "data_seed": "use spec.seed",
    "gradient_accumulation_steps": "it follows from effective_batch_size; set that",
    "external_plugins": "it would run code that is in no artifact",
    "custom_register_path": "it would run code that is in no artifact",
    "custom_dataset_info": "it would run code that is in no artifact",
    "deepspeed": "it is not installed in the training image",
    "push_to_hub": "an adapter goes to the object store",
    "hub_token": "secrets do not belong into a spec",
    "swanlab_token": "secrets do not belong into a spec",
    "swanlab_secret": "secrets do not belong into a spec",
    "swanlab_webhook_url": "secrets do not belong into a spec",
    "disable_tqdm": "progress is typed",
    "logging_nan_inf_filter": "a NaN loss must be seen",
    "include_num_input_tokens_seen": "tokens/s is computed from it",
}
"""Arguments of `swift sft` that fabrictune sets itself or refuses."""

OWN = ("effective_batch_size", "logit_adjustment", "trust_remote_code")
"""Keys of `arguments` that are fabrictune's, not ms-swift's."""

TUNERS: Mapping[str, tuple[str, str]] = {
    # tuner_type → kind and collection of what it makes
    "lora": ("adapter", "adapters"),  # a peft adapter that merging understands; DoRA and rsLoRA are LoRA too
    "full": ("model", "models"),
}

PACKAGES: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    # argument, values, the package that ms-swift then imports
    ("quant_method", ("bnb",), "bitsandbytes"),
    ("quant_method", ("hqq",), "hqq"),
    ("quant_method", ("eetq",), "eetq"),
    ("quant_method", ("quanto",), "optimum"),
    ("use_liger_kernel", (True,), "liger_kernel"),
    ("attn_impl", ("flash_attn", "flash_attention_2"), "flash_attn"),
    ("tuner_backend", ("unsloth",), "unsloth"),
)
_FLASH = ("flash_attn", "flash_attention_2", "flash_attention_3", "flash_attention_4")


@dataclass(frozen=True)
class Preset:
    """A named recipe."""

    name: str
    description: str
    arguments: Mapping[str, Any]
    effective_batch_size: int | None = None
    """Rows for each optimizer step over all GPUs; None: whatever the arguments give."""
    checkpoint: str = "best"
    """Which weights become the adapter: best, last or mean; see training.spec."""


def preset_names() -> list[str]:
    """Names of the presets that exist, sorted."""
    return sorted(file.stem for file in _RECIPES.glob("*.yaml"))


@cache
def load_preset(name: str) -> Preset:
    """The preset `name`. Raises KeyError; ask preset_names() first."""
    if name not in preset_names():
        raise KeyError(name)
    values = yaml.safe_load((_RECIPES / f"{name}.yaml").read_text())
    unknown = set(values) - {"description", "extends", "effective_batch_size", "checkpoint", "arguments"}
    if unknown or "description" not in values:
        raise InvalidSpec(f"recipes/{name}.yaml: unknown keys {sorted(unknown)}, or no description")
    parent = load_preset(values["extends"]) if "extends" in values else Preset("", "", {})
    merged = {**parent.arguments, **values["arguments"]}  # null takes an argument of the parent away
    arguments = {key: value for key, value in merged.items() if value is not None}
    batch = values.get("effective_batch_size", parent.effective_batch_size)
    checkpoint = values.get("checkpoint", parent.checkpoint)
    return Preset(name, values["description"], arguments, batch, checkpoint)


def tuner_of(preset: Preset, arguments: Mapping[str, Any]) -> str:
    """What a spec with these arguments trains: lora or full."""
    return str(arguments.get("tuner_type", preset.arguments.get("tuner_type", "lora")))


def needed_packages(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Package → "argument: value" that needs it, for packages that are not in every training image."""
    return {
        package: f"{key}: {str(arguments[key]).lower()}"
        for key, values, package in PACKAGES
        if arguments.get(key) in values and key in arguments
    }


def check_together(arguments: Mapping[str, Any], checkpoint: str) -> list[Violation]:
    """What is wrong with a preset's and a spec's arguments taken together, and with the checkpoint that is chosen."""
    found = []
    for key in ("packing", "padding_free"):
        if arguments.get(key) is True and arguments.get("attn_impl") not in _FLASH:
            text = f"needs attn_impl: flash_attn (or one of {', '.join(_FLASH[1:])}): others would see across rows"
            found.append(Violation(f"spec.arguments.{key}", text))
    if arguments.get("logit_adjustment") and arguments.get("use_liger_kernel"):
        text = "Liger's fused loss makes no logits to adjust; set use_liger_kernel: false, or logit_adjustment: 0"
        found.append(Violation("spec.arguments.logit_adjustment", text))
    if arguments.get("tuner_type") == "full":
        found += [
            Violation(f"spec.arguments.{key}", "tuner_type: full trains every weight; leave it out")
            for key in ("quant_method", "quant_bits", "use_dora", "use_rslora")
            if arguments.get(key)
        ]
    if checkpoint == "mean":
        reasons = {"tuner_type: full": arguments.get("tuner_type") == "full", "fsdp": bool(arguments.get("fsdp"))}
        found += [
            Violation(
                "spec.checkpoint", f"mean is of an adapter that every process has whole, so not with {key}; set last"
            )
            for key, wrong in reasons.items()
            if wrong
        ]
    return found


@cache
def swift_argument_names() -> frozenset[str]:
    """Long names, without dashes, that `swift sft` of SWIFT_VERSION accepts."""
    lines = (_RECIPES / f"ms-swift-{SWIFT_VERSION}.txt").read_text().splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def check_preset(name: str) -> list[Violation]:
    """What is wrong with a preset's name."""
    if name in preset_names():
        return []
    return [Violation("spec.preset", f"there is no preset {name!r}; there are {', '.join(preset_names())}")]


def check_arguments(arguments: Mapping[str, Any]) -> list[Violation]:
    """What is wrong with a spec's `arguments`, all of it."""
    found = []
    for key, value in arguments.items():
        field = f"spec.arguments.{key}"
        if key in CONTROLLED:
            found.append(Violation(field, f"fabrictune sets this itself: {CONTROLLED[key]}"))
        elif key not in OWN and key not in swift_argument_names():
            near = difflib.get_close_matches(key, [*swift_argument_names(), *OWN], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            found.append(Violation(field, f"ms-swift {SWIFT_VERSION} has no argument of this name{hint}"))
        elif key not in OWN and not isinstance(value, str | int | float | bool | list | dict):
            found.append(Violation(field, f"{value!r} cannot be passed on a command line; leave the key out instead"))
        elif key == "tuner_type" and (not isinstance(value, str) or value not in TUNERS):
            found.append(
                Violation(
                    field,
                    f"{value!r} makes no adapter that can be merged; use lora (use_dora, use_rslora are LoRA too) or full",
                )
            )
        elif wrong := describe_wrong(key, value):
            found.append(Violation(field, wrong))
    if not isinstance(arguments.get("trust_remote_code", False), bool):
        found.append(Violation("spec.arguments.trust_remote_code", "must be true or false"))
    less = arguments.get("logit_adjustment", 0)
    if isinstance(less, bool) or not isinstance(less, int | float) or not -20 <= less <= 20:
        found.append(Violation("spec.arguments.logit_adjustment", f"{less!r} is not a number from -20 to 20"))
    return found


def fit_accumulation(batch: int, per_device: int, world_size: int) -> int:
    """Gradient accumulation steps so that per_device x accumulation x world_size = batch. Raises InvalidSpec."""
    if batch % (per_device * world_size) == 0:
        return batch // (per_device * world_size)
    worlds = [str(w) for w in range(1, batch + 1) if batch % (per_device * w) == 0]
    sizes = [str(p) for p in range(1, batch + 1) if batch % (p * world_size) == 0]
    hints = [f"{world_size} GPUs fit a batch that is a multiple of {world_size * per_device}"]
    if sizes:
        hints.append(f"with {world_size} GPUs, per_device_train_batch_size can be {', '.join(sizes)}")
    if worlds:
        hints.append(f"with per_device_train_batch_size {per_device}, GPUs over all nodes can be {', '.join(worlds)}")
    text = f"{batch} rows a step cannot be made of {per_device} rows x {world_size} GPUs x whole accumulation steps: "
    violation = Violation("spec.arguments.effective_batch_size", text + "; ".join(hints))
    raise InvalidSpec("the effective batch size does not fit the GPUs", violations=[violation])
