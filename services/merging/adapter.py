"""A peft LoRA adapter, read and checked before anything is written. What cannot be merged is refused by its name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.common.errors import InvalidData, Violation
from services.merging.adapter_config import WEIGHTS, pattern_value, read_config
from services.merging.blas import Array
from services.merging.low_rank import LowRank
from services.merging.rounding import is_finite
from services.merging.tensors import FLOATS, Entry, TensorFile, read_tensor

PREFIX = "base_model.model."
NAMED = 5
"""Violations of one kind that are named."""
_MATRIX = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.default)?(\.weight)?"
)
_SIDES = {
    **{"lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"},
    "lora_magnitude_vector": "magnitude",
}


@dataclass(frozen=True)
class Pair:
    """The tensors of one LoRA module, by their names in the file. magnitude: DoRA's, "" without it."""

    a: str
    b: str
    magnitude: str = ""
    is_embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """An adapter whose files have been checked. Tensors are read when they are asked for."""

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    pairs: Mapping[str, Pair]
    """Module → its matrices, such as "model.layers.0.mlp.up_proj"."""
    saved: Mapping[str, str]
    """Base weight → the tensor that replaces it (modules_to_save)."""
    bases: Mapping[str, str]
    """Base weight → the tensor that replaces it before it is adapted (a resized or retrained embedding)."""

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether it was made for weights that are (in, out), as a Conv1D's are; peft corrects what is told wrong."""
        return bool(self.config.get("fan_in_fan_out"))

    def read(self, name: str) -> Array:
        """One of its tensors, as it is stored."""
        return read_tensor(self.folder / WEIGHTS, self.entries[name])

    def read_part(self, entry: Entry) -> Array:
        """Some rows of one of its tensors, as an entry of their own."""
        return read_tensor(self.folder / WEIGHTS, entry)

    def matrices(self, module: str) -> tuple[Array, Array]:
        """A (rank, in) and B (out, rank) of a module, float32."""
        pair = self.pairs[module]
        return self.read(pair.a).astype(np.float32), self.read(pair.b).astype(np.float32)

    def magnitude(self, module: str) -> Array | None:
        """DoRA's m of a module, float32."""
        name = self.pairs[module].magnitude
        return self.read(name).astype(np.float32).reshape(-1) if name else None

    def low_rank(self, module: str, is_transposed: bool) -> LowRank:
        """What it does to the module's weight, which is (in, out) when it is transposed."""
        a, b = self.matrices(module)
        is_embedding = self.pairs[module].is_embedding
        return orient(a, b, self.scale_of(module), is_transposed, is_embedding, self.magnitude(module))

    def rank_of(self, module: str) -> int:
        """Of its matrices."""
        return self.entries[self.pairs[module].a].shape[0]

    def scale_of(self, module: str) -> float:
        """Alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023), with this module's own alpha."""
        alpha = float(pattern_value(self.config.get("alpha_pattern"), module, self.config["lora_alpha"]))
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def shape_of(self, module: str, is_transposed: bool = False) -> tuple[int, int]:
        """Of the weight that the module's matrices were made for: (out, in), or (in, out)."""
        pair = self.pairs[module]
        made = self.entries[pair.b].shape[0], self.entries[pair.a].shape[1]
        return made[::-1] if is_transposed else made


def orient(
    a: Array, b: Array, scale: float, is_transposed: bool, is_rounded: bool, magnitude: Array | None = None
) -> LowRank:
    """A and B of a module in the layout of its weight."""
    if is_transposed:
        left, right = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
        return LowRank(left, right, scale, is_rounded, magnitude, is_transposed=True)
    return LowRank(b, a, scale, is_rounded, magnitude)


def read_adapter(folder: Path) -> Adapter:
    """Read and check an adapter. Raises InvalidData naming all that is wrong."""
    config = read_config(folder)
    with TensorFile(folder / WEIGHTS) as tensors:
        adapter = _sort(folder, config, tensors.entries)
        if wrong := _refuse(adapter):
            raise InvalidData(f"the adapter {folder.name} cannot be merged", violations=wrong)
        _check_finite(tensors)
    return adapter


def _sort(folder: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> Adapter:
    sides: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    bases: dict[str, str] = {}
    unknown = []
    keep = tuple(config.get("modules_to_save") or ())
    for name in entries:
        bare = name.removeprefix(PREFIX)
        match = _MATRIX.fullmatch(bare)
        if match:
            part = sides.setdefault(match[1], {})
            part[_SIDES[match[2]]] = name
            if "embedding" in match[2]:
                part["embedding"] = name
        elif ".base_layer." in bare:
            bases[bare.replace(".base_layer.", ".")] = name
        elif any(f".{m}." in f".{bare}" for m in keep):
            saved[bare.replace(".modules_to_save.default", "").replace(".modules_to_save", "")] = name
        else:
            unknown.append(name)
    if unknown:
        named = [Violation(WEIGHTS, f"{name} is nothing that can be merged") for name in unknown[:NAMED]]
        raise InvalidData(f"the adapter {folder.name} cannot be merged", violations=named)
    halves = [m for m, part in sides.items() if not {"A", "B"} <= part.keys()]
    if halves:
        named = [Violation(WEIGHTS, f"{m} has {_half(sides[m])} only") for m in halves[:NAMED]]
        raise InvalidData(f"the adapter {folder.name} cannot be merged", violations=named)
    pairs = {m: Pair(s["A"], s["B"], s.get("magnitude", ""), "embedding" in s) for m, s in sides.items()}
    return Adapter(folder, config, entries, pairs, saved, bases)


def _half(part: Mapping[str, str]) -> str:
    return "lora_A" if "A" in part else "lora_B" if "B" in part else "lora_magnitude_vector"


def _refuse(adapter: Adapter) -> list[Violation]:
    wrong = []
    if not adapter.pairs and not adapter.saved:
        wrong.append(Violation(WEIGHTS, "has no LoRA matrices"))
    for module, pair in adapter.pairs.items():
        a, b = adapter.entries[pair.a], adapter.entries[pair.b]
        if len(a.shape) != 2 or len(b.shape) != 2:
            wrong.append(Violation(WEIGHTS, f"{module} is no linear layer and no embedding: A {a.shape}, B {b.shape}"))
        elif 0 in (*a.shape, *b.shape) or a.shape[0] != b.shape[1]:
            wrong.append(Violation(WEIGHTS, f"{module}: ranks do not fit or are 0 (A {a.shape}, B {b.shape})"))
        elif a.shape[0] != (told := _told_rank(adapter, module)):
            wrong.append(Violation(WEIGHTS, f"{module} has rank {a.shape[0]}, and adapter_config.json says {told}"))
        elif {a.dtype, b.dtype} - set(FLOATS):
            wrong.append(Violation(WEIGHTS, f"{module} is {a.dtype} and {b.dtype}; only {', '.join(FLOATS)} are read"))
        elif bool(adapter.config.get("use_dora")) != bool(pair.magnitude):
            has = "a" if pair.magnitude else "no"
            wrong.append(Violation("adapter_config.json use_dora", f"{module} has {has} lora_magnitude_vector"))
        elif pair.magnitude and pair.is_embedding:
            wrong.append(Violation("adapter_config.json use_dora", f"{module} is an embedding; peft cannot merge that"))
        elif pair.magnitude and math.prod(adapter.entries[pair.magnitude].shape) != b.shape[0]:
            shape = adapter.entries[pair.magnitude].shape
            wrong.append(Violation(WEIGHTS, f"{module}: B is {b.shape}, the magnitude {shape}"))
    return wrong[:NAMED]


def _told_rank(adapter: Adapter, module: str) -> int:
    default = adapter.config.get("r", adapter.rank_of(module))
    return int(pattern_value(adapter.config.get("rank_pattern"), module, default))


def _check_finite(tensors: TensorFile) -> None:
    bad = [name for name, e in tensors.entries.items() if e.dtype in FLOATS and not is_finite(tensors.read(name))]
    if bad:
        raise InvalidData(
            f"{WEIGHTS} has NaN or infinite values in {len(bad)} tensors, such as {bad[0]}: the training diverged"
        )
