"""A listener of stages that run on folders; it keeps nothing."""

from __future__ import annotations

from typing import Any


class Quiet:
    """Drops every word."""

    def progress(self, progress: Any) -> None:
        """Drop it."""

    def log(self, line: Any) -> None:
        """Drop it."""
