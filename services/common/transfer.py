"""Files to and from the object store: streamed, in parallel parts, hashed on the way, with bounded memory."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import urllib3

from services.common.errors import DataLoss, FabrictuneError, Unavailable
from services.common.store import Store

PART = 16 << 20
"""Bytes of a part; memory is at most PART × (THREADS + 1)."""
THREADS = 3
CHUNK = 1 << 20
OnBytes = Callable[[int], None]


class _Hashed(io.RawIOBase):
    """A file that hashes what is read from it."""

    def __init__(self, data: BinaryIO | io.RawIOBase, on_bytes: OnBytes) -> None:
        self._data, self._on_bytes, self.sha256 = data, on_bytes, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        chunk = self._data.read(size) or b""
        self.sha256.update(chunk)
        self._on_bytes(len(chunk))
        return chunk


def upload(store: Store, file: Path, key: str, on_bytes: OnBytes) -> str:
    """Send a file; returns its sha256, lower-case hex. Raises errors of the store."""
    size = file.stat().st_size
    with file.open("rb") as data:
        hashed = _Hashed(data, on_bytes)
        store.put_stream(key, hashed, size, PART, THREADS)
        return hashed.sha256.hexdigest()


def upload_chunks(store: Store, key: str, size: int, chunks: Iterator[Any]) -> str:
    """Send `size` bytes as they are made; returns their sha256, lower-case hex. chunks: buffers.

    Raises what `chunks` raises, DataLoss when they are fewer or more than `size`, errors of the store.
    """
    stream = _Chunked(chunks)
    hashed = _Hashed(stream, lambda _: None)
    try:
        store.put_stream(key, hashed, size, PART, THREADS)
        if stream.raised is None and stream.read(1):
            raise DataLoss(f"{key} was to have {size} bytes, and there are more")
    except FabrictuneError:
        # minio turns what its stream raises into an error of its own kind; the first cause is the one to tell.
        if stream.raised is None:
            raise
    finally:
        stream.close()
    if stream.raised is not None:
        raise stream.raised
    return hashed.sha256.hexdigest()


class _Chunked(io.RawIOBase):
    """A stream over buffers. raised: what the iterator raised, if it did."""

    def __init__(self, chunks: Iterator[Any]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")
        self.raised: BaseException | None = None

    def read(self, size: int = -1) -> bytes:
        parts, missing = [], size
        while missing:
            if not self._rest:
                try:
                    self._rest = memoryview(next(self._chunks)).cast("B")
                except StopIteration:
                    break
                except BaseException as error:
                    self.raised = error
                    raise
                continue
            parts.append(self._rest[:missing])
            self._rest = self._rest[missing:]
            missing -= len(parts[-1])
        return b"".join(parts)

    def close(self) -> None:
        """End the iterator, wherever it is."""
        if close := getattr(self._chunks, "close", None):
            close()
        super().close()


def download(store: Store, key: str, file: Path, size: int, sha256: str, on_bytes: OnBytes) -> None:
    """Fetch an object into a file, going on with the parts that are missing. Raises DataLoss when its hash differs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    notes = file.with_name(file.name + ".parts")
    done = _read_notes(notes) if file.exists() else set()
    if not (file.exists() and not notes.exists() and file.stat().st_size == size):
        address = store.presign("GET", key)
        _write_notes(notes, done)  # before the file has its size: without notes it counts as whole
        with file.open("r+b" if file.exists() else "w+b") as out:
            out.truncate(size)
            missing = [p for p in range((size + PART - 1) // PART) if p not in done]
            with ThreadPoolExecutor(THREADS) as pool:
                jobs = [pool.submit(_fetch_part, store, address, key, out.fileno(), p, size, on_bytes) for p in missing]
                for part, job in zip(missing, jobs, strict=True):
                    job.result()
                    done.add(part)
                    _write_notes(notes, done)
    with file.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    notes.unlink(missing_ok=True)
    if found != sha256:
        file.unlink()
        raise DataLoss(
            f"{key} is not what its manifest says: sha256 {found[:12]}, expected {sha256[:12]}; it was thrown away"
        )


def bytes_on_disk(draft: Path) -> int:
    """What a download that broke off has taken already; its files have their whole size from the start."""
    stats = (file.stat() for file in draft.rglob("*") if file.is_file())
    return sum(min(stat.st_blocks * 512, stat.st_size) for stat in stats)


def _read_notes(notes: Path) -> set[int]:
    """The parts that are there."""
    return set(json.loads(notes.read_text())) if notes.exists() else set()


def _write_notes(notes: Path, done: set[int]) -> None:
    draft = notes.with_name(notes.name + ".tmp")
    draft.write_text(json.dumps(sorted(done)))
    draft.replace(notes)


def _fetch_part(store: Store, address: str, key: str, descriptor: int, part: int, size: int, on_bytes: OnBytes) -> None:
    begin, end = part * PART, min((part + 1) * PART, size)
    try:
        answer = store.http.request(
            "GET",
            address,
            headers={"Range": f"bytes={begin}-{end - 1}"},
            preload_content=False,
            retries=urllib3.Retry(3),
        )
        try:
            if answer.status >= 300:
                raise DataLoss(f"{key} is named by its manifest, but the object store says HTTP {answer.status}")
            at = begin
            for chunk in answer.stream(CHUNK):
                at += os.pwrite(descriptor, chunk, at)
                on_bytes(len(chunk))
        finally:
            answer.release_conn()
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Unavailable(
            f"the download of {key} broke off ({type(error).__name__}); it goes on there next time"
        ) from None
    if at != end:
        raise Unavailable(f"the download of {key} broke off at byte {at} of {size}")
