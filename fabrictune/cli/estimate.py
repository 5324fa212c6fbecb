"""`fabrictune train --estimate`: memory, time and cost of a training run that is not started."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from fabrictune.cli.context import console, print_message, settings
from fabrictune.v1 import training_pb2

GIB = 1 << 30


def estimate_training(
    spec: Mapping[str, Any], dataset: str, model: str, gpu: str, price: float
) -> training_pb2.EstimateTrainingResponse:
    """The estimate of a server for artifacts; of folders, made here. Raises ApiError."""
    if dataset.startswith("datasets/") and model.startswith("models/") and not Path(dataset).exists():
        with settings().connect() as client:
            return client.training.estimate({**spec, "dataset": dataset, "base_model": model}, gpu, price)
    from fabrictune import local

    return local.estimate_training(spec, Path(dataset), Path(model), gpu, price)


def show_estimate(answer: training_pb2.EstimateTrainingResponse) -> None:
    """Print it: the message with --json, else a table."""
    if settings().json:
        print_message(answer)
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for part in answer.memory:
        table.add_row(part.name, f"{part.bytes / GIB:.2f} GiB")
    table.add_row("[bold]each process at its peak[/]", f"[bold]{answer.memory_bytes / GIB:.2f} GiB[/]")
    if answer.HasField("available_bytes"):
        verdict = "[green]fits[/]" if answer.fits else "[red]does not fit[/]"
        table.add_row(f"of {answer.available_bytes / GIB:.0f} GiB", verdict)
    table.add_row("parameters", f"{answer.parameters:,}")
    table.add_row("… that are trained", f"{answer.trained_parameters:,}")
    table.add_row("rows", f"{answer.rows:,}")
    table.add_row("optimizer steps", f"{answer.steps:,}")
    table.add_row("tokens", f"{answer.tokens:,}")
    if answer.HasField("duration"):
        table.add_row("time", _span(answer.duration.ToSeconds()))
    if answer.HasField("cost"):
        table.add_row("cost", f"{answer.cost:,.2f}")
    console.print(table, highlight=False)
    if answer.advice:
        console.print(f"[yellow]to make it fit:[/] {answer.advice}", highlight=False)
    for line in answer.assumptions:
        console.print(f"[dim]{line}[/]", highlight=False)


def _span(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    return f"{hours} h {rest // 60:02} min" if hours else f"{rest // 60} min {rest % 60:02} s"
