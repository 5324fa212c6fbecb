"""Loaded into ms-swift by `--external_plugins` for `prompt_gradient: false`: what comes before a row's first question is
read without a gradient.

Three fifths of a quickstart row are tools, and answers see them by their keys and values only. Those are computed first,
as in serving, and taken as given: the adapter learns from questions and answers, and nothing is kept of the tools for
the way back. A step of the quickstart takes two thirds of the time so (docs/training.md).

Like swift_plugin.py it runs inside the child and imports nothing of fabrictune.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from swift.callbacks import callbacks_map
from swift.callbacks.base import TrainerCallback

QUESTION = 96
"""Tokens before a row's first trained one that keep their gradient."""


class PromptWithoutGradient(TrainerCallback):  # type: ignore[misc]  # ms-swift has no types
    """Splits each row that is trained in two."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the model read prompts first."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        read_prompts_first(model.get_base_model() if hasattr(model, "get_base_model") else model)


def read_prompts_first(model: Any) -> None:
    """Make forward of a causal language model take a single row's prompt as given while it trains.

    The prompt ends QUESTION tokens before the first one that `logits_to_keep`, a mask of the row, has.
    """
    whole = model.forward

    @functools.wraps(whole)
    def forward(input_ids: torch.Tensor, attention_mask: Any = None, logits_to_keep: Any = 0, **more: Any) -> Any:
        prompt = _prompt_tokens(input_ids, logits_to_keep) if model.training and torch.is_grad_enabled() else 0
        if not prompt:
            return whole(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep, **more)
        with torch.no_grad():
            read = model.base_model(input_ids=input_ids[:, :prompt], use_cache=True)
        more |= {"past_key_values": read.past_key_values, "use_cache": True}
        more.pop("position_ids", None)  # they go on from the cache
        return whole(input_ids=input_ids[:, prompt:], logits_to_keep=logits_to_keep[prompt:], **more)

    model.forward = forward


def _prompt_tokens(rows: torch.Tensor, kept: Any) -> int:
    if rows.shape[0] != 1 or not isinstance(kept, torch.Tensor) or kept.shape != rows.shape[1:] or not kept.any():
        return 0
    return max(int(kept.int().argmax()) + 1 - QUESTION, 0)


callbacks_map["fabrictune_prompt"] = PromptWithoutGradient
