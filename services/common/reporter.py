"""What a stage says while it works: progress, log lines, checkpoints.

Engines get a Reporter and know nothing of where its words go: to a terminal, to the object store, or nowhere.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Progress:
    """How far a stage is; the Python form of fabrictune.v1.Progress. None: not known, or not meant for this stage."""

    unit: str
    """What `step` counts: "rows", "steps", "tensors", "prompts"."""
    step: int
    total_steps: int = 0
    """0 while it is unknown."""
    phase: str = ""
    """What is done now: "training", "uploading", …"""
    epoch: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    token_accuracy: float | None = None
    """0..1"""
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    memory_bytes: int | None = None
    """At most so far: resident memory on a CPU, what the allocator has taken on a GPU."""
    eta_seconds: float | None = None


class Reporter(Protocol):
    """Where a stage reports to. Every method is cheap and may be called often."""

    def progress(self, progress: Progress) -> None:
        """The stage has come so far."""

    def log(self, text: str, severity: str = "INFO") -> None:
        """A line for people. severity: DEBUG, INFO, WARNING or ERROR."""

    def checkpoint(self, step: int, folder: Path) -> None:
        """`folder` holds a complete checkpoint; keep it where it outlives this process."""


class Silent:
    """A Reporter that drops every word."""

    def progress(self, progress: Progress) -> None:
        """Drop it."""

    def log(self, text: str, severity: str = "INFO") -> None:
        """Drop it."""

    def checkpoint(self, step: int, folder: Path) -> None:
        """Drop it."""


class Aside(Silent):
    """A Reporter of a further node of a job, whose first node reports: its lines go where the cluster keeps a process's words."""

    def log(self, text: str, severity: str = "INFO") -> None:
        """Print it on stderr."""
        print(f"{severity} {text}", file=sys.stderr, flush=True)
