"""Small base models and adapters as files, made with numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

RNG = np.random.default_rng(0)
Q = "model.layers.0.self_attn.q_proj.weight"
Tensors = dict[str, np.ndarray[Any, Any]]


def write_base(
    folder: Path, dtype: Any = np.float32, rows: int = 6, fill: Mapping[str, float] | None = None, tied: bool = False
) -> Path:
    """A base model in two files: (rows, 4) of a projection, a norm, and a head or, when tied, an embedding of (8, 4)."""
    folder.mkdir()
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    first = {Q: RNG.normal(size=(rows, 4)).astype(dtype), "model.norm.weight": np.ones(4, dtype)}
    second = {head: RNG.normal(size=(8, 4)).astype(dtype)}
    for name, value in (fill or {}).items():
        (first if name in first else second)[name][..., 0] = value
    save_file(first, folder / "a.safetensors")
    save_file(second, folder / "b.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    (folder / "tokenizer.json").write_text("base")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    return folder


def lora(rank: int = 2, rows: int = 6, columns: int = 4, weight: str = Q) -> Tensors:
    """A and B of one linear layer."""
    name = f"base_model.model.{weight.removesuffix('.weight')}"
    return {
        f"{name}.lora_A.weight": RNG.normal(size=(rank, columns)).astype(np.float32),
        f"{name}.lora_B.weight": RNG.normal(size=(rows, rank)).astype(np.float32),
    }


def write_adapter(folder: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    """An adapter of these tensors, or of `lora()`."""
    folder.mkdir()
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    save_file(lora() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder
