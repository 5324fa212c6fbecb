"""A training step of SmolLM2-135M on this CPU with the prompt's gradient and without (services/training/swift_prompt.py).

The limit beside it: the same step as matrix products of the weights alone, at the rate of one large product.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

TOKENS, ANSWERS = 1138, 122
"""Of the quickstart's mean row, and those of them that are trained."""
PROMPTS = (0.3, 0.58, 0.8)
"""Parts of a row that come before its first question; 0.58 on the quickstart's average."""
ROUNDS = 4
TRAINED = r".*layers\.(1[0-9]|2[0-9])\..*_proj"
"""As in preset smollm2-cpu: layers 10 to 29 of 30."""
LAYER, LAYERS, UPPER = 576 * (576 * 2 + 192 * 2 + 1536 * 3), 30, 20
"""Weights of a layer, layers, and those through which a gradient goes."""


def run() -> bool:
    """Time each in turn."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from services.training.swift_prompt import QUESTION, read_prompts_first

    table = Table(title=f"a step of {TOKENS} tokens, {torch.get_num_threads()} threads, float32", title_justify="left")
    for column in ("prompt", "with its gradient s", "without s", "without / with", "limit s"):
        table.add_column(column, justify="right")
    shape = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    ways: dict[str, Any] = {}
    for name in ("with", "without"):
        torch.manual_seed(1)
        ways[name] = get_peft_model(LlamaForCausalLM(shape), LoraConfig(r=16, target_modules=TRAINED)).train()
    read_prompts_first(ways["without"].get_base_model())
    row, side = torch.randint(0, 49152, (1, TOKENS)), torch.randn(1024, 1024)
    for part in PROMPTS:
        kept = torch.zeros(TOKENS, dtype=torch.bool)
        kept[int(TOKENS * part) + QUESTION - 1 :][:ANSWERS] = True
        steps = {name: partial(_step, model, row, kept) for name, model in ways.items()}
        took = [{name: _time(step) for name, step in steps.items()} for _ in range(ROUNDS)][1:]
        first, second = (statistics.median(each[name] for each in took) for name in ways)
        product = min(_time(lambda: torch.matmul(side, side)) for _ in range(9)) / 1024**3
        tokens = LAYERS * TOKENS + UPPER * TOKENS * (1 - part)  # forward, and back through those that keep it
        cells = (f"{first:.2f}", f"{second:.2f}", f"{second / first:.2f}", f"{product * LAYER * tokens:.2f}")
        table.add_row(f"{part:.0%}", *cells)
    Console(width=120).print(table)
    return True


def _step(model: Any, row: Any, kept: Any) -> None:
    import torch

    logits = model(input_ids=row, logits_to_keep=kept).logits[0]
    torch.nn.functional.cross_entropy(logits, row[0, : len(logits)]).backward()
    model.zero_grad()


def _time(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
