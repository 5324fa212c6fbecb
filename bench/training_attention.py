"""Causal attention of a training step on this CPU: ours (services/training/swift_attention.py) beside torch's and eager.

The limit beside it: the same multiplications as one large bfloat16 product, at the rate that this CPU makes it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

HEADS, KEY_HEADS, WIDTH = 9, 3, 64
"""SmolLM2-135M's."""
LENGTHS = (256, 512, 1139, 2048)
"""Tokens of a row; the quickstart's rows have 1139 on average."""
ROUNDS = 9


def run() -> bool:
    """Time each in turn."""
    import torch
    from transformers import LlamaConfig
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

    from services.training.swift_attention import attend

    shape = LlamaConfig(
        hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=WIDTH
    )
    module = LlamaAttention(shape, 0).train()
    table = Table(title=f"forward + backward of one layer, {torch.get_num_threads()} threads", title_justify="left")
    for column in ("tokens", "torch's ms", "eager ms", "ours ms", "ours / torch's", "limit ms"):
        table.add_column(column, justify="right")
    for tokens in LENGTHS:
        query, key, value = (
            torch.randn(1, heads, tokens, WIDTH).bfloat16().requires_grad_() for heads in (HEADS, KEY_HEADS, KEY_HEADS)
        )
        later = torch.full((tokens, tokens), float("-inf"), dtype=torch.bfloat16).triu_(1)[None, None]
        ways: dict[str, Callable[[], Any]] = {
            name: _step(attention, module, (query, key, value), mask)
            for name, attention, mask in (
                ("torch", sdpa_attention_forward, None), ("eager", eager_attention_forward, later), ("ours", attend, None),
            )
        }  # fmt: skip
        side = torch.randn(1024, 1024).bfloat16()
        ways["product"] = partial(torch.matmul, side, side)
        took: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                took[name].append(_time(way))
        torchs, eager, ours, product = (statistics.median(took[name][1:]) * 1000 for name in ways)
        # Two products forward, four backward, each over half of tokens × tokens.
        limit = product * 6 * HEADS * WIDTH * tokens**2 / 2 / 1024**3
        cells = (f"{torchs:.1f}", f"{eager:.1f}", f"{ours:.1f}", f"{ours / torchs:.2f}", f"{limit:.1f}")
        table.add_row(str(tokens), *cells)
    Console(width=120).print(table)
    return True


def _step(attention: Callable[..., Any], module: Any, inputs: tuple[Any, ...], mask: Any) -> Callable[[], Any]:
    import torch

    def step() -> None:
        result, _ = attention(module, *inputs, mask, scaling=WIDTH**-0.5, dropout=0.0)
        torch.autograd.grad(result, inputs, torch.ones_like(result))

    return step


def _time(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
