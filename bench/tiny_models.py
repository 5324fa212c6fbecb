"""Llamas of random weights and rows of given lengths, for benchmarks of training: nothing has to be downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ("weather", "city", "answer", "question", "tool", "call", "red", "blue", "paris", "rome", "sunny", "rain")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    heads: int = 4
    key_heads: int = 2
    dtype: str = "float32"


def make_model(folder: Path, shape: Shape) -> None:
    """A model folder: config, safetensors, and a tokenizer that knows WORDS."""
    import ml_dtypes
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    rng, dtype = np.random.default_rng(0), np.dtype(np.float32 if shape.dtype == "float32" else ml_dtypes.bfloat16)
    width, key = shape.hidden // shape.heads, shape.hidden // shape.heads * shape.key_heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (shape.vocabulary, shape.hidden),
        "model.norm": (shape.hidden,),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{n}_proj": (shape.hidden, shape.hidden) for n in "qo"}
        shapes |= {f"{prefix}.self_attn.{n}_proj": (key, shape.hidden) for n in "kv"}
        shapes |= {f"{prefix}.mlp.{n}_proj": (shape.intermediate, shape.hidden) for n in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj"] = (shape.hidden, shape.intermediate)
        shapes |= {f"{prefix}.{n}_layernorm": (shape.hidden,) for n in ("input", "post_attention")}
    weights = {
        f"{name}.weight": (np.ones(s) if len(s) == 1 else rng.standard_normal(s, np.float32) * 0.02).astype(dtype)
        for name, s in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden, "head_dim": width,
        "num_hidden_layers": shape.layers, "intermediate_size": shape.intermediate, "vocab_size": shape.vocabulary,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.key_heads, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "dtype": shape.dtype, "rms_norm_eps": 1e-5, "eos_token_id": 2,
        "bos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    _make_tokenizer(folder)


def make_rows(folder: Path, lengths: Sequence[int], validation: int = 0) -> int:
    """A dataset with rows of so many tokens (nearly), a quarter of each the answer; returns the tokens of train.jsonl."""
    folder.mkdir(parents=True)
    rng, total = np.random.default_rng(1), 0
    rows: list[dict[str, Any]] = []
    for number, length in enumerate(lengths):
        words = rng.choice(WORDS, length - 26)
        cut = len(words) * 3 // 4
        told = [("system", "You call tools."), ("user", " ".join(words[:cut])), ("assistant", " ".join(words[cut:]))]
        rows.append({"id": f"r{number}", "messages": [{"role": role, "content": text} for role, text in told]})
        total += length
    for name, part in (("train", rows[validation:]), ("validation", rows[:validation])):
        if part:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return total


def _make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS), " " + " ".join(WORDS), "system user assistant"] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "bos_token": "<|im_start|>", "chat_template": CHATML,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
