"""What the switches of a preset do on this CPU: tokens a second, peak memory and validation loss after the same rows."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.tiny_models import Shape, make_model, make_rows

SHAPE = Shape(hidden=512, layers=8, intermediate=1408, vocabulary=16384)
ROWS = int(os.environ.get("BENCH_ROWS", "64"))
BASE: dict[str, Any] = {
    "num_train_epochs": 2, "max_length": 1024, "effective_batch_size": 4, "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4, "gradient_checkpointing": True, "use_logits_to_keep": False, "eval_strategy": "steps",
    "eval_steps": 1000, "save_steps": 1000, "target_regex": r".*_proj", "logging_steps": 4, "torch_dtype": "float32",
}  # fmt: skip
THREE = {"gradient_checkpointing": False, "use_logits_to_keep": True, "group_by_length": True}
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    # name, what differs from the case before it is named; all from BASE
    ("recomputing (the default recipe)", {}),
    ("group_by_length", {"group_by_length": True}),
    ("no recomputing", {"gradient_checkpointing": False}),
    ("no recomputing, logits of answers only", {"gradient_checkpointing": False, "use_logits_to_keep": True}),
    ("all three", THREE),
    ("torch_dtype: auto (bfloat16 where this CPU multiplies it)", {"torch_dtype": "auto"}),
    ("… and all three", {"torch_dtype": "auto", **THREE}),
)


def run() -> bool:
    """Train each case on the same rows."""
    table = Table(title=f"two epochs of {ROWS} rows of 64 to 1000 tokens, 4 a step", title_justify="left")
    for column in ("", "tokens/s", "speed", "peak MB", "training loss", "validation loss"):
        table.add_column(column, justify="left" if not column else "right")
    first = 0.0
    for name, arguments in CASES:
        found = _train({**BASE, **arguments})
        speed = found["tokens"] / found["computing_seconds"]
        first = first or speed
        cells = (f"{speed:.0f}", f"{speed / first:.2f}", f"{found['peak_memory_bytes'] / 1e6:.0f}")
        losses = (f"{found['loss']:.4f}", f"{found['eval_loss']:.4f}")
        print(name, *cells, *losses, flush=True)
        table.add_row(name, *cells, *losses)
    Console(width=140).print(table)
    return True


def _train(arguments: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    from services.common.reporter import Silent
    from services.training.spec import Spec
    from services.training.worker import run as train

    told = dict(arguments)
    steps = 2 * ROWS // told["effective_batch_size"]
    told |= {"eval_steps": steps, "save_steps": steps}
    names = {"dataset": "datasets/d", "base_model": "models/m", "preset": "smollm2-cpu"}
    with tempfile.TemporaryDirectory(prefix="fabrictune-bench-") as scratch:
        folder = Path(scratch)
        make_model(folder / "model", SHAPE)
        lengths = np.random.default_rng(2).integers(64, 1000, ROWS + 8)
        make_rows(folder / "rows", [int(n) for n in lengths], validation=8)
        (folder / "out").mkdir()
        inputs = {"dataset": folder / "rows", "base_model": folder / "model"}
        spec = Spec.model_validate({**names, "arguments": told})
        return dict(train(spec, inputs, folder / "out", Silent()))
