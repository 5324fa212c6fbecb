"""What the local cluster writes down of a workload, so that the next process finds its children, and what workers leave."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.rpc import status_pb2

from services.common.clusters import Phase, Workload, WorkloadStatus


@dataclass
class Entry:
    """One workload in the journal."""

    workload: Workload
    phase: Phase = Phase.PENDING
    attempt: int = 0
    pid: int = 0
    started: int = 0
    exit_code: int | None = None
    port: int = 0
    create_time: float = 0
    start_time: float = 0
    end_time: float = 0
    not_before: float = 0
    stop_time: float = 0
    message: str = ""
    error: dict[str, Any] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None


def status_of(entry: Entry) -> WorkloadStatus:
    """The entry as the Cluster protocol tells it."""
    work = entry.workload
    return WorkloadStatus(
        name=work.name,
        kind=work.kind,
        digest=work.digest,
        phase=entry.phase,
        attempt=max(entry.attempt, 1),
        message=entry.message,
        error=json_format.ParseDict(entry.error, status_pb2.Status()) if entry.error else None,
        address=f"http://127.0.0.1:{entry.port}" if entry.port and entry.phase is Phase.RUNNING else "",
        start_time=datetime.fromtimestamp(entry.start_time, UTC) if entry.start_time else None,
        end_time=datetime.fromtimestamp(entry.end_time, UTC) if entry.end_time else None,
        stopping=bool(entry.stop_time),
    )


def workload_to_json(workload: Workload) -> dict[str, Any]:
    """A workload as plain JSON."""
    plain = asdict(replace(workload, env=dict(workload.env), labels=dict(workload.labels)))
    plain["argv"] = list(workload.argv)
    return plain


def read_entry(file: Path) -> Entry | None:
    """An entry from its file; None when it cannot be read."""
    try:
        record = json.loads(file.read_text())
        work = record.pop("workload")
        work["argv"] = tuple(work["argv"])
        return Entry(Workload(**work), Phase(record.pop("phase")), **record)
    except (ValueError, KeyError, TypeError):
        return None


def write_entry(file: Path, entry: Entry) -> None:
    """Write it whole or not at all."""
    record = {k: v for k, v in vars(entry).items() if k not in ("workload", "phase", "process")}
    record |= {"phase": entry.phase.value, "workload": workload_to_json(entry.workload)}
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps(record, indent=1))
    draft.replace(file)


def read_termination(file: Path) -> dict[str, Any] | None:
    """The {exit_code, status} that a worker has left; None when it left none."""
    try:
        told = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return told if isinstance(told, dict) and "exit_code" in told else None


def status_to_json(status: status_pb2.Status | None) -> dict[str, Any]:
    """A status as plain JSON; {} for none."""
    return json_format.MessageToDict(status) if status is not None else {}
