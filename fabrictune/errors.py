"""What a server says when it refuses: the message, a reason for programs, and every bad field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(eq=False)
class ApiError(Exception):
    """An RPC was refused, or a job has failed."""

    message: str
    code: str = "UNKNOWN"
    """A google.rpc.Code, such as "NOT_FOUND"."""
    reason: str = ""
    """ErrorInfo.reason, such as "REQUEST_ID_REUSED"; domain fabrictune.dev."""
    violations: Sequence[tuple[str, str]] = ()
    """(field, what is wrong) for bad input."""

    def __post_init__(self) -> None:
        super().__init__(self.message)

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  {field}: {text}" for field, text in self.violations)])
