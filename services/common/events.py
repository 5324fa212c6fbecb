"""A job's events (progress, log lines, artifacts) in the object store, so that they outlive pod and node.

S3 cannot append, so a writer puts small numbered objects, `events/{job}/{attempt}-{number}.jsonl`, at most one a second;
readers list what comes after the last one that they saw. A resume token is "{attempt}-{number}:{line}".
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from services.common.errors import FabrictuneError, InvalidSpec
from services.common.reporter import Progress
from services.common.store import Store

FLUSH_SECONDS = 1.0
MAX_LINES = 5000
"""Lines kept for one flush; a worker that writes more in a second loses the oldest, and says so."""


class EventWriter:
    """A Reporter whose words go to the store. Threads may share it. Close it."""

    def __init__(self, store: Store, job: str, attempt: int) -> None:
        self._store, self._job, self._attempt = store, job, attempt
        self._lines: list[bytes] = []
        self._progress: dict[str, Any] | None = None
        self._number = 0
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def progress(self, progress: Progress) -> None:
        """Keep the newest progress; one goes out with each flush."""
        with self._lock:
            self._progress = {k: v for k, v in asdict(progress).items() if v is not None and v != ""}

    def log(self, text: str, severity: str = "INFO") -> None:
        """A line for people."""
        self._add({"log": {"severity": severity, "text": text}})

    def artifact(self, name: str, digest: str) -> None:
        """The job has sealed an artifact."""
        self._add({"artifact": {"name": name, "digest": digest}})

    def checkpoint(self, step: int, folder: Path) -> None:
        """Workers of training replace this; see services.common.checkpoints."""

    def flush(self) -> None:
        """Send what has gathered. Raises errors of the store; the lines are kept then."""
        with self._sending:
            with self._lock:
                lines, progress = self._lines, self._progress
                self._lines, self._progress = [], None
            if progress is not None:
                lines = [*lines, _encode({"progress": progress})]
            if not lines:
                return
            try:
                self._store.put_bytes(event_key(self._job, self._attempt, self._number), b"".join(lines))
                if progress is not None:
                    self._store.put_json(f"{self._job}/progress.json", progress)
            except FabrictuneError:
                with self._lock:
                    self._lines = lines + self._lines
                raise
            self._number += 1

    def close(self) -> None:
        """Send the rest."""
        self._stop.set()
        self._thread.join()
        self.flush()

    def _add(self, event: Mapping[str, Any]) -> None:
        with self._lock:
            self._lines.append(_encode(event))
            if len(self._lines) > MAX_LINES:
                del self._lines[: MAX_LINES // 10]
                text = f"{MAX_LINES // 10} log lines are not shown: the object store could not be reached in time"
                self._lines.append(_encode({"log": {"severity": "WARNING", "text": text}}))

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_SECONDS):
            try:
                self.flush()
            except FabrictuneError:
                continue  # the store is away; the lines wait for the next second


def event_key(job: str, attempt: int, number: int) -> str:
    """Where the number-th piece of an attempt's events lies; the keys sort in time's order."""
    return f"events/{job}/{attempt:04d}-{number:06d}.jsonl"


def read_events(store: Store, job: str, token: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(resume token, event) of all events after `token`, oldest first. Raises InvalidSpec on a token that is not ours."""
    prefix = f"events/{job}/"
    piece, _, line = token.partition(":")
    if token and not (line.isdigit() and len(piece) == 11 and piece.replace("-", "", 1).isdigit()):
        raise InvalidSpec(f"{token!r} is no resume token; give back one that a Watch event carried")
    if token:
        yield from _read_piece(store, prefix, piece, int(line) + 1)
    for key in store.list_keys(prefix, start_after=f"{prefix}{piece}.jsonl" if token else ""):
        yield from _read_piece(store, prefix, key.removeprefix(prefix).removesuffix(".jsonl"), 0)


def _read_piece(store: Store, prefix: str, piece: str, first: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(store.get_bytes(f"{prefix}{piece}.jsonl").splitlines()):
        if number >= first:
            yield f"{piece}:{number}", json.loads(line)


def _encode(event: Mapping[str, Any]) -> bytes:
    return json.dumps({"time": round(time.time(), 3), **event}, ensure_ascii=False).encode() + b"\n"
