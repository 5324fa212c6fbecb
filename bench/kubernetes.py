"""A thousand jobs through gRPC on a cluster: how long Create, Get and List take, and what the server needs.

Run it in a folder where `fabrictune connect` runs, after a conversion has made `datasets/e2e` (or name another with
BENCH_ROWS). BENCH_JOBS is their number (1000), BENCH_THREADS that of clients (8), BENCH_NAMESPACE the release's namespace
(to read the server's memory). For nodes that only pretend (kwok) give the conversion's Jobs their selector and toleration
in the release's values. The port-forward of `connect` is part of what is measured; FABRICTUNE_ENDPOINT names another way in.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.table import Table

from fabrictune.client import Client
from fabrictune.v1 import job_pb2

THREADS = int(os.environ.get("BENCH_THREADS", "8"))
LONGEST = 900.0


def run() -> bool:
    """Create, watch and count; False when a job was lost, doubled, or ended as nothing."""
    wanted, rows = int(os.environ.get("BENCH_JOBS", "1000")), os.environ.get("BENCH_ROWS", "datasets/rows-e2e")
    mark = f"b{int(time.time()) % 100000}"
    with Client() as client:
        spec = {"sources": [{"uri": rows}]}

        def create(number: int) -> float:
            begin = time.perf_counter()
            client.conversion.create(spec, job_id=f"{mark}-{number:04d}")
            return time.perf_counter() - begin

        begin = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            creates = sorted(pool.map(create, range(wanted)))
        created = time.perf_counter() - begin
        lists, pages, states = list[float](), list[float](), Counter[str]()
        deadline = time.monotonic() + LONGEST
        while time.monotonic() < deadline:
            clock = time.perf_counter()
            jobs = [j for j in client.conversion.list() if f"/{mark}-" in j.name]
            lists.append(time.perf_counter() - clock)
            clock = time.perf_counter()
            list(itertools.islice(client.conversion.list(), 50))
            pages.append(time.perf_counter() - clock)
            states = Counter(job_pb2.Execution.State.Name(j.execution.state) for j in jobs)
            if states["SUCCEEDED"] + states["FAILED"] >= wanted:
                break
            time.sleep(2)
        clock = time.perf_counter()
        next(iter(client.conversion.watch(f"conversionJobs/{mark}-0000")))
        watched = time.perf_counter() - clock
    _show(wanted, created, creates, pages, lists, watched, states)
    return sum(states.values()) == wanted == states["SUCCEEDED"] + states["FAILED"]


def _show(
    wanted: int,
    created: float,
    creates: list[float],
    pages: list[float],
    lists: list[float],
    watched: float,
    states: Counter[str],
) -> None:
    table = Table(title=f"{wanted} jobs, {THREADS} at a time", title_justify="left")
    for column in ("", "median", "p99", "longest"):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in (
        ("Create", creates),
        ("List, a page of 50", sorted(pages)),
        (f"List of all ({wanted}+)", sorted(lists)),
    ):
        p99 = values[min(int(0.99 * len(values)), len(values) - 1)]
        table.add_row(name, *(f"{1000 * v:.0f} ms" for v in (statistics.median(values), p99, values[-1])))
    table.add_row("Watch, first event", f"{1000 * watched:.0f} ms", "", "")
    console = Console()
    console.print(table)
    console.print(f"created in {created:.1f} s; states at the end: {dict(states)}; server memory: {_server_memory()}")


def _server_memory() -> str:
    namespace = os.environ.get("BENCH_NAMESPACE", "")
    if not namespace:
        return "not read (BENCH_NAMESPACE is not set)"
    argv: list[Any] = [
        "kubectl",
        "-n",
        namespace,
        "exec",
        "deploy/fabrictune-conversion",
        "--",
        "cat",
        "/proc/1/status",
    ]
    status = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return f"now {lines.get('VmRSS', '?').strip()}, at most {lines.get('VmHWM', '?').strip()}"
