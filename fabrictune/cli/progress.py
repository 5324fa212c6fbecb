"""How a job's progress looks on a terminal: one line that moves, log lines above it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from fabrictune.cli.context import console, errors, print_json_line, settings
from fabrictune.sources import Rows, find_rows, is_remote, public_uri
from fabrictune.v1 import job_pb2

LINE_SECONDS = 20.0
STYLES = {job_pb2.LogLine.WARNING: "yellow", job_pb2.LogLine.ERROR: "red", job_pb2.LogLine.DEBUG: "dim"}


class _Figures(ProgressColumn):
    """loss, tokens per second, ETA: what the stage knows."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("figures", "")), style="cyan")


class _Lines(Progress):
    """Where there is no terminal (a log file, CI): a line when something begins or ends, and one now and then."""

    def __init__(self, where: Console) -> None:
        super().__init__(console=where, disable=True)
        self._said: dict[TaskID, tuple[float, str]] = {}

    def update(self, task_id: TaskID, *arguments: Any, **fields: Any) -> None:
        """Move a bar that nobody sees, and say so when the last word is old."""
        super().update(task_id, *arguments, **fields)
        task = self.tasks[task_id]
        total = f"/{task.total:.0f}" if task.total else ""
        text = f"{task.description}  {task.completed:.0f}{total}  {task.fields.get('figures', '')}".rstrip()
        when, before = self._said.get(task_id, (float("-inf"), ""))
        if text != before and (task.finished or time.monotonic() - when > LINE_SECONDS):
            self._said[task_id] = time.monotonic(), text
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def new_progress(where: Console = console) -> Progress:
    """A progress display with our columns. Tasks take a field `figures`."""
    if not where.is_terminal:
        return _Lines(where)
    return Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Figures(),
        TimeElapsedColumn(),
        console=where,
        transient=False,
    )


def figures_of(progress: job_pb2.Progress) -> str:
    """The figures of a Progress in one line: "training  loss 0.52  312 tok/s  1.9 GB  ETA 3:10"."""
    parts = [progress.phase] if progress.phase else []
    if progress.HasField("loss"):
        parts.append(f"loss {progress.loss:.3f}")
    if progress.HasField("eval_loss"):
        parts.append(f"eval loss {progress.eval_loss:.3f}")
    if progress.HasField("token_accuracy"):
        parts.append(f"token acc {progress.token_accuracy:.2f}")
    if progress.HasField("tokens_per_second"):
        parts.append(f"{progress.tokens_per_second:.0f} tok/s")
    if progress.HasField("memory_bytes"):
        parts.append(f"{progress.memory_bytes / 1e9:.1f} GB")
    if progress.HasField("eta"):
        seconds = int(progress.eta.ToSeconds())
        parts.append(f"ETA {seconds // 60}:{seconds % 60:02d}")
    return "  ".join(parts)


def follow(name: str, events: Iterable[job_pb2.WatchEvent], logs: bool = True) -> job_pb2.Execution:
    """Show a job's events until it has ended; returns its last state. With --json each event is a line of JSON."""
    last = job_pb2.Execution()
    if settings().json:
        for event in events:
            print_json_line(json_format.MessageToDict(event, preserving_proto_field_name=True))
            if event.WhichOneof("event") == "state":
                last = event.state
        return last
    with new_progress() as display:
        task = display.add_task(name, total=None, figures="")
        for event in events:
            kind = event.WhichOneof("event")
            if kind == "state":
                last = event.state
                show_state(display, task, last)
            elif kind == "progress":
                show_progress(display, task, event.progress)
            elif kind == "log" and logs:
                print_log(display, event.log)
            elif kind == "artifact":
                display.console.print(f"sealed [bold]{event.artifact.name}[/]  sha256:{event.artifact.digest[:12]}")
    return last


class StageListener:
    """Shows a stage that runs in this process."""

    def __init__(self, display: Progress, title: str) -> None:
        self._display, self._task = display, display.add_task(title, total=None, figures="")

    def progress(self, progress: job_pb2.Progress) -> None:
        """Move the bar."""
        show_progress(self._display, self._task, progress)

    def log(self, line: job_pb2.LogLine) -> None:
        """A line above the bar."""
        print_log(self._display, line)


def find_with_bar(uri: str, folder: Path = Path()) -> Rows:
    """The rows of a source, with a bar while they are fetched."""
    if settings().json or not is_remote(uri):
        return find_rows(uri, folder)
    with new_progress(errors) as display:
        task = display.add_task(f"fetch {public_uri(uri)}", total=None, figures="bytes")
        return find_rows(uri, folder, lambda have, total: display.update(task, completed=have, total=total))


def show_progress(display: Progress, task: Any, progress: job_pb2.Progress) -> None:
    """Move one task's bar. A phase that counts nothing, such as uploading, leaves it where it is."""
    counts = progress.step or progress.total_steps
    moved: dict[str, Any] = {"completed": progress.step, "total": progress.total_steps or None} if counts else {}
    display.update(task, figures=figures_of(progress), **moved)


def show_state(display: Progress, task: Any, execution: job_pb2.Execution) -> None:
    """Say a state that is not simply RUNNING."""
    name = job_pb2.Execution.State.Name(execution.state)
    if name != "RUNNING":
        display.update(task, figures=f"{name.lower()}  {execution.message}".strip())


def print_log(display: Progress, line: job_pb2.LogLine) -> None:
    """A worker's line, above the bars."""
    display.console.print(Text(line.text, style=STYLES.get(line.severity, "")), soft_wrap=True)
