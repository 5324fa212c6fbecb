"""95 % intervals by bootstrap: of a proportion, of a mean, and of what changed on the same rows.

Source: Efron 1979, percentile method. A resample's number of successes is binomial, so a proportion's percentiles are computed,
not drawn. Where all rows agree, every resample is the same and the bootstrap knows nothing; Wilson's score interval (Wilson
1927) stands in there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Z95 = 1.959963984540054
RESAMPLES = 1000
SEED = 20230905
LOW, HIGH = 0.025, 0.975


class Estimate(Protocol):
    """A metric's value over some rows."""

    @property
    def n(self) -> int:
        """Rows that it applies to; 0: nothing to measure, and the value means nothing."""

    @property
    def value(self) -> float:
        """From 0 to 1."""

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high end of the 95 % interval."""


@dataclass(frozen=True)
class Proportion:
    """k of n."""

    k: int
    n: int

    @property
    def value(self) -> float:
        """K / n; 0 without rows."""
        return self.k / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Percentiles of a binomial with the same value; Wilson's interval at 0 of n and n of n."""
        if not self.n:
            return 0.0, 1.0
        if self.k in (0, self.n):
            return wilson_interval(self.k, self.n)
        low, high = _binomial_percentiles(self.n, self.value)
        return low / self.n, high / self.n


@dataclass(frozen=True)
class Mean:
    """The mean of values from 0 to 1, one a row."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """Rows."""
        return len(self.values)

    @property
    def value(self) -> float:
        """The mean; 0 without rows."""
        return math.fsum(self.values) / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Percentiles of the means of resampled rows."""
        if not self.n:
            return 0.0, 1.0
        low, high = _mean_percentiles(self.values)
        return max(0.0, low), min(1.0, high)


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """The score interval without continuity correction. Source: Wilson 1927. n > 0."""
    p, z = k / n, Z95
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def difference_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of differences on the same rows, after minus before; rows are resampled as pairs. (0, 0, 0) without."""
    if not differences:
        return 0.0, 0.0, 0.0
    mean = math.fsum(differences) / len(differences)
    low, high = _mean_percentiles(differences)
    return mean, max(-1.0, low), min(1.0, high)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p95 by nearest rank, so that each is a value that was measured; 0 without values."""
    ordered = sorted(values)
    return {
        name: round(ordered[max(0, math.ceil(part * len(ordered)) - 1)], 4) if ordered else 0.0
        for name, part in (("p50", 0.5), ("p95", 0.95))
    }


def _mean_percentiles(values: Sequence[float]) -> tuple[float, float]:
    n = len(values)
    if len(set(values)) == 1:
        half = wilson_interval(0, n)[1]
        return values[0] - half, values[0] + half
    draw = random.Random(SEED)
    means = sorted(math.fsum(draw.choices(values, k=n)) / n for _ in range(RESAMPLES))
    return means[round(LOW * RESAMPLES)], means[round(HIGH * RESAMPLES) - 1]


def _binomial_percentiles(n: int, p: float) -> tuple[int, int]:
    """Smallest successes whose cumulative probability reaches 2.5 % and 97.5 %. 0 < p < 1."""
    below, low, wanted = 0.0, -1, LOW
    for k in range(n + 1):
        log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        below += math.exp(log + k * math.log(p) + (n - k) * math.log1p(-p))
        if below >= wanted:
            if low < 0:
                low, wanted = k, HIGH
            if below >= HIGH:
                return low, k
    return max(low, 0), n
