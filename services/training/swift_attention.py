"""Loaded into ms-swift by `--external_plugins` on a CPU that multiplies bfloat16: causal attention in blocks of queries.

torch's attention on a CPU (2.13) multiplies mostly in float32 there and computes its weights again for the gradient. This
one does what the models' own "eager" attention does, block by block, so that keys which a block may not see are never
multiplied, and keeps the weights: a training step of the quickstart is a sixth shorter (docs/training.md).

Like swift_plugin.py it runs inside the child and imports nothing of fabrictune.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BLOCK = 256
"""Queries of a block."""
MOST_WEIGHTS = 32 * 1024 * 1024
"""Attention weights of one layer that are kept; with more, torch's attention is asked: it keeps none."""


class CausalAttention(torch.autograd.Function):  # type: ignore[misc]  # mypy skips torch (pyproject.toml)
    """softmax(query @ key.T) @ value of a causal model, several query heads to one key and value head."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query: (key heads, query heads of each, tokens, width), scaled; key, value: (key heads, tokens, width)."""
        result, kept = torch.empty_like(query), []
        for begin, end in _blocks(query.shape[2]):
            scores = torch.bmm(_rows(query, begin, end), key[:, :end].transpose(1, 2))
            later = torch.ones(end - begin, end - begin, dtype=torch.bool, device=query.device).triu_(1)
            scores.view(-1, end - begin, end)[:, :, begin:].masked_fill_(later, float("-inf"))
            weights = torch.softmax(scores, -1)
            result[:, :, begin:end] = torch.bmm(weights, value[:, :end]).view_as(query[:, :, begin:end])
            kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and value; those of key and value are summed in float32."""
        query, key, value, *kept = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(each, dtype=torch.float32) for each in (key, value))
        for (begin, end), weights in zip(_blocks(query.shape[2]), kept, strict=True):
            grad = _rows(grads[0], begin, end)
            of_value[:, :end] += torch.bmm(weights.transpose(1, 2), grad)
            of_weights = torch.bmm(grad, value[:, :end].transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_query[:, :, begin:end] = torch.bmm(of_scores, key[:, :end]).view_as(query[:, :, begin:end])
            of_key[:, :end] += torch.bmm(of_scores.transpose(1, 2), _rows(query, begin, end))
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype)


def _blocks(tokens: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, tokens, BLOCK):
        yield begin, min(begin + BLOCK, tokens)


def _rows(heads: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Tokens of all query heads that share a key head, one under the other."""
    return heads[:, :, begin:end].reshape(heads.shape[0], -1, heads.shape[3])


def _is_for_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    rows, heads, tokens, width = query.shape
    trained = query.dtype == torch.bfloat16 and query.device.type == "cpu" and torch.is_grad_enabled() and tokens > 1
    whole = key.shape[2] == tokens and value.shape[3] == width
    return bool(trained and whole and rows * heads * tokens**2 // 2 <= MOST_WEIGHTS)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **told: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a layer as transformers asks for it: (rows, heads, tokens, width) → (rows, tokens, heads, width)."""
    causal = attention_mask is None and told.get("is_causal") is not False and getattr(module, "is_causal", True)
    other = told.get("dropout") or any(told.get(key) is not None for key in ("position_bias", "cache"))
    if not causal or other or not _is_for_blocks(query, key, value):
        result: tuple[torch.Tensor, None] = _of_torch(module, query, key, value, attention_mask, **told)
        return result
    rows, heads, tokens, width = query.shape
    scale = told.get("scaling") or width**-0.5
    grouped = (query * scale).reshape(-1, heads // key.shape[1], tokens, width)
    with torch.autocast("cpu", enabled=False):
        attended = CausalAttention.apply(grouped, key.flatten(0, 1), value.flatten(0, 1))
    return attended.view(rows, heads, tokens, width).transpose(1, 2).contiguous(), None


_of_torch = ALL_ATTENTION_FUNCTIONS["sdpa"]
ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)
