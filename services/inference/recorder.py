"""Keeps prompts and answers that pass the gateway, when that is turned on: bounded, redacted, and never in an answer's way.

The gateway's event loop only counts bytes and puts references into a queue; reading, redacting and writing are a thread's.
When memory is full, because the store is slow or away, what comes then is not recorded: it is counted, and answers go on.
"""

from __future__ import annotations

import asyncio
import queue
import secrets
import threading
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson
from prometheus_client import Counter

from services.common.config import RecordConfig
from services.common.errors import FailedPrecondition
from services.common.logs import get_logger
from services.common.metrics import REGISTRY
from services.inference.redaction import Redaction, load_rules
from services.inference.retention import Sweeper
from services.inference.traffic import (
    Folder,
    Sink,
    Unfinished,
    Unreadable,
    put_records,
    read_answer,
    read_request,
    read_stream,
)

LARGEST_BYTES = 4 * 1024 * 1024
"""Of one request with its answer; larger ones are not recorded."""
BATCH_BYTES = 1024 * 1024
CHUNK_OVERHEAD = 64
"""About what Python keeps beside the bytes of a chunk."""
CLOSE_SECONDS = 5.0
STREAMED, WHOLE = "stream", "whole"

recorded = Counter(
    "fabrictune_recorded_total",
    "Requests, by what became of their record: kept, memory (full), too_large, unfinished, unreadable, store (refused it)",
    ["outcome"],
    registry=REGISTRY,
)


def open_recorder(stack: AsyncExitStack, config: RecordConfig, store: Sink | None) -> Recorder | None:
    """The recorder that the settings ask for, if they do; the stack closes it. store: None where there is none.

    What an earlier process has recorded is deleted in time, too, when nothing is recorded any more. Raises InvalidSpec (a
    rule), FailedPrecondition (nowhere to keep records).
    """
    sink = Folder(config.record_folder) if config.record_folder else store
    if sink is not None:
        stack.callback(Sweeper(sink, config.record_days).close)
    if not config.record:
        return None
    if sink is None:
        raise FailedPrecondition(
            "there is no object store here to record into; set FABRICTUNE_RECORD_FOLDER to a folder"
        )
    rules = load_rules(config.record_rules)
    recorder = Recorder(sink, rules, config.record_memory_bytes, config.record_flush_seconds)
    stack.push_async_callback(asyncio.to_thread, recorder.close)
    return recorder


@dataclass(frozen=True)
class _Exchange:
    """A request and its answer as they passed."""

    time: float
    deployment: str
    revision: str
    path: str
    request: bytes
    form: str
    answer: tuple[bytes, ...]
    size: int
    """Bytes that it is counted with."""


class Recorder:
    """Takes exchanges and keeps them in a sink. One for a process; each answer is a Recording."""

    def __init__(
        self, sink: Sink, redaction: Redaction, memory_bytes: int = 64 << 20, flush_seconds: float = 5.0
    ) -> None:
        self._sink, self._redaction = sink, redaction
        self._memory_bytes, self._flush_seconds = memory_bytes, flush_seconds
        self._held, self._lock = 0, threading.Lock()
        self._queue: queue.SimpleQueue[_Exchange | threading.Event | None] = queue.SimpleQueue()
        self._log, self._warned = get_logger("recorder"), -60.0
        # A daemon: a store that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self._thread.start()

    def reserve(self, size: int) -> bool:
        """Count so many bytes as held; False when that is more than there may be."""
        with self._lock:
            if self._held + size > self._memory_bytes:
                return False
            self._held += size
            return True

    def release(self, size: int) -> None:
        """Count so many bytes as no longer held."""
        with self._lock:
            self._held -= size

    def take(self, exchange: _Exchange) -> None:
        """Keep it. Its bytes have been reserved."""
        self._queue.put(exchange)

    def flush(self, seconds: float) -> bool:
        """Wait until all that was taken so far is written; False when that takes longer."""
        done = threading.Event()
        self._queue.put(done)
        return done.wait(seconds)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Write what there is, if that takes no longer."""
        self._queue.put(None)
        self._thread.join(seconds)

    def _write(self) -> None:
        """The thread: gather records, and write them when there are many, or after a while, or when asked to."""
        batch: list[dict[str, Any]] = []
        size, due = 0, 0.0
        while True:
            try:
                taken = self._queue.get(timeout=max(due - time.monotonic(), 0.0) if batch else None)
            except queue.Empty:
                self._put(batch, size)
                batch, size = [], 0
                continue
            if isinstance(taken, _Exchange):
                record = self._make_record(taken)
                if record is None:
                    self.release(taken.size)
                    continue
                due = due if batch else time.monotonic() + self._flush_seconds
                batch.append(record)
                size += taken.size
                if size < BATCH_BYTES:
                    continue
            self._put(batch, size)
            batch, size = [], 0
            if taken is None:
                return
            if isinstance(taken, threading.Event):
                taken.set()

    def _make_record(self, exchange: _Exchange) -> dict[str, Any] | None:
        try:
            answer, usage = (read_stream if exchange.form == STREAMED else read_answer)(b"".join(exchange.answer))
            # A rule of the user's own is code from outside as well: whatever it raises, the thread must go on.
            kept = self._redaction.clean({"request": read_request(exchange.request), "answer": answer})
            orjson.dumps(kept)
        except Unreadable as error:
            self._drop("unfinished" if isinstance(error, Unfinished) else "unreadable", str(error))
            return None
        except Exception as error:  # noqa: BLE001 - the thread's rim: one strange body must not end all recording
            self._drop("unreadable", repr(error))
            return None
        when = datetime.fromtimestamp(exchange.time, UTC).isoformat(timespec="milliseconds")
        told = {"deployment": exchange.deployment, "revision": exchange.revision, "path": exchange.path}
        return {"id": secrets.token_hex(8), "time": when, **told, **kept, "usage": usage}

    def _put(self, batch: list[dict[str, Any]], size: int) -> None:
        if not batch:
            return
        try:
            put_records(self._sink, batch)
        except Exception as error:  # noqa: BLE001 - the thread's rim: stores fail in many ways, and recording goes on
            self._drop("store", str(error), len(batch))
        else:
            recorded.labels("kept").inc(len(batch))
        finally:
            self.release(size)

    def _drop(self, outcome: str, why: str, count: int = 1) -> None:
        recorded.labels(outcome).inc(count)
        if time.monotonic() - self._warned > 60:  # one line a minute tells enough; the counter has them all
            self._warned = time.monotonic()
            self._log.warning("not recorded", outcome=outcome, reason=why, count=count)


class Recording:
    """One answer that is being recorded. Call `end` when it is complete, and `close` in any case."""

    def __init__(self, recorder: Recorder | None, deployment: str, revision: str, path: str, request: bytes) -> None:
        self._recorder, self._told = recorder, (deployment, revision, path)
        self._time, self._request = time.time(), request
        self._chunks: list[bytes] = []
        self._size = 0
        if recorder is not None:
            self._grow(len(request))

    def add(self, chunk: bytes) -> None:
        """A part of the answer as it goes to the client."""
        if self._recorder is not None and self._grow(len(chunk) + CHUNK_OVERHEAD):
            self._chunks.append(chunk)

    def end(self, form: str = STREAMED) -> None:
        """All has been said: keep it. form: STREAMED or WHOLE."""
        recorder = self._recorder
        if recorder is not None:
            size, self._size, self._recorder = self._size, 0, None
            recorder.take(_Exchange(self._time, *self._told, self._request, form, tuple(self._chunks), size))

    def close(self) -> None:
        """Forget it, unless it has ended: half an answer is no example."""
        if self._recorder is not None:
            self._give_up("unfinished")

    def _grow(self, size: int) -> bool:
        assert self._recorder is not None
        if self._size + size > LARGEST_BYTES:
            self._give_up("too_large")
        elif self._recorder.reserve(size):
            self._size += size
            return True
        else:
            self._give_up("memory")
        return False

    def _give_up(self, outcome: str) -> None:
        assert self._recorder is not None
        self._recorder.release(self._size)
        self._recorder, self._size, self._chunks, self._request = None, 0, [], b""
        recorded.labels(outcome).inc()
