"""A LoRA merge, streamed, beside peft's merge_and_unload, `swift export --merge_lora` and a plain `cp` of the same folder.

`python -m bench.merging 0.27 3 14 [--only ours,cp] [--rounds N]`; `make bench` takes the first size. Each command is timed whole,
with the start of its Python, as somebody who types it waits for it. Limit: `cp`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import ROOT, Sample, command, show

RANK, SHARD, POOL = 8, 2 << 30, 1 << 24
"""Of the adapter; bytes of a file; random numbers that weights are made of, over and over."""


@dataclass(frozen=True)
class Size:
    """A Llama's dimensions."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_values: int
    vocabulary: int
    is_tied: bool = False


SIZES: Mapping[str, Size] = {
    "0.27": Size(576, 1536, 30, 9, 3, 49152, is_tied=True),  # SmolLM2-135M
    "3": Size(2048, 8192, 24, 16, 4, 32000),
    "14": Size(4096, 11008, 32, 32, 32, 64000),  # Llama 2 7B with a larger vocabulary
}
PEFT = """
import sys, torch, transformers, peft
base, adapter, output = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
merged = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=True).merge_and_unload(safe_merge=False)
merged.save_pretrained(output)
transformers.AutoTokenizer.from_pretrained(base).save_pretrained(output)
"""


def run() -> bool:
    """The smallest model, all engines."""
    return measure("0.27", ("ours", "peft", "swift", "cp"), 3)


def measure(size: str, engines: Sequence[str], rounds: int) -> bool:
    """Print one table. False when an engine failed."""
    with tempfile.TemporaryDirectory(prefix="fabrictune-bench-", dir=os.environ.get("BENCH_DIR")) as scratch:
        folder = Path(scratch)
        # In a process of its own: one that is started by a large process begins with that one's peak memory (Linux).
        make = f"from bench.merging import *; make_model(SIZES[{size!r}], Path({str(folder)!r}))"
        subprocess.run([sys.executable, "-c", make], cwd=ROOT, check=True)
        total = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
        found: dict[str, list[Sample]] = {engine: [] for engine in engines}
        failed: dict[str, str] = {}
        for _ in range(rounds):
            for engine in [e for e in engines if e not in failed]:
                os.sync()  # nobody pays for what another one has left to be written
                try:
                    found[engine].append(command(argv_of(engine, folder), environment()))
                except RuntimeError as error:
                    failed[engine] = str(error)
                shutil.rmtree(folder / "out", ignore_errors=True)
    note = f"rank {RANK} on all linear layers, bfloat16, {len(os.sched_getaffinity(0))} cores; process starts included"
    measured = {engine: samples for engine, samples in found.items() if engine not in failed}
    show(f"merge of {total / 1e9:.2f} GB, median of {rounds}", measured, engines[-1], total / 1e6, note)
    for engine, text in failed.items():
        print(f"{engine} failed: {text}")
    return not failed


def argv_of(engine: str, folder: Path) -> list[str]:
    """What somebody would type."""
    base, adapter, output = (str(folder / name) for name in ("base", "adapter", "out"))
    if engine == "cp":
        return ["cp", "-r", base, output]
    if engine == "peft":
        return [sys.executable, "-c", PEFT, base, adapter, output]
    if engine == "swift":
        from services.merging.swift_engine import plan_swift

        return plan_swift(Path(base), Path(adapter), Path(output))
    return [sys.executable, "-m", "fabrictune", "merge", "--model", base, "--adapter", adapter, "--output", output]


def environment() -> dict[str, str]:
    """Without a network and without a GPU."""
    told = {"HF_HUB_OFFLINE": "1", "USE_HF": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **told}


def make_model(size: Size, folder: Path) -> None:
    """A base model in shards and an adapter for it, of random numbers: folder/base and folder/adapter."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    rng = np.random.default_rng(0)
    pool = rng.normal(0, 0.02, POOL).astype(ml_dtypes.bfloat16).view(np.uint16)
    shapes = dict(weights_of(size))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * math.prod(s) for s in shards[-1].values()) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    for number, shard in enumerate(shards, 1):
        write_shard(base / f"model-{number:05d}-of-{len(shards):05d}.safetensors", shard, pool)
    weight_map = {n: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i, s in enumerate(shards, 1) for n in s}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    pairs: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name.endswith("_proj.weight"):
            key = f"base_model.model.{name.removesuffix('.weight')}"
            pairs[f"{key}.lora_A.weight"] = rng.normal(0, 0.02, (RANK, shape[1])).astype("f4")
            pairs[f"{key}.lora_B.weight"] = rng.normal(0, 0.02, (shape[0], RANK)).astype("f4")
    save_file(pairs, adapter / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "bias": "none"}
    told["target_modules"] = sorted({n.split(".")[-2] for n in shapes if n.endswith("_proj.weight")})
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    write_rest(size, base)


def weights_of(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the order of a checkpoint."""
    narrow = size.hidden // size.heads * size.key_values
    yield "model.embed_tokens.weight", (size.vocabulary, size.hidden)
    for layer in range(size.layers):
        key = f"model.layers.{layer}"
        for name, rows in (("q", size.hidden), ("k", narrow), ("v", narrow), ("o", size.hidden)):
            yield f"{key}.self_attn.{name}_proj.weight", (rows, size.hidden)
        yield f"{key}.mlp.gate_proj.weight", (size.intermediate, size.hidden)
        yield f"{key}.mlp.up_proj.weight", (size.intermediate, size.hidden)
        yield f"{key}.mlp.down_proj.weight", (size.hidden, size.intermediate)
        yield f"{key}.input_layernorm.weight", (size.hidden,)
        yield f"{key}.post_attention_layernorm.weight", (size.hidden,)
    yield "model.norm.weight", (size.hidden,)
    if not size.is_tied:
        yield "lm_head.weight", (size.vocabulary, size.hidden)


def write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], pool: Any) -> None:
    """One file, never held in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        left = at // 2
        while left:
            out.write(pool[: min(left, POOL)])
            left -= min(left, POOL)


def write_rest(size: Size, base: Path) -> None:
    """config.json, and a tokenizer, which ms-swift wants."""
    import tokenizers

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size.hidden,
        "vocab_size": size.vocabulary, "intermediate_size": size.intermediate, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.key_values, "torch_dtype": "bfloat16",
        "tie_word_embeddings": size.is_tied,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    words = {"<s>": 0, "</s>": 1, "<unk>": 2}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>")).save(str(base / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (base / "tokenizer_config.json").write_text(json.dumps({**told, "pad_token": "</s>"}))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="+", choices=SIZES, help="GB")
    parser.add_argument("--only", default="ours,peft,swift,cp", help="the last one is the baseline")
    parser.add_argument("--rounds", type=int, default=3)
    told = parser.parse_args()
    for size in told.sizes:
        measure(size, told.only.split(","), told.rounds)


if __name__ == "__main__":
    main()
