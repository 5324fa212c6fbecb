"""Runs the training child and listens to it: output, metrics, checkpoints; and ends it with all that it started.

Whatever way this process goes, the child goes too: by the process group, by torchrun, and, if this process is killed,
by PR_SET_PDEATHSIG. When it is told to stop, the child first saves a checkpoint, for as long as STOP_PART allows.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.common.config import load_server
from services.common.errors import Cancelled
from services.common.reporter import Reporter
from services.training.checkpoints import CheckpointKeeper
from services.training.progress import LineReader, Metrics, as_record, explain_failure, news_of, read_metrics
from services.training.swift import Command

STOP_PART = 0.75
"""Of the grace period, a child that was told to stop may take so much to end its step and to save; the rest is for uploading."""
_POLL_SECONDS = 0.25
_END_SECONDS = 5.0
_LAST_LINES = 200
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)  # loaded here, not between fork and exec


@dataclass
class Trained:
    """What a run has said of itself."""

    records: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics.jsonl."""
    newest_checkpoint: int | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    """dataset.json of the plugin: rows by split, max_steps, step at the start; {} until training begins."""
    tokens: int = 0
    computing_seconds: float = 0.0
    peak_bytes: int = 0
    """Memory of a process at most, of the first rank's."""


def run_child(command: Command, work: Path, reporter: Reporter, records: Sequence[Mapping[str, Any]] = ()) -> Trained:
    """Run the command in the folder `work` to its end. records: metrics of the steps before those of a resumed run.

    Raises what explain_failure says, or Cancelled.
    """
    with (work / "train.log").open("wb") as log:
        child = subprocess.Popen(
            command.argv,
            env={**os.environ, **command.env},
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # one prctl call, no lock is taken
        )
    keeper = CheckpointKeeper(work / "run", work / "held", reporter)
    listener = _Listener(work, reporter, keeper, records)
    try:
        _listen_until_end(child, listener)
    except Cancelled:
        _stop_with_checkpoint(child, listener, work)
        raise
    finally:
        _end_group(child)
        listener.listen()
        keeper.close()
    if child.returncode != 0:
        raise explain_failure(child.returncode, list(listener.last_lines))
    return listener.trained


class _Listener:
    """Reads what the child has written since the last time and passes it on."""

    def __init__(
        self, work: Path, reporter: Reporter, keeper: CheckpointKeeper, records: Sequence[Mapping[str, Any]]
    ) -> None:
        self.trained = Trained(records=[dict(record) for record in records])
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._work, self._reporter, self._keeper = work, reporter, keeper
        self._output = LineReader(work / "train.log")
        self._metrics_lines = LineReader(work / "run" / "logging.jsonl")
        self._checkpoint_lines = LineReader(work / "checkpoints.jsonl")
        self._metrics = Metrics()
        self._told: set[str] = set()

    def listen(self) -> None:
        """Pass on what is new."""
        for line in self._output.new_lines():
            self.last_lines.append(line)
            news = news_of(line)
            if news and news[1] not in self._told:  # ms-swift says many things twice
                self._told.add(news[1])
                self._reporter.log(news[1], news[0])
        if not self.trained.rows and (self._work / "dataset.json").exists():
            self._begin()
        # Read before the metrics: a checkpoint is told of after the metrics of its step, and carries them.
        checkpoints = list(self._checkpoint_lines.new_lines())
        for line in self._metrics_lines.new_lines():
            self._measure(json.loads(line))
        for line in checkpoints:
            saved = json.loads(line)
            self.trained.newest_checkpoint = saved["step"]
            self._keeper.keep(saved["step"], saved["best_step"], self.trained.records)

    def _begin(self) -> None:
        try:
            self.trained.rows = json.loads((self._work / "dataset.json").read_text())
        except json.JSONDecodeError:  # half written; the next time
            return
        rows = self.trained.rows
        refused = self._work / "refused.jsonl"
        left_out = len(set(refused.read_text().splitlines())) if refused.exists() else 0
        if left_out > rows["train"]:
            self._reporter.log(f"most rows are left out: {left_out} are longer than max_length", "WARNING")
        self._reporter.log(f"training on {rows['train']} rows for {rows['max_steps']} steps, from step {rows['step']}")

    def _measure(self, line: Mapping[str, Any]) -> None:
        before = self._metrics
        self._metrics, warnings = read_metrics(line, before)
        for warning in warnings:
            self._reporter.log(warning, "WARNING")
        if self._metrics is before:
            return
        self._reporter.progress(self._metrics.progress)
        if "loss" in line or "eval_loss" in line:
            self.trained.records.append(as_record(self._metrics.progress))
        self.trained.peak_bytes = max(self.trained.peak_bytes, self._metrics.progress.memory_bytes or 0)
        self.trained.tokens, self.trained.computing_seconds = self._metrics.tokens, self._metrics.computing_seconds


def _listen_until_end(child: subprocess.Popen[bytes], listener: _Listener) -> None:
    while child.poll() is None:
        listener.listen()
        time.sleep(_POLL_SECONDS)


def _stop_with_checkpoint(child: subprocess.Popen[bytes], listener: _Listener, work: Path) -> None:
    if not listener.trained.rows:
        return  # no step has been made yet: there is nothing to save
    (work / "stop").touch()
    deadline = time.monotonic() + STOP_PART * load_server().grace_seconds
    while child.poll() is None and time.monotonic() < deadline:
        listener.listen()
        time.sleep(_POLL_SECONDS)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None or number == signal.SIGKILL:
            _signal_group(child.pid, number)
        try:
            child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
