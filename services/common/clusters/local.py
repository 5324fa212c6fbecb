"""The local cluster: workloads are child processes, each in a session of its own, with a journal on disk.

Children survive the death of the process that started them (training goes on while `fabrictune up` is away). The
journal tells the next one which of them still run; one that has gone and left no word is lost, and is started again
while it has attempts left. Jobs run a few at a time, in the order they came; servers start at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import yaml
from google.protobuf import json_format
from google.rpc import status_pb2

from services.common.clusters import Phase, Workload, WorkloadStatus
from services.common.clusters.journal import (
    Entry,
    read_entry,
    read_termination,
    status_of,
    status_to_json,
    workload_to_json,
    write_entry,
)
from services.common.clusters.leftovers import end_all, grace_seconds
from services.common.clusters.processes import is_alive, signal_group, signal_one, start_ticks
from services.common.errors import NEVER_RETRY, AlreadyExists, DeadlineExceeded, FailedPrecondition, WorkerLost
from services.common.logs import get_logger
from services.common.machine import count_gpus, free_port

POLL_SECONDS = 0.2
LOST = WorkerLost("the worker's process has gone without an outcome; was it killed, or did memory run out?")


class LocalCluster:
    """Runs workloads on this machine. folder: journal, logs and termination messages. Use `start` and `close`."""

    def __init__(self, folder: Path, max_jobs: int = 1, environment: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._max_jobs = max_jobs
        self._environment = dict(os.environ if environment is None else environment)
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an engine would compile for 20 s at every start
        self._entries: dict[str, Entry] = {}
        self._watchers: set[asyncio.Queue[WorkloadStatus]] = set()
        self._loop_task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._log = get_logger("cluster")

    def set_environment(self, key: str, value: str) -> None:
        """One more variable for workloads that start from now on."""
        self._environment[key] = value

    async def start(self) -> None:
        """Read the journal and take back the children that still run."""
        for part in ("journal", "logs", "termination"):
            (self._folder / part).mkdir(parents=True, exist_ok=True)
        for file in sorted((self._folder / "journal").glob("*.json")):
            entry = read_entry(file)
            if entry is None:
                self._log.warning("a journal entry cannot be read and is put aside", file=str(file))
                file.rename(file.with_suffix(".broken"))
                continue
            self._entries[entry.workload.name] = entry
        self._loop_task = asyncio.create_task(self._run())

    async def close(self, stop_workloads: bool = True) -> None:
        """End the cluster and, unless told otherwise, every process that it started."""
        if self._loop_task:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        if not stop_workloads:
            return
        running = [e for e in self._entries.values() if e.phase is Phase.RUNNING]
        await asyncio.to_thread(end_all, running)
        for entry in running:
            if entry.process is not None:
                await entry.process.wait()  # else its transport outlives the loop
            # Not an outcome: the next start begins this workload again if it is still wanted.
            self._forget(entry.workload.name)

    async def create(self, workload: Workload) -> WorkloadStatus:
        """Accept a workload. Raises AlreadyExists (same name, other digest), FailedPrecondition (GPUs this machine lacks)."""
        known = self._entries.get(workload.name)
        if known is not None:
            if known.workload.digest != workload.digest:
                raise AlreadyExists(
                    f"a workload {workload.name} made from another spec exists; delete it or take another id"
                )
            return status_of(known)
        gpus = count_gpus()
        if workload.gpus > gpus or workload.nodes > 1:
            raise FailedPrecondition(
                f"{workload.name} asks for {workload.nodes} node(s) with {workload.gpus} GPU(s); this machine is 1 node "
                f"with {gpus}. Ask for resources.gpus: {gpus}, or use a cluster that has more"
            )
        entry = Entry(workload, create_time=_now(), message="waits for its turn")
        self._entries[workload.name] = entry
        self._save(entry)
        self._changed.set()
        return status_of(entry)

    async def get(self, name: str) -> WorkloadStatus | None:
        """Its status, or None."""
        entry = self._entries.get(name)
        return status_of(entry) if entry else None

    async def list(self, kind: str = "") -> list[WorkloadStatus]:
        """All workloads, of one kind or of every kind."""
        return [status_of(e) for e in self._entries.values() if not kind or e.workload.kind == kind]

    async def stop(self, name: str) -> None:
        """SIGTERM now, SIGKILL after the grace period."""
        entry = self._entries.get(name)
        if entry is None or entry.phase in (Phase.SUCCEEDED, Phase.FAILED) or entry.stop_time:
            return
        entry.stop_time = _now()
        if entry.phase is Phase.RUNNING and is_alive(entry.pid, entry.started):
            # Only the leader: it saves, ends its own children and then itself.
            signal_one(entry.pid, signal.SIGTERM)
        self._save(entry)
        self._changed.set()

    async def delete(self, name: str) -> None:
        """Stop it, wait until it is gone, forget it."""
        await self.stop(name)
        while (entry := self._entries.get(name)) is not None and entry.phase in (Phase.PENDING, Phase.RUNNING):
            await asyncio.sleep(POLL_SECONDS / 2)
        self._forget(name)

    async def watch(self) -> AsyncIterator[WorkloadStatus]:
        """Every change from now on."""
        queue: asyncio.Queue[WorkloadStatus] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)

    def render(self, workload: Workload) -> str:
        """The workload as YAML."""
        return str(
            yaml.safe_dump({"kind": "LocalWorkload", **workload_to_json(workload)}, sort_keys=False, allow_unicode=True)
        )

    async def read_log(self, name: str) -> str:
        """The last 20,000 characters that its processes wrote to stdout and stderr."""
        file = self._log_file(name)
        return await asyncio.to_thread(lambda: file.read_text(errors="replace")[-20_000:] if file.exists() else "")

    def _log_file(self, name: str) -> Path:
        return self._folder / "logs" / f"{name}.log"

    # The loop below is the only place where phases change.

    async def _run(self) -> None:
        while True:
            for entry in list(self._entries.values()):
                if entry.phase is Phase.RUNNING:
                    self._observe(entry)
            await self._start_pending()
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), POLL_SECONDS)
            except TimeoutError:
                continue

    async def _start_pending(self) -> None:
        now = _now()
        running = sum(1 for e in self._entries.values() if e.phase is Phase.RUNNING and not e.workload.port)
        pending = sorted((e for e in self._entries.values() if e.phase is Phase.PENDING), key=lambda e: e.create_time)
        for entry in pending:
            limit = entry.workload.queue_timeout_seconds
            if entry.stop_time:
                self._end(entry, Phase.FAILED, 143)
            elif limit and now - entry.create_time > limit and entry.attempt == 0:
                late = DeadlineExceeded(f"waited {limit:.0f} s for its turn on this machine (queue_timeout)")
                self._end(entry, Phase.FAILED, late.exit_code, late.to_status())
            elif now >= entry.not_before and (entry.workload.port or running < self._max_jobs):
                await self._spawn(entry)
                running += not entry.workload.port

    async def _spawn(self, entry: Entry) -> None:
        work, name = entry.workload, entry.workload.name
        entry.port = free_port() if work.port else 0
        argv = [a.replace("{port}", str(entry.port)) for a in work.argv]
        termination = self._termination_file(name)
        termination.unlink(missing_ok=True)
        env = {**self._environment, **work.env, "FABRICTUNE_TERMINATION_LOG": str(termination)}
        entry.attempt += 1
        with self._log_file(name).open("ab") as log:
            try:
                entry.process = await asyncio.create_subprocess_exec(
                    *argv, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            except OSError as error:
                missing = FailedPrecondition(f"cannot start {argv[0]}: {error.strerror or error}")
                self._end(entry, Phase.FAILED, missing.exit_code, missing.to_status())
                return
        entry.pid = entry.process.pid
        entry.started = start_ticks(entry.pid) or 0
        entry.phase, entry.start_time, entry.message = Phase.RUNNING, _now(), ""
        self._log.info("started", workload=name, pid=entry.pid, attempt=entry.attempt)
        self._save(entry)

    def _observe(self, entry: Entry) -> None:
        now, work = _now(), entry.workload
        code = entry.process.returncode if entry.process else None
        if code is None and is_alive(entry.pid, entry.started):
            limit = work.run_timeout_seconds
            if limit and now - entry.start_time > limit and not entry.stop_time:
                late = DeadlineExceeded(f"ran longer than {limit:.0f} s (run_timeout)")
                entry.error, entry.stop_time = status_to_json(late.to_status()), now
                signal_one(entry.pid, signal.SIGTERM)
            if entry.stop_time and now - entry.stop_time > grace_seconds(work):
                signal_group(entry.pid, signal.SIGKILL)
            return
        if entry.process is not None and code is None:
            return  # gone a moment ago; asyncio has its exit code at the next look
        if entry.process is not None or start_ticks(entry.pid) is None:  # else another process has got the number since
            signal_group(entry.pid, signal.SIGKILL)  # whatever its children left behind
        told = read_termination(self._termination_file(work.name))
        if code is None:
            code = int(told["exit_code"]) if told else 70
        status = json_format.ParseDict(told["status"], status_pb2.Status()) if told and told.get("status") else None
        if code == 0:
            self._end(entry, Phase.SUCCEEDED, 0)
        elif not entry.stop_time and (not told or code not in NEVER_RETRY) and entry.attempt <= work.retries:
            entry.phase, entry.process = Phase.PENDING, None
            entry.not_before = now + min(2.0 ** (entry.attempt - 1), 60)
            entry.message = f"attempt {entry.attempt} ended with exit code {code}; it is tried again"
            self._log.warning("retry", workload=work.name, exit_code=code, attempt=entry.attempt)
            self._save(entry)
        else:
            self._end(entry, Phase.FAILED, code, status or (None if entry.error else LOST.to_status()))

    def _end(self, entry: Entry, phase: Phase, exit_code: int, error: status_pb2.Status | None = None) -> None:
        entry.phase, entry.exit_code, entry.end_time, entry.process = phase, exit_code, _now(), None
        entry.error = entry.error or status_to_json(error)
        entry.message = str(entry.error.get("message", ""))
        self._log.info("ended", workload=entry.workload.name, phase=phase.value, exit_code=exit_code)
        self._save(entry)

    def _save(self, entry: Entry) -> None:
        write_entry(self._folder / "journal" / f"{entry.workload.name}.json", entry)
        for queue in self._watchers:
            queue.put_nowait(status_of(entry))

    def _forget(self, name: str) -> None:
        if self._entries.pop(name, None) is not None:
            (self._folder / "journal" / f"{name}.json").unlink(missing_ok=True)
            self._termination_file(name).unlink(missing_ok=True)

    def _termination_file(self, name: str) -> Path:
        return self._folder / "termination" / f"{name}.json"


def _now() -> float:
    return datetime.now(UTC).timestamp()
