"""Watches a command and all processes below it: how much memory they hold together, and how much disk they fill.

Resident memory (RSS) counts a page once for each process that maps it; the proportional share (PSS) counts it once for all.
/proc is read as it is: psutil asks every process of the machine for its parent, which costs as much as what is measured.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

EVERY, SELDOM = 0.05, 10
"""Seconds between two looks at RSS; every tenth look is at PSS and the disk too (the kernel walks all pages for PSS)."""
_PROC = Path("/proc")
_PSS = re.compile(rb"^Pss:\s+(\d+) kB", re.MULTILINE)


@dataclass(frozen=True)
class Watched:
    """Bytes at most, of all processes together. disk: what was added to the folder, files that were removed again too."""

    output: str
    rss: int
    pss: int
    disk: int


def watch(argv: Sequence[str], env: Mapping[str, str], folder: Path) -> Watched:
    """Run a command in the folder. Raises RuntimeError with the end of what it said when it fails."""
    rss = pss = looks = 0
    before = disk = _size(folder)
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as error:
        process = subprocess.Popen(argv, env=env, cwd=folder, stdout=output, stderr=error)
        while process.poll() is None:
            family = list(_family(process.pid))
            rss = max(rss, sum(map(_rss, family)))
            if looks % SELDOM == 1:
                pss = max(pss, sum(map(_pss, family)))
                disk = max(disk, _size(folder))
            looks += 1
            time.sleep(EVERY)
        said = []
        for file in (output, error):
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
    if process.returncode:
        raise RuntimeError(f"{' '.join(argv[:6])} … exits {process.returncode}: {said[1][-1500:]}")
    return Watched(said[0], rss, pss, max(disk, _size(folder)) - before)


def python(*arguments: str) -> list[str]:
    """A command of this Python."""
    return [sys.executable, *arguments]


def _family(pid: int) -> Iterator[int]:
    """A process and all below it; one that has just ended is left out."""
    yield pid
    try:
        told = [(task / "children").read_text() for task in (_PROC / str(pid) / "task").iterdir()]
    except OSError:
        return
    for child in " ".join(told).split():
        yield from _family(int(child))


def _size(folder: Path) -> int:
    """Bytes of the files below; those that vanish meanwhile do not count."""
    size = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            size += file.lstat().st_size
    return size


def _rss(pid: int) -> int:
    try:
        return int((_PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


def _pss(pid: int) -> int:
    try:
        found = _PSS.search((_PROC / str(pid) / "smaps_rollup").read_bytes())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
