"""The state of a job from what the store and the cluster say, for every combination that can be."""

from __future__ import annotations

import pytest

from fabrictune.v1 import job_pb2
from services.common.clusters import Phase, WorkloadStatus
from services.common.errors import InvalidData
from services.common.job_state import JobRecord, JobView, execution_of, outcome_of, progress_message

E = job_pb2.Execution
RECORD = JobRecord("trainingJobs/t1", {}, "adapters/t1", "d", create_time=5.0)


def view(phase: Phase | None = None, outcome: str = "", cancel: bool = False, attempts: int = 0) -> JobView:
    status = WorkloadStatus("training-t1", "training", "d", phase) if phase else None
    told = {"state": outcome, "attempt": 2, "start_time": 6.0, "end_time": 7.0} if outcome else None
    return JobView(RECORD, told, cancel, tuple(float(n) for n in range(1, attempts + 1)), None, status)


@pytest.mark.parametrize(
    ("seen", "state"),
    [
        (view(), E.QUEUED),
        (view(Phase.PENDING), E.QUEUED),
        (view(Phase.RUNNING), E.RUNNING),
        (view(Phase.SUCCEEDED), E.RUNNING),  # until its outcome is written
        (view(Phase.FAILED), E.RUNNING),
        (view(Phase.RUNNING, cancel=True), E.CANCELLING),
        (view(cancel=True), E.CANCELLING),
        (view(Phase.RUNNING, outcome="SUCCEEDED"), E.SUCCEEDED),  # the outcome decides, whatever the cluster says
        (view(Phase.FAILED, outcome="SUCCEEDED", cancel=True), E.SUCCEEDED),
        (view(outcome="CANCELLED"), E.CANCELLED),
        (view(outcome="FAILED"), E.FAILED),
    ],
)
def test_states(seen: JobView, state: E.State) -> None:
    assert execution_of(seen).state == state


def test_times_and_attempts() -> None:
    ended = execution_of(view(outcome="SUCCEEDED"))
    assert (ended.attempt, ended.start_time.seconds, ended.end_time.seconds, ended.create_time.seconds) == (2, 6, 7, 5)
    live = execution_of(view(Phase.RUNNING, attempts=3))
    assert (live.attempt, live.start_time.seconds) == (3, 3)


@pytest.mark.parametrize(
    ("seen", "state"),
    [
        (view(Phase.RUNNING), None),
        (view(Phase.PENDING, cancel=True), None),
        (view(), None),  # the cluster has forgotten it: it is begun again
        (view(outcome="FAILED"), None),
        (view(cancel=True), "CANCELLED"),
        (view(Phase.FAILED, cancel=True), "CANCELLED"),
        (view(Phase.FAILED), "FAILED"),
        (view(Phase.SUCCEEDED), "FAILED"),  # exit code 0 without an outcome is no success
    ],
)
def test_outcomes_that_a_server_writes_down(seen: JobView, state: str | None) -> None:
    outcome = outcome_of(seen)
    assert (outcome and outcome["state"]) == state


def test_a_failure_keeps_the_workers_words_or_says_that_it_is_lost() -> None:
    error = InvalidData("row 7 cannot be used").to_status()
    status = WorkloadStatus("t", "training", "d", Phase.FAILED, error=error)
    told = outcome_of(JobView(RECORD, status=status))
    assert told is not None
    assert told["error"]["message"] == "row 7 cannot be used"
    lost = outcome_of(view(Phase.FAILED))
    assert lost is not None
    assert lost["error"]["details"][0]["reason"] == "WORKER_LOST"


def test_progress() -> None:
    message = progress_message({"unit": "steps", "step": 3, "total_steps": 9, "loss": 0.5, "eta_seconds": 61.5})
    assert (message.step, message.loss, message.eta.ToMilliseconds()) == (3, 0.5, 61_500)
    assert not message.HasField("tokens_per_second")
