"""What bench/conversion.py has found, as a table a data set, and its goals, each with the figure that reaches or misses it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

FASTER, TWICE, MEMORY, FLAT = 1.5, 1.8, 300e6, 1.2
"""Goals: × the script on one core; × ours on two; bytes at most; memory for the most rows ÷ for the fewest, at most."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to convert. spec: what it adds to one source of rows; None is the published script."""

    name: str
    spec: Mapping[str, Any] | None
    layout: str = "inline"
    processes: int = 2
    render_only: bool = False
    """Whether nothing is done but what the script does too."""
    few_only: bool = False
    """Whether it tells nothing new for many rows."""


@dataclass(frozen=True)
class Sample:
    """One round. Bytes; rss, pss and disk are the most at any time.

    cpu: seconds that processors worked. left_out: rows refused, or on which the script crashes.
    """

    seconds: float
    cpu: float
    left_out: int
    written: int
    rss: int
    pss: int
    disk: int


Samples = Mapping[Variant, Sequence[Sample]]
Found = dict[tuple[int, int], Samples]
"""(rows, bytes of a row) → what was measured."""

KEEP = {"duplicates": "keep"}
SCRIPT = Variant("published script", None, processes=1)
RENDER = Variant("ours, parse, check, render", KEEP, processes=1, render_only=True)
RENDER_TWO = Variant("… 2 processes", KEEP, render_only=True)
ONE = Variant("ours, all, 1 process", KEEP, processes=1)
TWO = Variant("ours, all, 2 processes", KEEP)


def show(
    title: str, samples: Samples, count: int, megabytes: float, disk: tuple[float, float], console: Console
) -> None:
    """A table of medians. megabytes: of the rows; disk: MB/s written and read."""
    rounds = len(next(iter(samples.values())))
    table = Table(title=f"{title}, median of {rounds}", title_justify="left", caption_justify="left")
    table.caption = (
        f"{megabytes:.0f} MB of rows; a copy of them on this disk: {disk[0]:.0f} MB/s written, {disk[1]:.0f} MB/s read. "
        "Memory: of all processes together, at most; RSS counts shared pages once for each process, PSS once for all"
    )
    speed = ("", "s", "rows/s", "MB/s in", "MB/s out", "× script", "CPU s", "× script")
    for column in (*speed, "left out", "RSS MB", "PSS MB", "disk MB"):
        table.add_column(column, justify="left" if not column else "right")
    for variant, rows in samples.items():
        seconds, cpu = _median(rows), _cpu(rows)
        most = (max(values) / 1e6 for values in zip(*((s.rss, s.pss, s.disk) for s in rows), strict=True))
        table.add_row(
            variant.name,
            f"{seconds:.2f}",
            f"{count / seconds:,.0f}",
            f"{megabytes / seconds:.0f}",
            f"{rows[-1].written / 1e6 / seconds:.0f}",
            f"{_median(samples[SCRIPT]) / seconds:.2f}" if SCRIPT in samples else "-",
            f"{cpu:.2f}",
            f"{_cpu(samples[SCRIPT]) / cpu:.2f}" if SCRIPT in samples else "-",
            f"{rows[-1].left_out:,}",
            *(f"{value:,.0f}" for value in most),
        )
    console.print(table)


def judge(found: Found, sizes: Sequence[int], many: int, console: Console) -> None:
    """Each goal: PASS, MISS, or that this run cannot tell. many: the rows that memory is to be flat up to."""
    for what, value, goal, reached in (*_goals(found), *_flat(found, sizes, many)):
        verdict = "not measured in this run" if reached is None else "PASS" if reached else "MISS"
        figure = "" if reached is None else f" {value:.2f}"
        console.print(f"{verdict}: {what}{figure} (goal {goal})", highlight=False)


Goal = tuple[str, float, str, bool | None]
"""(what, value, goal, whether it is reached; None: not measured)"""


def _goals(found: Found) -> Iterator[Goal]:
    for (count, size), samples in found.items():
        where = f"{count:,} rows of {size} bytes"
        pairs = (
            ("parse, check and render ÷ script", SCRIPT, RENDER, FASTER),
            ("parse, check and render, 2 processes ÷ 1", RENDER, RENDER_TWO, TWICE),
            ("all of it, 1 process, ÷ script", SCRIPT, ONE, FASTER),
            ("all of it, 2 processes ÷ 1", ONE, TWO, TWICE),
        )
        for what, slow, fast, goal in pairs:
            both = slow in samples and fast in samples
            ratio = _median(samples[slow]) / _median(samples[fast]) if both else 0.0
            yield f"{where}: speed of {what}", ratio, f"≥ {goal}", ratio >= goal if both else None
        peak = max(_peak(rows) for variant, rows in samples.items() if variant is not SCRIPT)
        yield f"{where}: GB of RSS at most", peak / 1e9, f"≤ {MEMORY / 1e9}", peak <= MEMORY


def _flat(found: Found, sizes: Sequence[int], many: int) -> Iterator[Goal]:
    fewest, most = min(found)[0], max(found)[0]
    for size in sizes:
        first, last = found[fewest, size], found[most, size]
        growth = max(_peak(last[v]) / _peak(first[v]) for v in last if v is not SCRIPT)
        told = f"RSS for {many if most == fewest else most:,} rows of {size} bytes ÷ for {fewest:,}"
        yield told, growth, f"≤ {FLAT}", growth <= FLAT if most > fewest else None


def _median(samples: Sequence[Sample]) -> float:
    return statistics.median(s.seconds for s in samples)


def _cpu(samples: Sequence[Sample]) -> float:
    return statistics.median(s.cpu for s in samples)


def _peak(samples: Sequence[Sample]) -> int:
    return max(s.rss for s in samples)
