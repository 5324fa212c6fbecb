"""Conversion of generated ms_agent rows (bench/rows.py), beside the recipe's published script: speed, memory, the disk.

30,000 rows of 2,300 and of 3,300 bytes (BENCH_SIZES); `python -m bench.conversion --full`, or BENCH_ROWS=3000000, adds a
round of so many of the script, of ours, and of ours with everything on. The script is not ours to give:
FABRICTUNE_BASELINE_CONVERTER names it, else ../shared/baseline/published_converter.py beside the clone is taken, else ours
is measured alone. BENCH_TOKENIZER names a model's folder, for token lengths.

The script reads the prompt with expressions, checks nothing and leaves the turns as they are. "parse, check, render" is what
ours does of that, one row after the other; "all" writes tools.jsonl as well, in a seeded order, split by tool, with a report.
rows/s counts all rows given, those that either leaves out too. "CPU s" are those that processors worked: on a machine that
others use too they tell more than the clock.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from bench.conversion_table import KEEP, ONE, RENDER, RENDER_TWO, SCRIPT, TWO, Found, Sample, Variant, judge, show
from bench.measure import ROOT
from bench.processes import python, watch
from bench.rows import write_rows

SIZES = tuple(map(int, os.environ.get("BENCH_SIZES", "2300 3300").split()))
FEW, MANY = 30_000, 3_000_000
ROUNDS = 3
"""Of the few rows; many are converted once."""

EXACT, NEAR = ({"duplicates": how} for how in ("exact", "near"))
VARIANTS = (
    SCRIPT,
    RENDER,
    RENDER_TWO,
    ONE,
    TWO,
    Variant("… layout split", KEEP, "split", few_only=True),
    Variant("… layouts split and inline", KEEP, "both", few_only=True),
    Variant("… exact duplicates removed", EXACT, few_only=True),
    Variant("… near duplicates removed", NEAR, few_only=True),
)


def run() -> bool:
    """Measure, and print which goals are reached."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    variants, counts = list(_choose_variants(console)), _counts()
    found: Found = {}
    with tempfile.TemporaryDirectory(prefix="fabrictune-bench-") as scratch:
        folder = Path(scratch)
        for count in counts:
            for size in SIZES:
                rows = folder / "rows.jsonl"
                megabytes = write_rows(count, size, rows, half_lines=False) / 1e6
                disk = _measure_disk(rows, folder / "copy")
                earlier = found.get((counts[0], size), {})
                asked = [v for v in variants if count <= FEW or not v.few_only]
                fitting = [v for v in asked if _fits(v, earlier.get(v, ()), count / counts[0], folder, console)]
                found[count, size] = _measure(fitting, rows, folder, ROUNDS if count <= FEW else 1)
                show(f"{count:,} rows of {size} bytes", found[count, size], count, megabytes, disk, console)
    judge(found, SIZES, MANY, console)
    return True


def _counts() -> list[int]:
    wanted = MANY if "--full" in sys.argv else int(os.environ.get("BENCH_ROWS", FEW))
    return sorted({min(FEW, wanted), wanted})


def _choose_variants(console: Console) -> Iterator[Variant]:
    script, tokenizer = _find_script(), os.environ.get("BENCH_TOKENIZER", "")
    everything = {**NEAR, "tokenizer": tokenizer} if tokenizer else NEAR
    for variant in VARIANTS:
        if variant.spec is not None or script is not None:
            yield variant
        else:
            console.print(
                "the published script is not there (FABRICTUNE_BASELINE_CONVERTER names it): ours is measured alone"
            )
    if tokenizer:
        yield Variant("… token lengths", {**KEEP, "tokenizer": tokenizer}, few_only=True)
    else:
        console.print("token lengths are not measured: BENCH_TOKENIZER names no model's folder")
    yield Variant("… everything on" if tokenizer else "… everything but token lengths", everything, "both")


def _find_script() -> Path | None:
    told = os.environ.get("FABRICTUNE_BASELINE_CONVERTER")
    script = Path(told) if told else ROOT.parent / "shared" / "baseline" / "published_converter.py"
    return script if script.is_file() else None


def _fits(variant: Variant, few: Sequence[Sample], times: float, folder: Path, console: Console) -> bool:
    """Whether the disk has room for it, by what so many fewer rows took."""
    needed, free = times * max((s.disk for s in few), default=0), shutil.disk_usage(folder).free
    if needed * 1.1 > free:
        console.print(
            f"{variant.name!r} needs about {needed / 1e9:.0f} GB of disk, {free / 1e9:.0f} are free: left out"
        )
    return needed * 1.1 <= free


def _measure(variants: Sequence[Variant], rows: Path, folder: Path, rounds: int) -> dict[Variant, list[Sample]]:
    found: dict[Variant, list[Sample]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, samples in found.items():
            os.sync()  # so that no round pays for what another has written
            samples.append(_convert(variant, rows, folder))
    return found


def _convert(variant: Variant, rows: Path, folder: Path) -> Sample:
    output = folder / "out"
    argv = python("-m", "bench.conversion_once", str(rows), str(output), "--processes", str(variant.processes))
    if variant.spec is None:
        argv += ["--script", str(_find_script())]
    else:
        argv += ["--render-only"] * variant.render_only
        argv += ["--spec", json.dumps({"sources": [{"uri": str(rows), "layout": variant.layout}], **variant.spec})]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    try:
        watched = watch(argv, env, folder)
        written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    finally:
        shutil.rmtree(output, ignore_errors=True)
    told = json.loads(watched.output.splitlines()[-1])
    return Sample(told["seconds"], told["cpu"], told["left_out"], written, watched.rss, watched.pss, watched.disk)


def _measure_disk(rows: Path, copy: Path) -> tuple[float, float]:
    """MB/s of this disk with the same bytes, one after the other: (written and synced, read past the page cache)."""
    megabytes = rows.stat().st_size / 1e6
    os.sync()
    begin = time.perf_counter()
    with rows.open("rb") as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())
    written = time.perf_counter() - begin
    with copy.open("rb") as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        while source.read(1 << 20):
            pass
        read = time.perf_counter() - begin
    copy.unlink()
    return megabytes / written, megabytes / read


if __name__ == "__main__":
    sys.exit(not run())
