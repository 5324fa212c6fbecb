"""Attention in blocks, beside torch's own in float32: outcome, gradients, and when it is left to torch."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from services.training import memory


@pytest.fixture(scope="module")
def attention() -> Iterator[ModuleType]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    from services.training import swift_attention

    yield swift_attention
    ALL_ATTENTION_FUNCTIONS.register("sdpa", before)


def draw(*shape: int) -> Any:
    import torch

    return torch.randn(*shape).bfloat16()


@pytest.mark.parametrize(
    ("rows", "heads", "key_heads", "tokens", "width"),
    [(1, 9, 3, 700, 64), (2, 4, 4, 256, 32), (1, 2, 1, 257, 24), (3, 6, 2, 5, 64)],
)
def test_outcome_and_gradients_are_those_of_attention(
    attention: ModuleType, rows: int, heads: int, key_heads: int, tokens: int, width: int
) -> None:
    import torch

    torch.manual_seed(1)
    inputs = [draw(rows, count, tokens, width) for count in (heads, key_heads, key_heads)]
    grad = draw(rows, tokens, heads, width)

    def gradients(dtype: Any, attend: Any) -> list[Any]:
        leaves = [each.to(dtype).detach().requires_grad_() for each in inputs]
        result = attend(*leaves)
        return [result, *torch.autograd.grad(result, leaves, grad.to(dtype))]

    def of_torch(query: Any, key: Any, value: Any) -> Any:
        group = heads // key_heads
        key, value = (each.repeat_interleave(group, 1) for each in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)

    def ours(query: Any, key: Any, value: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):  # as the trainer calls it
            return attention.attend(torch.nn.Module(), query, key, value, None, dropout=0.0, scaling=width**-0.5)[0]

    expected = gradients(torch.float32, of_torch)
    for exact, found in zip(expected, gradients(torch.bfloat16, ours), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.float() - exact).norm() < 0.01 * exact.norm()  # bfloat16 has 8 bits


@pytest.mark.parametrize(
    "left",
    ["float32", "mask", "dropout", "not causal", "no gradient", "keys of earlier tokens", "too many weights", "bias"],
)
def test_what_it_is_not_made_for_is_left_to_torch(
    attention: ModuleType, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    import torch

    asked: list[str] = []
    monkeypatch.setattr(attention, "_of_torch", lambda *_, **__: asked.append(left))
    monkeypatch.setattr(attention, "MOST_WEIGHTS", 10 if left == "too many weights" else attention.MOST_WEIGHTS)
    tensor = draw(1, 2, 8, 16)
    query = tensor.float() if left == "float32" else tensor
    key = draw(1, 2, 9, 16) if left == "keys of earlier tokens" else tensor
    told: dict[str, Any] = {"dropout": 0.1 if left == "dropout" else 0.0}
    told |= {"is_causal": False} if left == "not causal" else {}
    told |= {"position_bias": tensor} if left == "bias" else {}
    mask = torch.zeros(1, 1, 8, 8) if left == "mask" else None
    with torch.set_grad_enabled(left != "no gradient"):
        attention.attend(torch.nn.Module(), query, key, key, mask, **told)
    assert asked == [left]
    attention.attend(torch.nn.Module(), tensor, tensor, tensor, None) if left != "too many weights" else None
    assert asked == [left]


def test_a_model_asks_for_it_by_the_name_of_torchs(attention: ModuleType) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention.attend


def test_the_estimate_knows_how_much_is_kept(attention: ModuleType) -> None:
    assert memory.MOST_KEPT_WEIGHTS == attention.MOST_WEIGHTS
