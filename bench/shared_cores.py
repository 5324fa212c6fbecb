"""Two programs of torch on the same cores: with services.common.programs.SHARED_CORES, and as GNU OpenMP has it (the baseline).

If one keeps all cores busy, side by side each takes as many times as long as there are programs; less if it does not.
"""

from __future__ import annotations

import os
import statistics
from concurrent.futures import ThreadPoolExecutor

import torch  # here, for `call` counts no imports
from rich.console import Console
from rich.table import Table

from bench.measure import call
from services.common.programs import SHARED_CORES

LAYERS, WIDTH, INNER, TOKENS, STEPS = 30, 576, 1536, 64, 12
"""SmolLM2-135M's feed-forward layers, and as many tokens as an engine's busy step or a short row."""
PROGRAMS, ROUNDS = 2, 5


def compute() -> None:
    """Steps forward and backward."""
    pairs = ((torch.nn.Linear(WIDTH, INNER), torch.nn.GELU(), torch.nn.Linear(INNER, WIDTH)) for _ in range(LAYERS))
    model = torch.nn.Sequential(*(layer for pair in pairs for layer in pair))
    tokens = torch.randn(TOKENS, WIDTH)
    for _ in range(STEPS):
        model(tokens).square().mean().backward()


def run() -> bool:
    """Alone and side by side, each way in turn."""
    plain = {name: value for name, value in os.environ.items() if name not in SHARED_CORES}
    ways = {"as GNU OpenMP has it": plain, "ours": plain | SHARED_CORES}
    took: dict[tuple[str, int], list[float]] = {(way, number): [] for way in ways for number in (1, PROGRAMS)}
    for _ in range(ROUNDS):
        for (way, number), seconds in took.items():
            with ThreadPoolExecutor(number) as pool:
                calls = [pool.submit(call, __name__, "compute", env=ways[way]) for _ in range(number)]
                seconds.append(statistics.mean(c.result().seconds for c in calls))
    table = Table(title=f"{STEPS} steps, {len(os.sched_getaffinity(0))} cores", title_justify="left")
    for column in ("", "alone", f"{PROGRAMS} side by side", "as many times as long", "all cores busy"):
        table.add_column(column, justify="right" if column else "left")
    for way in ways:
        alone, beside = (statistics.median(took[way, number]) for number in (1, PROGRAMS))
        table.add_row(way, f"{alone:.2f} s", f"{beside:.2f} s", f"{beside / alone:.2f}", str(PROGRAMS))
    Console().print(table)
    return True
