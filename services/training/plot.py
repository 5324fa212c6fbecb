"""The loss curve of a training run as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SMOOTHING = 0.9
"""Weight of the past in the moving average; as TensorBoard's default slider, roughly."""


def plot_loss(records: Sequence[Mapping[str, Any]], file: Path, title: str) -> bool:
    """Draw training and validation loss over steps; False: there was nothing to draw.

    records: lines of metrics.jsonl.
    """
    trained = [(r["step"], r["loss"]) for r in records if "loss" in r and "eval_loss" not in r]
    evaluated = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    if not trained and not evaluated:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if trained:
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
        axes.plot(steps, smooth(losses), color="tab:blue", linewidth=2, label=f"training (last {losses[-1]:.3f})")
    if evaluated:
        steps, losses = zip(*evaluated, strict=True)
        axes.plot(steps, losses, "o-", color="tab:orange", linewidth=2, label=f"validation (best {min(losses):.3f})")
    axes.set(xlabel="optimizer step", ylabel="loss, weighted as it is trained", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120, metadata={"Software": None})
    return True


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average without the bias of its start. Source: Adam, Kingma & Ba 2015, section 3."""
    smoothed, average = [], 0.0
    for count, value in enumerate(values, 1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * value
        smoothed.append(average / (1 - _SMOOTHING**count))
    return smoothed
