"""A peft LoRA adapter, read and checked before anything is written. What cannot be merged is refused by its name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.common.errors import InvalidData, Violation
from services.merging.tensors import Array, Entry, TensorFile

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings of adapter_config.json that change what the weights mean, and the values with which we merge.
# Source: peft 0.20, tuners/lora/config.py.
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "corda_config": (None, {}),
    "eva_config": (None, {}),
}


@dataclass(frozen=True)
class Delta:
    """What one module adds to its weight: scale · B @ A. A: (rank, in), B: (out, rank), both float32."""

    a: Array
    b: Array
    scale: float
    fan_in_fan_out: bool

    def weight(self) -> Array:
        """The difference in float32, of the base weight's shape. Source: LoRA, Hu et al. 2021, eq. 3; peft's order."""
        product = self.b @ self.a
        return (product.T if self.fan_in_fan_out else product) * np.float32(self.scale)


@dataclass(frozen=True)
class Adapter:
    """An adapter whose files have been checked. Tensors are read when they are asked for."""

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    pairs: Mapping[str, tuple[str, str]]
    """Base weight's name → (A's name, B's name)."""
    saved: Mapping[str, str]
    """Base weight's name → the tensor that replaces it (modules_to_save)."""

    def delta(self, tensors: TensorFile, weight: str) -> Delta:
        """The difference of one base weight."""
        name_a, name_b = self.pairs[weight]
        a, b = tensors.read(name_a).astype(np.float32), tensors.read(name_b).astype(np.float32)
        return Delta(a, b, self.scale_of(weight, a.shape[0]), bool(self.config.get("fan_in_fan_out")))

    def scale_of(self, weight: str, rank: int) -> float:
        """Alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023), with this module's own alpha."""
        module = weight.removesuffix(".weight")
        alpha = float(_pattern_value(self.config.get("alpha_pattern") or {}, module, self.config["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def read_adapter(folder: Path) -> Adapter:
    """Read and check an adapter. Raises InvalidData naming all that is wrong."""
    config = _read_config(folder)
    wrong = [
        Violation(f"adapter_config.json {key}", f"{config[key]!r} cannot be merged; only {plain[0]!r} can")
        for key, plain in PLAIN.items()
        if key in config and config[key] not in plain
    ]
    if not isinstance(config.get("lora_alpha"), int | float):
        wrong.append(Violation("adapter_config.json lora_alpha", "must be a number"))
    if not (folder / WEIGHTS).is_file():
        pickled = ", ".join(p.name for p in folder.glob("*.bin"))
        wrong.append(Violation(WEIGHTS, f"is missing{f'; {pickled} is pickled and never read' if pickled else ''}"))
    if wrong:
        raise InvalidData(f"the adapter {folder.name} cannot be merged", violations=wrong)
    with TensorFile(folder / WEIGHTS) as tensors:
        adapter = _sort(folder, config, tensors.entries)
        _check_finite(tensors)
    return adapter


def _sort(folder: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> Adapter:
    sides: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    unknown = []
    keep = tuple(config.get("modules_to_save") or ())
    for name in entries:
        bare = name.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", bare)
        if match:
            sides.setdefault(f"{match[1]}.weight", {})[match[2]] = name
        elif any(f".{m}." in f".{bare}" for m in keep):
            saved[bare.replace(".modules_to_save.default", "").replace(".modules_to_save", "")] = name
        else:
            unknown.append(name)
    wrong = [
        Violation(WEIGHTS, f"{name} is no LoRA matrix of a linear layer and cannot be merged") for name in unknown[:5]
    ]
    for weight, both in sides.items():
        if set(both) != {"A", "B"}:
            wrong.append(Violation(WEIGHTS, f"{weight} has lora_{'A' if 'A' in both else 'B'} only"))
        elif 0 in entries[both["A"]].shape or entries[both["A"]].shape[0] != entries[both["B"]].shape[-1]:
            shapes = f"A {entries[both['A']].shape}, B {entries[both['B']].shape}"
            wrong.append(Violation(WEIGHTS, f"{weight}: ranks do not fit or are 0 ({shapes})"))
    if not sides and not saved:
        wrong.append(Violation(WEIGHTS, "has no LoRA matrices"))
    if wrong:
        raise InvalidData(f"the adapter {folder.name} cannot be merged", violations=wrong)
    return Adapter(folder, config, entries, {w: (s["A"], s["B"]) for w, s in sides.items()}, saved)


def _check_finite(tensors: TensorFile) -> None:
    bad = [
        name
        for name, e in tensors.entries.items()
        if e.dtype in ("F64", "F32", "F16", "BF16") and not _is_finite(tensors.read(name))
    ]
    if bad:
        raise InvalidData(
            f"{WEIGHTS} has NaN or infinite values in {len(bad)} tensors, such as {bad[0]}: the training diverged"
        )


def _is_finite(values: Array) -> bool:
    return bool(np.isfinite(values.astype(np.float32)).all())


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidData(f"{folder.name} is no adapter: there is no adapter_config.json") from None
    except ValueError as error:
        raise InvalidData(f"adapter_config.json of {folder.name} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidData(f"adapter_config.json of {folder.name} must hold an object")
    return config


def _pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Peft's lookup: a key is the end of a module's name, or a regular expression for it (utils/other.py)."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
