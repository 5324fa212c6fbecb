"""A LoRA merge, streamed, beside peft's merge_and_unload on the same folders. Limit: the disk."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import Sample, call, show

LAYERS, WIDTH, RANK, ROUNDS = 24, 1024, 16, 3


def run() -> bool:
    """Measure both engines on a Llama of random weights."""
    with tempfile.TemporaryDirectory(prefix="fabrictune-bench-") as scratch:
        folder = Path(scratch)
        size = make_model(folder / "base", folder / "adapter")
        found: dict[str, list[Sample]] = {"stream": [], "peft": []}
        for _ in range(ROUNDS):
            for engine, samples in found.items():
                output = folder / "out"
                samples.append(call("bench.merging", "merge", str(folder), engine, str(output)))
                shutil.rmtree(output)
    note = "peft's figures hold the loading of transformers' model, not Python's imports of torch"
    show(f"merge of {size / 1e6:.0f} MB (bfloat16), median of {ROUNDS}", found, "peft", size / 1e6, note)
    return True


def make_model(base: Path, adapter: Path) -> int:
    """A base model and an adapter for it; returns the weights' bytes."""
    import ml_dtypes
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    base.mkdir()
    adapter.mkdir()
    shapes = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "o": (WIDTH, WIDTH)}
    mlp = {"gate": (3 * WIDTH, WIDTH), "up": (3 * WIDTH, WIDTH), "down": (WIDTH, 3 * WIDTH)}
    weights: dict[str, Any] = {}
    pairs: dict[str, Any] = {}
    for layer in range(LAYERS):
        for part, names in (("self_attn", shapes), ("mlp", mlp)):
            for name, shape in names.items():
                key = f"model.layers.{layer}.{part}.{name}_proj"
                weights[f"{key}.weight"] = rng.normal(0, 0.02, shape).astype(ml_dtypes.bfloat16)
                pairs[f"base_model.model.{key}.lora_A.weight"] = rng.normal(0, 0.02, (RANK, shape[1])).astype("f4")
                pairs[f"base_model.model.{key}.lora_B.weight"] = rng.normal(0, 0.02, (shape[0], RANK)).astype("f4")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = np.ones(WIDTH, ml_dtypes.bfloat16)
    weights["model.norm.weight"] = np.ones(WIDTH, ml_dtypes.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = rng.normal(0, 0.02, (8192, WIDTH)).astype(ml_dtypes.bfloat16)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "vocab_size": 8192,
        "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 16,
        "num_key_value_heads": 16, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    save_file(pairs, adapter / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "bias": "none"}
    told["target_modules"] = [f"{n}_proj" for n in (*shapes, *mlp)]
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    return (base / "model.safetensors").stat().st_size


def merge(folder: str, engine: str, output: str) -> None:
    """One merge as the worker does it."""
    from services.common.reporter import Silent
    from services.merging.worker import STAGE

    Path(output).mkdir()
    spec = STAGE.spec.model_validate({"base_model": "models/b", "adapter": "adapters/a", "engine": engine})
    STAGE.run(spec, {"base_model": Path(folder) / "base", "adapter": Path(folder) / "adapter"}, Path(output), Silent())
