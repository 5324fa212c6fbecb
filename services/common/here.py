"""A stage on plain folders, in this process: progress on the terminal, no store, no server."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Display

from services.common.errors import Cancelled
from services.common.reporter import Progress
from services.common.stage import Stage

LINE_SECONDS = 20.0


def run(stage: Stage[Any], spec: BaseModel, inputs: Mapping[str, Path], output: Path) -> Mapping[str, Any]:
    """Run a stage; its words go to stderr. Raises what the stage raises; Ctrl-C and SIGTERM arrive as in a worker."""
    before = {number: signal.signal(number, _raise_cancelled) for number in (signal.SIGTERM, signal.SIGINT)}
    columns = (SpinnerColumn(), TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    try:
        with Display(
            *columns, TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), console=Console(stderr=True)
        ) as display:
            return stage.run(spec, inputs, output, _Terminal(display, stage.kind))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Terminal:
    """A Reporter that draws one bar."""

    def __init__(self, display: Display, title: str) -> None:
        self._display = display
        self._task = display.add_task(title, total=None, figures="")
        self._title, self._said = title, time.monotonic()

    def progress(self, progress: Progress) -> None:
        """Move the bar."""
        figures = [progress.phase]
        figures += [f"loss {progress.loss:.3f}"] if progress.loss is not None else []
        figures += [f"{progress.tokens_per_second:.0f} tok/s"] if progress.tokens_per_second else []
        if progress.eta_seconds:
            figures.append(f"ETA {int(progress.eta_seconds) // 60}:{int(progress.eta_seconds) % 60:02d}")
        total, text = progress.total_steps or None, "  ".join(f for f in figures if f)
        self._display.update(self._task, completed=progress.step, total=total, figures=text)
        if not self._display.console.is_terminal and time.monotonic() - self._said > LINE_SECONDS:
            self._said = time.monotonic()
            self.log(f"{self._title}  {progress.step}{f'/{total}' if total else ''}  {text}")

    def log(self, text: str, severity: str = "INFO") -> None:
        """A line above the bar."""
        style = {"WARNING": "yellow", "ERROR": "red", "DEBUG": "dim"}.get(severity, "")
        self._display.console.print(text, style=style, markup=False, highlight=False)

    def checkpoint(self, step: int, folder: Path) -> None:
        """Nothing outlives this process but the output folder."""


def _raise_cancelled(_number: int, _frame: object) -> None:
    raise Cancelled("interrupted")
