"""The state of a job, as a pure function of what the store and the cluster know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from google.protobuf import json_format
from google.rpc import status_pb2

from fabrictune.v1 import job_pb2
from services.common.clusters import Phase, WorkloadStatus
from services.common.errors import WorkerLost

State = job_pb2.Execution.State
ENDED = frozenset({job_pb2.Execution.SUCCEEDED, job_pb2.Execution.FAILED, job_pb2.Execution.CANCELLED})

# What a cluster's phase means for a job without an outcome in the store.
STATE_OF_PHASE: Mapping[Phase, job_pb2.Execution.State] = {
    Phase.PENDING: job_pb2.Execution.QUEUED,
    Phase.RUNNING: job_pb2.Execution.RUNNING,
    # It ended without a word: its outcome is being written down, or will be by the server (see services.common.upkeep).
    Phase.SUCCEEDED: job_pb2.Execution.RUNNING,
    Phase.FAILED: job_pb2.Execution.RUNNING,
}


@dataclass(frozen=True)
class JobRecord:
    """What was asked for: `{job}/job.json`, written once when the job is accepted."""

    name: str
    spec: Mapping[str, Any]
    output: str
    digest: str
    """sha256 of kind, spec and input digests."""
    inputs: tuple[Mapping[str, str], ...] = ()
    """{role, name, digest} of every input artifact, fixed when the job is accepted."""
    request_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    create_time: float = 0

    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True)
class JobView:
    """All that is known of a job now."""

    record: JobRecord
    outcome: Mapping[str, Any] | None = None
    """`{job}/outcome.json`: {state, error, start_time, end_time, attempt, digest}; written once it has ended."""
    cancel_requested: bool = False
    attempts: tuple[float, ...] = ()
    """When each attempt began, by the worker's own word."""
    progress: Mapping[str, Any] | None = None
    status: WorkloadStatus | None = None


def execution_of(view: JobView) -> job_pb2.Execution:
    """The job's execution: the stored outcome decides; then a request to cancel; then the cluster."""
    outcome = view.outcome
    if outcome is not None:
        execution = job_pb2.Execution(state=str(outcome["state"]), attempt=int(outcome.get("attempt", 1)))
        if outcome.get("error"):
            json_format.ParseDict(outcome["error"], execution.error)
        _set_time(execution.start_time, outcome.get("start_time"))
        _set_time(execution.end_time, outcome.get("end_time"))
    else:
        execution = job_pb2.Execution(state=_live_state(view), attempt=max(len(view.attempts), 1))
        execution.message = view.status.message if view.status else ""
        if view.attempts:
            _set_time(execution.start_time, view.attempts[-1])
    _set_time(execution.create_time, view.record.create_time)
    if view.progress:
        execution.progress.CopyFrom(progress_message(view.progress))
    return execution


def outcome_of(view: JobView) -> dict[str, Any] | None:
    """The outcome to write down for a job whose workload has ended, or gone, without one; None while it may go on."""
    status = view.status
    if view.outcome is not None or (status is not None and status.phase in (Phase.PENDING, Phase.RUNNING)):
        return None
    if status is None and not view.cancel_requested:
        return None  # the cluster has forgotten it: it is begun again (see services.common.upkeep)
    if view.cancel_requested:
        return _outcome(view, "CANCELLED", None)
    error = status.error if status is not None and status.error is not None else None
    return failed_outcome(view, error or WorkerLost("the worker ended without an outcome").to_status())


def failed_outcome(view: JobView, error: status_pb2.Status) -> dict[str, Any]:
    """The outcome to write down for a job that has failed."""
    return _outcome(view, "FAILED", error)


def _outcome(view: JobView, state: str, error: status_pb2.Status | None) -> dict[str, Any]:
    return {
        "state": state,
        "error": json_format.MessageToDict(error) if error is not None else None,
        "attempt": max(len(view.attempts), 1),
        "start_time": view.attempts[-1] if view.attempts else None,
        "end_time": datetime.now(UTC).timestamp(),
    }


def progress_message(progress: Mapping[str, Any]) -> job_pb2.Progress:
    """The protobuf form of a stored Progress."""
    fields = dict(progress)
    eta = fields.pop("eta_seconds", None)
    message = job_pb2.Progress(**fields)
    if eta is not None:
        message.eta.FromMilliseconds(int(float(eta) * 1000))
    return message


def error_status(outcome: Mapping[str, Any]) -> status_pb2.Status:
    """The error of a stored outcome."""
    return json_format.ParseDict(outcome.get("error") or {}, status_pb2.Status())


def _live_state(view: JobView) -> job_pb2.Execution.State:
    if view.cancel_requested:
        return job_pb2.Execution.CANCELLING
    if view.status is None:
        return job_pb2.Execution.QUEUED
    return STATE_OF_PHASE[view.status.phase]


def _set_time(stamp: Any, seconds: float | None) -> None:
    if seconds:
        stamp.FromMilliseconds(int(seconds * 1000))
