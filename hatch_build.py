"""Generates fabrictune/v1 from the protos when a wheel is built, so that `pip install git+…` needs no `make proto`."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GenerateApi(BuildHookInterface):  # type: ignore[type-arg]
    """Runs scripts/protos.py in the build's own environment; an editable install leaves it to `make proto`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects files."""
        if version != "editable":
            subprocess.run([sys.executable, "scripts/protos.py", "generate"], cwd=self.root, check=True)
