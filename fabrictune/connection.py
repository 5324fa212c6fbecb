"""Where the server is: what the user, the `fabrictune connect` or the `fabrictune up` of this folder says."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEFAULT_ENDPOINT = "127.0.0.1:8470"


def find_endpoint() -> str:
    """FABRICTUNE_ENDPOINT, else that of the `fabrictune connect` or `up` of this folder, else the default."""
    named = os.environ.get("FABRICTUNE_ENDPOINT", "")
    return named or str((read_connection() or read_up_file()).get("endpoint", DEFAULT_ENDPOINT))


def read_up_file(data_dir: Path | None = None) -> dict[str, Any]:
    """What a running `fabrictune up` says of itself: {pid, endpoint, gateway, metrics, s3}; {} when there is none."""
    return _read(data_dir, "up.json")


def read_connection(data_dir: Path | None = None) -> dict[str, Any]:
    """What the `fabrictune connect` of this folder says while it runs; else {}.

    {pid, started, endpoint, gateway, ca_file, token, s3: {host:port as the store's addresses have it: host:port here}}
    """
    said = _read(data_dir, "connection.json")
    return said if is_alive(said) else {}


def is_alive(said: Mapping[str, Any]) -> bool:
    """Whether the process that wrote {pid, started} runs. Its start tells it from a later one with the same number."""
    ticks = start_ticks(int(said["pid"])) if "pid" in said else None
    return ticks is not None and ticks == said.get("started")


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when it has gone. Without /proc (macOS): 0 while it runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return 0


def _read(data_dir: Path | None, name: str) -> dict[str, Any]:
    folder = data_dir or Path(os.environ.get("FABRICTUNE_DATA_DIR", ".fabrictune"))
    try:
        return dict(json.loads((folder / name).read_text()))
    except (OSError, ValueError):
        return {}
