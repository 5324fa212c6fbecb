"""`fabrictune train --output` beside bare `swift sft` with the same argv: wall time. Goal: at most 1.02 x + 5 s."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.measure import ROOT
from bench.tiny_models import Shape, make_model, make_rows

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "2"))
SHAPE = Shape(hidden=384, layers=8, intermediate=1024, vocabulary=8192)
ARGUMENTS: dict[str, Any] = {
    "max_steps": 40, "max_length": 512, "effective_batch_size": 4, "per_device_train_batch_size": 4, "save_steps": 20,
    "target_regex": r".*_proj",
}  # fmt: skip


def run() -> bool:
    """Measure both in turn; True: within the goal."""
    with tempfile.TemporaryDirectory(prefix="fabrictune-bench-") as scratch:
        folder = Path(scratch)
        make_model(folder / "model", SHAPE)
        make_rows(folder / "rows", [400] * 64)
        seconds: dict[str, list[float]] = {"swift sft": [], "fabrictune train": []}
        for number in range(ROUNDS):
            seconds["swift sft"].append(_time_bare(folder, folder / f"bare-{number}"))
            seconds["fabrictune train"].append(_time_ours(folder, folder / f"ours-{number}"))
    bare, ours = (statistics.median(found) for found in seconds.values())
    table = Table(
        title=f"training, {ARGUMENTS['max_steps']} steps of 4 x 400 tokens, median of {ROUNDS}", title_justify="left"
    )
    for column in ("", "seconds", "all rounds"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in seconds.items():
        table.add_row(name, f"{statistics.median(found):.1f}", " ".join(f"{s:.1f}" for s in found))
    Console().print(table)
    goal = 1.02 * bare + 5
    print(f"goal: at most 1.02 x {bare:.1f} + 5 = {goal:.1f} s; {'met' if ours <= goal else 'missed'}")
    return ours <= goal


def _time_bare(folder: Path, work: Path) -> float:
    """The plan of the same spec, run as a shell would run it."""
    from services.training.admission import hardware_here
    from services.training.presets import load_preset
    from services.training.spec import Spec
    from services.training.swift import Family, Paths, plan_sft

    work.mkdir()
    shutil.copyfile(folder / "rows" / "train.jsonl", work / "train.jsonl")
    names = {"dataset": "datasets/d", "base_model": "models/m", "preset": "smollm2-cpu"}
    spec = Spec.model_validate({**names, "arguments": ARGUMENTS})
    paths = Paths(folder / "model", work)
    command = plan_sft(spec, load_preset(spec.preset), paths, hardware_here(spec), Family("llama", "chatml"))
    return _time(command.argv, {**os.environ, **command.env}, work)


def _time_ours(folder: Path, work: Path) -> float:
    work.mkdir()
    settings = [word for key, value in ARGUMENTS.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    argv = [sys.executable, "-m", "fabrictune", "train", str(folder / "rows"), "--model", str(folder / "model")]
    argv += ["--preset", "smollm2-cpu", *settings, "--output", str(work / "adapter")]
    return _time(argv, {**os.environ, "PYTHONPATH": str(ROOT)}, work)


def _time(argv: list[str], env: dict[str, str], folder: Path) -> float:
    begin = time.perf_counter()
    with (folder / "log").open("wb") as log:
        done = subprocess.run(argv, env=env, cwd=folder, stdout=log, stderr=log, check=False)
    if done.returncode:
        raise RuntimeError(f"{argv[:6]} … exits {done.returncode}: {(folder / 'log').read_text()[-1500:]}")
    return time.perf_counter() - begin
