"""Breaks workers in the middle of their work: a real worker process on a real store, told to stop or killed.

worker = WorkerProcess("training", "trainingJobs/t1", store, object_store, folder)
worker.start()
worker.wait_for_checkpoint(after=0)
worker.kill()                       # or worker.terminate()
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from services.common.artifacts import Artifacts
from services.common.checkpoints import checkpoints_of
from services.common.config import StoreConfig
from services.common.store import Store

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 240.0
"""Seconds to wait for anything, on a machine that does other things too."""


class WorkerProcess:
    """One worker at a time on one job; every start is another attempt."""

    def __init__(self, kind: str, job: str, store: Store, object_store: StoreConfig, folder: Path) -> None:
        self.job, self.artifacts = job, Artifacts(store, folder / "cache")
        self._kind, self._folder = kind, folder
        self._environment = {
            **os.environ,
            "FABRICTUNE_S3_ENDPOINT": object_store.endpoint,
            "FABRICTUNE_S3_BUCKET": store.bucket,
            "FABRICTUNE_S3_ACCESS_KEY": object_store.access_key,
            "FABRICTUNE_S3_SECRET_KEY": object_store.secret_key.get_secret_value(),
            "FABRICTUNE_DATA_DIR": str(folder),
            "FABRICTUNE_TERMINATION_LOG": str(folder / "termination-log"),
            "FABRICTUNE_JOB": job,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._family: list[psutil.Process] = []

    def start(self) -> None:
        """Begin an attempt."""
        folder = self._folder / "worker.log"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.open("ab") as log:
            argv = [sys.executable, "-m", f"services.{self._kind}.worker"]
            self._process = subprocess.Popen(argv, cwd=ROOT, env=self._environment, stdout=log, stderr=log)

    def terminate(self) -> int:
        """SIGTERM, as a drain or a preemption sends it; the exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        """SIGKILL, as the kernel sends it when memory is short; the exit status."""
        return self._end(signal.SIGKILL)

    def wait(self) -> int:
        """The exit status once it has ended by itself."""
        return self._running.wait(PATIENCE)

    def wait_for_checkpoint(self, after: int) -> int:
        """The step of a checkpoint beyond `after`, once it is sealed."""
        return self._wait_until(lambda: next((step for step in self.checkpoints() if step > after), None))

    def wait_until_all_are_gone(self) -> None:
        """Wait for the processes that the worker had when it was ended last."""
        _, alive = psutil.wait_procs(self._family, PATIENCE)
        assert not alive, f"still there: {alive}"

    def checkpoints(self) -> list[int]:
        """Steps of the sealed checkpoints, oldest first."""
        return [int(name.rpartition("-")[2]) for name in checkpoints_of(self.artifacts, self.job)]

    @property
    def log(self) -> str:
        """What all attempts have printed."""
        return (self._folder / "worker.log").read_text()

    def close(self) -> None:
        """End what a failed test has left."""
        if self._process is not None and self._process.poll() is None:
            self.kill()

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "start it first"
        return self._process

    def _end(self, number: signal.Signals) -> int:
        self._family = psutil.Process(self._running.pid).children(recursive=True)
        self._running.send_signal(number)
        return self._running.wait(PATIENCE)

    def _wait_until(self, find: Callable[[], int | None]) -> int:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = find()
            if found is not None:
                return found
            assert self._running.poll() is None, (
                f"the worker ended with {self._running.returncode}:\n{self.log[-3000:]}"
            )
            time.sleep(0.05)
        raise AssertionError(f"it did not happen in {PATIENCE:.0f} s:\n{self.log[-3000:]}")
