"""A training child that is told to stop: it has most of the grace period for its step and its checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from services.common.errors import Cancelled
from services.common.reporter import Silent
from services.training.supervise import run_child
from services.training.swift import Command

CHILD = """
import json, pathlib, time
work = pathlib.Path(".")
work.joinpath("dataset.json").write_text(json.dumps({"train": 1, "max_steps": 9, "step": 0}))
while not work.joinpath("stop").exists():
    time.sleep(0.01)
time.sleep(1)  # the step that was being computed
work.joinpath("saved").touch()
"""


class Stopped(Silent):
    """Is told to stop as soon as training has begun."""

    def log(self, text: str, severity: str = "INFO") -> None:
        """Raise once."""
        if text.startswith("training on"):
            raise Cancelled("the pod is to go")


@pytest.mark.parametrize(("grace", "is_saved"), [("120", True), ("0.4", False)])
def test_a_step_that_is_being_computed_ends_within_the_grace_period_and_not_beyond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grace: str, is_saved: bool
) -> None:
    monkeypatch.setenv("FABRICTUNE_GRACE_SECONDS", grace)
    with pytest.raises(Cancelled):
        run_child(Command([sys.executable, "-c", CHILD]), tmp_path, Stopped())
    assert (tmp_path / "saved").exists() == is_saved
