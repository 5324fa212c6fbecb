"""Why an engine ended, as its revision tells it: a real process in the local cluster."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.common.clusters import Phase, Workload, WorkloadStatus
from services.common.clusters.failures import container_error
from services.common.clusters.local import LocalCluster
from services.common.errors import FabrictuneError, WorkerLost
from services.inference.engine import Hardware
from services.inference.launch import Launcher, Limits


class Killed(LocalCluster):
    """Says of a process that has ended what Kubernetes says of a container that did so."""

    error: FabrictuneError

    async def get(self, name: str) -> WorkloadStatus | None:
        status = await super().get(name)
        if status is None or status.phase is not Phase.FAILED:
            return status
        return replace(status, message=self.error.message, error=self.error.to_status())


async def last_words(folder: Path, ended: dict[str, object], log: str) -> str:
    """What is told of an engine that wrote `log` and whose container then ended so."""
    error = container_error(ended)
    assert error is not None
    cluster = Killed(folder)
    cluster.error = error
    await cluster.start()
    try:
        argv = (sys.executable, "-c", f"import sys; print({log!r}); sys.exit(1)")
        work = Workload("engine", "engine-x", argv)
        await cluster.create(work)
        nothing: Any = None
        launcher = Launcher(cluster, nothing, Hardware(0, 2, 1 << 30), Limits(poll=0.05))
        with pytest.raises(WorkerLost) as caught:
            await launcher.healthy(work, tell=_hear)
        return caught.value.message.removeprefix("the engine ended while it started. ")
    finally:
        await cluster.close()


async def _hear(_: str) -> None:
    pass


async def test_a_pod_that_ran_out_of_memory_says_so_before_its_log(tmp_path: Path) -> None:
    told = await last_words(tmp_path, {"exitCode": 137, "reason": "OOMKilled"}, "INFO loading weights")
    first, _, log = told.partition("The end of its log:")
    assert "set spec.resources.memory higher" in first and "loading weights" in log


async def test_of_a_container_that_merely_ended_its_log_is_told_once(tmp_path: Path) -> None:
    ended = {"exitCode": 2, "message": "error: unrecognized arguments: --x"}
    told = await last_words(tmp_path, dict(ended), "error: unrecognized arguments: --x")
    assert told.startswith("Spec.engine_args has a flag") and told.count("unrecognized arguments") == 1
    told = await last_words(tmp_path / "silent", dict(ended), "")
    assert "unrecognized arguments" in told and told.endswith("It left no log")
