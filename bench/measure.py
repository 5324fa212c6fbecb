"""Measures a function in a fresh Python process, or a command: seconds and peak resident memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
_CHILD = """
import importlib, json, resource, sys, time
module, name, *arguments = json.loads(sys.argv[1])
call = getattr(importlib.import_module(module), name)
begin = time.perf_counter()
call(*arguments)
seconds = time.perf_counter() - begin
print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


@dataclass(frozen=True)
class Sample:
    """One round. peak: bytes of resident memory at most."""

    seconds: float
    peak: int


def call(module: str, name: str, *arguments: str, env: Mapping[str, str] | None = None) -> Sample:
    """Time module.name(*arguments) in a process of its own; imports are not counted."""
    argv = [sys.executable, "-c", _CHILD, json.dumps([module, name, *arguments])]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    return Sample(told["seconds"], told["peak"])


def command(argv: Sequence[str], env: Mapping[str, str]) -> Sample:
    """Time a command, its start included."""
    with tempfile.TemporaryFile() as error:
        begin = time.perf_counter()
        process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=error)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            error.seek(0)
            raise RuntimeError(f"{argv[0]} failed: {error.read().decode(errors='replace')[-500:]}")
    return Sample(seconds, usage.ru_maxrss * 1024)


def show(title: str, rows: Mapping[str, Sequence[Sample]], baseline: str, megabytes: float, note: str) -> None:
    """A table of medians; speed as a part of the baseline's."""
    table = Table(title=title, title_justify="left", caption=note, caption_justify="left")
    for column in ("", "seconds", "MB/s", "speed / baseline", "peak MB"):
        table.add_column(column, justify="left" if not column else "right")
    reference = statistics.median(s.seconds for s in rows[baseline])
    for name, samples in rows.items():
        seconds = statistics.median(s.seconds for s in samples)
        peak = max(s.peak for s in samples) / 1e6
        ratio = "1 (baseline)" if name == baseline else f"{reference / seconds:.2f}"
        table.add_row(name, f"{seconds:.2f}", f"{megabytes / seconds:.0f}", ratio, f"{peak:.0f}")
    Console().print(table)
