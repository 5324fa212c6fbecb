"""What a run does with the jobs and revisions of earlier ones, and what it leaves when it is cancelled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fabrictune.v1 import job_pb2
from services.common.artifacts import Artifacts
from services.common.errors import Unavailable
from services.common.manifests import Manifest
from services.common.store import Store
from services.pipeline.spec import Spec
from tests.conftest import Recorder
from tests.pipeline_stages import RUN, Stages, begin, evaluating, serve_stages, until


@pytest.fixture
async def stages(store: Store, artifacts: Artifacts, tmp_path: Path) -> AsyncIterator[Stages]:
    async with serve_stages(store, artifacts, tmp_path) as stages:
        yield stages


async def test_a_process_that_ends_leaves_the_revision_that_is_being_evaluated(stages: Stages, store: Store) -> None:
    runs = await evaluating(stages, store)
    await runs.close()
    assert stages.revisions.deleted == [] and stages.jobs["evaluation"].cancelled == []


async def test_a_run_that_a_user_cancels_stops_the_revision_that_was_being_evaluated(
    stages: Stages, store: Store
) -> None:
    runs = await evaluating(stages, store)
    await runs.delete("pipeline-p")
    (revision,) = stages.revisions.deleted
    assert revision.startswith("deployments/d/revisions/r-")
    assert stages.jobs["evaluation"].cancelled == list(stages.jobs["evaluation"].jobs)


async def test_a_run_that_is_cancelled_while_a_revision_starts_stops_it(stages: Stages, store: Store) -> None:
    stages.revisions.loading = True
    for number, spec in enumerate((RUN, {**RUN, "evaluation": None}), 1):
        stages.revisions.called.clear()
        runs = await begin(stages, store, spec)
        await asyncio.wait_for(stages.revisions.called.wait(), 20)
        await runs.delete("pipeline-p")
        assert stages.revisions.deleted == stages.revisions.started
        assert len(stages.revisions.deleted) == number


async def test_a_run_that_is_cancelled_before_it_moves_the_traffic_stops_what_it_evaluated(
    stages: Stages, store: Store
) -> None:
    stages.revisions.busy = True
    runs = await begin(stages, store, {**RUN, "evaluation": {}})
    await until(lambda: list(store.list_keys("deployments/d/lineage/")))
    before, after, deployed = stages.revisions.started
    assert stages.revisions.deleted == [before] and after == deployed
    await runs.delete("pipeline-p")
    assert stages.revisions.deleted == [before, after]


async def test_a_process_that_ends_leaves_the_revision_that_starts(stages: Stages, store: Store) -> None:
    stages.revisions.loading = True
    runs = await begin(stages, store, {**RUN, "evaluation": None})
    await asyncio.wait_for(stages.revisions.called.wait(), 20)
    await runs.close()
    assert stages.revisions.deleted == []


async def test_a_run_can_be_cancelled_while_the_service_of_its_stage_is_away(stages: Stages, store: Store) -> None:
    runs = await evaluating(stages, store)
    stages.jobs["evaluation"].away = True
    with pytest.raises(TimeoutError):  # the caller's deadline
        await asyncio.wait_for(runs.stop("pipeline-p"), 0.5)
    async with asyncio.timeout(20):
        await asyncio.gather(*runs._tasks.values(), return_exceptions=True)
    assert len(stages.revisions.deleted) == 1
    await runs.stop("pipeline-p")  # it has ended


async def test_what_is_saved_last_of_a_run_is_what_was_so_last(
    stages: Stages, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage's job is saved while its beginning may still be on its way, and only what is saved can be cancelled."""
    real = store.put_json

    def put(key: str, value: Any, only_if_absent: bool = False) -> bool:
        if key.endswith("/stages.json") and "job" not in value["stages"][-1]:
            time.sleep(0.3)
        return real(key, value, only_if_absent)

    monkeypatch.setattr(store, "put_json", put)
    runs = await evaluating(stages, store)
    await asyncio.sleep(0.5)
    await runs.delete("pipeline-p")
    assert stages.jobs["evaluation"].cancelled == list(stages.jobs["evaluation"].jobs)


async def test_a_run_waits_for_a_job_that_is_being_cancelled_and_begins_it_again(
    stages: Stages, store: Store, reporter: Recorder
) -> None:
    runs = await evaluating(stages, store)
    await runs.delete("pipeline-p")
    (job,) = stages.jobs["evaluation"].jobs.values()
    job.execution.state = job_pb2.Execution.CANCELLING
    stages.jobs["evaluation"].slow = False
    again = asyncio.create_task(
        stages.reconciler.drive("pipelineRuns/q", Spec.model_validate({**RUN, "evaluation": {}}), reporter)
    )
    await until(lambda: len(stages.revisions.started) == 2)
    await asyncio.sleep(0.2)
    assert stages.jobs["evaluation"].resumed == []
    job.execution.state = job_pb2.Execution.CANCELLED
    made = await asyncio.wait_for(again, 20)
    assert stages.jobs["evaluation"].resumed == [job.name]
    assert made["deployment"] == "deployments/d"


async def test_a_run_that_waits_for_such_a_job_can_be_cancelled_itself(stages: Stages, store: Store) -> None:
    await (await evaluating(stages, store)).delete("pipeline-p")
    (job,) = stages.jobs["evaluation"].jobs.values()
    job.execution.state = job_pb2.Execution.CANCELLING
    runs = await begin(stages, store, RUN, "q")
    await until(lambda: len(stages.revisions.started) == 2)
    async with asyncio.timeout(20):
        await runs.delete("pipeline-q")
    assert len(stages.revisions.deleted) == 2


async def test_a_report_that_is_gone_is_made_again_with_its_model_running(
    stages: Stages, reporter: Recorder, artifacts: Artifacts
) -> None:
    """Its job has succeeded all the same."""
    spec = Spec.model_validate({**RUN, "evaluation": {}})
    await stages.reconciler.drive("pipelineRuns/p", spec, reporter)
    before, *_ = stages.revisions.started
    stages.revisions.started.clear()
    artifacts.delete("reports/r")
    await stages.reconciler.drive("pipelineRuns/q", spec, reporter)
    assert stages.revisions.started[0] == before


async def test_a_run_that_deploys_nothing_reuses_reports_and_leaves_no_deployment(
    stages: Stages, reporter: Recorder, store: Store
) -> None:
    spec = Spec.model_validate({**RUN, "evaluation": {}, "deployment": None})
    for name in ("pipelineRuns/p", "pipelineRuns/second"):
        await stages.reconciler.drive(name, spec, reporter)
        assert (len(stages.jobs["evaluation"].jobs), len(stages.revisions.started)) == (2, 2)
        assert stages.revisions.deployments == {}
    told = (store.get_json("pipelineRuns/second/stages.json") or {})["stages"]
    assert [s["stage"] for s in told if s.get("reused")][-2:] == ["evaluation-before", "evaluation-after"]


async def test_a_revision_that_two_runs_ask_stays_until_both_have_ended(stages: Stages, store: Store) -> None:
    """Other questions, so another job, of the same model."""
    spec = {**RUN, "deployment": None}
    first = await evaluating(stages, store, {**spec, "evaluation": {"limit": 1}})
    second = await evaluating(stages, store, {**spec, "evaluation": {"limit": 2}}, "q")
    revision = stages.revisions.started[0]
    assert stages.revisions.started == [revision, revision] and len(stages.jobs["evaluation"].jobs) == 2
    await first.delete("pipeline-p")
    assert stages.revisions.deleted == [] and len(stages.revisions.deployments) == 1
    await second.delete("pipeline-q")
    assert stages.revisions.deleted == [revision] and stages.revisions.deployments == {}


@pytest.mark.parametrize("state", [job_pb2.Execution.FAILED, job_pb2.Execution.CANCELLED])
async def test_a_run_that_begins_again_keeps_what_an_evaluation_was_answered(
    stages: Stages, reporter: Recorder, state: job_pb2.Execution.State
) -> None:
    """Deleting the job would delete its answers; a conversion has none to keep."""
    spec = Spec.model_validate({**RUN, "evaluation": {}})
    await stages.reconciler.drive("pipelineRuns/p", spec, reporter)
    for kind in ("evaluation", "conversion"):
        for job in stages.jobs[kind].jobs.values():
            job.execution.state = state
    names = set(stages.jobs["evaluation"].jobs)
    await stages.reconciler.drive("pipelineRuns/q", spec, reporter)
    assert set(stages.jobs["evaluation"].resumed) == names
    assert {job.execution.state for job in stages.jobs["conversion"].jobs.values()} == {job_pb2.Execution.SUCCEEDED}


async def test_a_job_whose_output_is_gone_is_begun_afresh(stages: Stages, reporter: Recorder) -> None:
    """It has succeeded, and only failed and cancelled jobs can be resumed. The store here has no adapter."""
    spec = Spec.model_validate({**RUN, "evaluation": {}})
    await stages.reconciler.drive("pipelineRuns/p", spec, reporter)
    (before,) = stages.jobs["training"].jobs.values()
    await stages.reconciler.drive("pipelineRuns/q", spec, reporter)
    (after,) = stages.jobs["training"].jobs.values()
    assert stages.jobs["training"].resumed == []
    assert (after.name, after is before) == (before.name, False)


async def test_a_store_that_cannot_be_asked_makes_no_job_begin_afresh(
    stages: Stages, reporter: Recorder, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds may be hours of training. The run fails, and the next one goes on."""
    spec = Spec.model_validate({**RUN, "evaluation": {}})
    await stages.reconciler.drive("pipelineRuns/p", spec, reporter)
    (before,) = stages.jobs["training"].jobs.values()

    def away(name: str) -> Manifest:
        raise Unavailable("the object store cannot be reached")

    monkeypatch.setattr(artifacts, "get", away)
    with pytest.raises(Unavailable):
        await stages.reconciler.drive("pipelineRuns/q", spec, reporter)
    (after,) = stages.jobs["training"].jobs.values()
    assert after is before
