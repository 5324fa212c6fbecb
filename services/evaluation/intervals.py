"""95 % intervals by bootstrap: of a proportion, of a mean, and of what changed on the same rows.

Source: Efron 1979, percentile method. Rows are resampled; where a row is several steps, all of them with it, for they hang
together. A resample's number of successes is binomial where each row is one, so a proportion's percentiles are computed then,
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
    rows: tuple[tuple[float, ...], ...] = ()
    """The steps of each row, where one has several; () when each is one."""

    @property
    def value(self) -> float:
        """K / n; 0 without rows."""
        return self.k / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Percentiles of a binomial with the same value, or of resampled rows; Wilson's interval at 0 of n and n of n."""
        if not self.n:
            return 0.0, 1.0
        if self.rows:
            return _inside(_mean_percentiles(self.rows))
        if self.k in (0, self.n):
            return wilson_interval(self.k, self.n)
        low, high = _binomial_percentiles(self.n, self.value)
        return low / self.n, high / self.n


@dataclass(frozen=True)
class Mean:
    """The mean of values from 0 to 1."""

    values: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...] = ()
    """The same by row, where one has several; () when each has one."""

    @property
    def n(self) -> int:
        """Values."""
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
        return _inside(_mean_percentiles(self.rows or [(value,) for value in self.values]))


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """The score interval without continuity correction. Source: Wilson 1927. n > 0."""
    p, z = k / n, Z95
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def difference_interval(rows: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """(mean, low, high) of differences on the same rows, after minus before; rows are resampled as pairs. (0, 0, 0) without.

    rows: the differences of each row's steps.
    """
    if not rows:
        return 0.0, 0.0, 0.0
    mean = math.fsum(d for row in rows for d in row) / sum(map(len, rows))
    low, high = _mean_percentiles(rows)
    return mean, max(-1.0, low), min(1.0, high)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p95 by nearest rank, so that each is a value that was measured; 0 without values."""
    ordered = sorted(values)
    return {
        name: round(ordered[max(0, math.ceil(part * len(ordered)) - 1)], 4) if ordered else 0.0
        for name, part in (("p50", 0.5), ("p95", 0.95))
    }


def _inside(interval: tuple[float, float]) -> tuple[float, float]:
    return max(0.0, interval[0]), min(1.0, interval[1])


def _mean_percentiles(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Of the mean over all steps of resampled rows."""
    n, sums = len(rows), [(math.fsum(row), len(row)) for row in rows]
    same, *others = {total / steps for total, steps in sums}
    if not others:
        half = wilson_interval(0, n)[1]
        return same - half, same + half
    draw = random.Random(SEED)
    drawn = (draw.choices(sums, k=n) for _ in range(RESAMPLES))
    means = sorted(math.fsum(total for total, _ in each) / sum(steps for _, steps in each) for each in drawn)
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
