"""Loaded into ms-swift by `--external_plugins` for `checkpoint: mean`: the mean of the adapter over the second half of training.

Stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407). With few steps of one row each, the last weights lean
towards the rows that came last; their mean does not, and costs nothing but a copy of the adapter. Every checkpoint carries the
mean so far in its folder `mean`, as an adapter of its own, so that a resumed run goes on with it.

Like swift_plugin.py it runs inside the child, in every rank, and imports nothing of fabrictune.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from swift.callbacks import callbacks_map
from swift.callbacks.base import TrainerCallback

FOLDER = "mean"
"""As services.training.checkpoints names it, which looks for the output there."""
_WEIGHTS = "adapter_model.safetensors"


class MeanOfWeights(TrainerCallback):  # type: ignore[misc]  # ms-swift has no types
    """Keeps the running mean, in float32, in the first rank."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        self._mean: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take up the mean of a run that was cut off."""
        if state.is_world_process_zero and args.resume_from_checkpoint:
            file = Path(args.resume_from_checkpoint) / FOLDER / _WEIGHTS
            self._mean = load_file(file) if file.exists() else {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the weights after a step."""
        steps = state.global_step - state.max_steps // 2
        if not state.is_world_process_zero or steps <= 0:
            return
        for name, weight in self._weights().items():
            now = weight.detach().float()
            mean = self._mean.get(name)
            self._mean[name] = now.clone() if mean is None else mean.to(now.device).lerp_(now, 1 / steps)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the mean into the checkpoint that was just written."""
        if state.is_world_process_zero and self._mean:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (checkpoint / FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(checkpoint / "adapter_config.json", checkpoint / FOLDER / "adapter_config.json")
            save_file(self._mean, checkpoint / FOLDER / _WEIGHTS, metadata={"format": "pt"})

    def _weights(self) -> dict[str, torch.Tensor]:
        """Weights under the names that an adapter's file has."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        weights: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
        return weights


callbacks_map["fabrictune_mean"] = MeanOfWeights
