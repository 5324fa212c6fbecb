"""Checkpoints of a job that is not done: artifacts that its workers alone see."""

from __future__ import annotations

from pathlib import Path

from services.common.artifacts import Artifacts
from services.common.events import EventWriter
from services.common.job_state import JobRecord
from services.common.store import Store


class CheckpointWriter(EventWriter):
    """An EventWriter that also keeps checkpoints."""

    def __init__(self, store: Store, artifacts: Artifacts, record: JobRecord, attempt: int) -> None:
        super().__init__(store, record.name, attempt)
        self._artifacts, self._record = artifacts, record
        self.kept = 2

    def checkpoint(self, step: int, folder: Path) -> None:
        """Seal the folder as a checkpoint of this job; the newest `kept` of them stay."""
        name = f"checkpoints/{self._record.name.replace('/', '-')}/step-{step:08d}"
        self._artifacts.publish(
            folder, name, "checkpoint", created_by={"job": self._record.name}, metadata={"step": step}
        )
        self.log(f"checkpoint of step {step} is kept")
        for old in checkpoints_of(self._artifacts, self._record.name)[: -self.kept]:
            self._artifacts.delete(old)


def checkpoints_of(artifacts: Artifacts, job: str) -> list[str]:
    """Names of a job's complete checkpoints, oldest first."""
    return artifacts.names(f"checkpoints/{job.replace('/', '-')}/")
