"""From pydantic's findings to field violations: the same paths and words for specs, settings and files."""

from __future__ import annotations

from pydantic import ValidationError

from services.common.errors import Violation


def violations_of(error: ValidationError, prefix: str) -> list[Violation]:
    """Field violations at `prefix.a[0].b`."""
    found = []
    for item in error.errors():
        path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in item["loc"])
        found.append(Violation(f"{prefix}{path}".removeprefix("."), item["msg"].removeprefix("Value error, ")))
    return found
