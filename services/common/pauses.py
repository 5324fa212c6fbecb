"""How long to wait between two looks at what may take a second or a day: each look costs the store requests."""

from __future__ import annotations

from collections.abc import Iterator


def pauses(shortest: float, longest: float, growth: float = 1.2) -> Iterator[float]:
    """Seconds without end: `shortest` first, each `growth` times the one before, `longest` at most."""
    pause = shortest
    while True:
        yield pause
        pause = min(pause * growth, longest)
