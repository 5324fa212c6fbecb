"""How a revision's answers went, lately: what a canary is judged by, and what Prometheus sees. Counters, no HTTP."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from prometheus_client import Counter, Histogram

from services.common.metrics import REGISTRY

KEPT = 4096
"""Answers of a revision that are remembered; a step of a canary with more is judged by its latest."""
PATIENCE_SECONDS = 1.0
"""A client that goes away sooner says nothing of the engine."""

first_byte_seconds = Histogram(
    "fabrictune_gateway_first_byte_seconds",
    "From the request to the first byte of its answer",
    ["deployment", "revision"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
    registry=REGISTRY,
)
failures_total = Counter(
    "fabrictune_gateway_failures_total",
    "Answers that failed: HTTP 5xx of the engine, or it was lost",
    ["deployment", "revision"],
    registry=REGISTRY,
)


@dataclass(frozen=True)
class Figures:
    """Of some answers. p95: seconds to the first byte."""

    answers: int = 0
    failures: int = 0
    p95: float = 0.0

    @property
    def error_rate(self) -> float:
        """Part of the answers that failed."""
        return self.failures / self.answers if self.answers else 0.0


class Outcomes:
    """Of all revisions. Not for several threads."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], deque[tuple[float, bool]]] = {}

    def note(self, deployment: str, revision: str, seconds: float, failed: bool) -> None:
        """An answer has ended. seconds: to its first byte, or to its failure."""
        self._kept.setdefault((deployment, revision), deque(maxlen=KEPT)).append((seconds, failed))
        first_byte_seconds.labels(deployment, revision).observe(seconds)
        if failed:
            failures_total.labels(deployment, revision).inc()

    def abandon(self, deployment: str, revision: str, seconds: float) -> None:
        """A client went away before the first byte, which would have taken at least so long."""
        if seconds >= PATIENCE_SECONDS:
            self.note(deployment, revision, seconds, failed=False)

    def figures(self, deployment: str, *revisions: str) -> Figures:
        """Of some revisions together, since `forget`."""
        kept = [outcome for r in revisions for outcome in self._kept.get((deployment, r), ())]
        times = sorted(seconds for seconds, failed in kept if not failed)
        return Figures(len(kept), sum(failed for _, failed in kept), percentile(times, 0.95))

    def forget(self, deployment: str) -> None:
        """Begin anew."""
        for key in [k for k in self._kept if k[0] == deployment]:
            del self._kept[key]


def percentile(ordered: list[float], part: float) -> float:
    """The nearest-rank percentile of values in order; 0 when there are none."""
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else 0.0
