"""Why a Job, a pod or a container has failed, as one of our errors with the fix. Pure functions over the API's objects."""

from __future__ import annotations

import json
from collections.abc import Mapping

from google.protobuf import json_format
from google.rpc import status_pb2

from services.common.clusters.manifests import RESOURCES
from services.common.clusters.objects import Object, Seen, conditions_of, containers_of, ended_at, phase_of
from services.common.errors import (
    DeadlineExceeded,
    FabrictuneError,
    FailedPrecondition,
    ResourceExhausted,
    WorkerLost,
)

ENDED_BECAUSE = "fabrictune.dev/ended-because"
"""Annotation on a Job that a server ended: the sentence for its user."""
# Reasons of a pod's DisruptionTarget condition: who took it away.
DISRUPTIONS: Mapping[str, str] = {
    "PreemptionByScheduler": "made room for a workload of higher priority",
    "EvictionByEvictionAPI": "was evicted (its node is drained)",
    "DeletionByTaintManager": "was on a node that no longer answers",
    "DeletionByPodGC": "was on a node that has gone",
    "TerminationByKubelet": "was evicted by its node, which ran short of memory or disk",
}


def job_error(seen: Seen, failed: Object) -> FabrictuneError:
    """Why a Job has failed: a server's own word, the worker's, the container's, the pod's, the Job's."""
    told = (seen.main["metadata"].get("annotations") or {}).get(ENDED_BECAUSE)
    if told:
        return DeadlineExceeded(told)
    ended = sorted((p for p in seen.pods if phase_of(p) == "Failed"), key=ended_at)
    for pod in reversed(ended):
        error = pod_error(pod)
        if error is not None:
            return error
    if failed.get("reason") == "DeadlineExceeded":
        limits = json.loads((seen.main["metadata"].get("annotations") or {}).get(RESOURCES) or "{}")
        run = float(limits.get("run_timeout") or 0)
        which = f"{run:.0f} s (run_timeout)" if run else "its Job's activeDeadlineSeconds"
        return DeadlineExceeded(f"ran longer than {which}")
    words = failed.get("message") or failed.get("reason") or "no reason was given"
    return WorkerLost(f"the Job failed and left no pod to ask: {words}")


def pod_error(pod: Object) -> FabrictuneError | None:
    """Why a pod has failed; None when it does not tell. Whoever took it away knows more than an exit status does."""
    ends = ((c.get("state") or {}).get("terminated") or {} for c in containers_of(pod))
    error = next((e for end in ends if (e := container_error(end)) is not None), None)
    return (_why_taken(pod) or error) if error is None or type(error) is WorkerLost else error


def _why_taken(pod: Object) -> FabrictuneError | None:
    state = pod.get("status") or {}
    if state.get("reason") == "Evicted":
        words = str(state.get("message") or "").strip()
        return ResourceExhausted(f"its node evicted it: {words} Ask for more memory or ephemeral storage")
    target = next(
        (c for c in conditions_of(pod) if c["type"] == "DisruptionTarget" and c.get("status") == "True"), None
    )
    if target is not None:
        return WorkerLost(
            f"its pod {DISRUPTIONS.get(target.get('reason', ''), target.get('message', 'was disrupted'))}"
        )
    if state.get("reason") == "DeadlineExceeded":
        return DeadlineExceeded("its pod ran longer than activeDeadlineSeconds")
    return None


class ToldError(FabrictuneError):
    """What the worker itself wrote into its termination message."""

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status

    def to_status(self) -> status_pb2.Status:
        """The status as it was written."""
        return self.status


def container_error(ended: Object) -> FabrictuneError | None:
    """Why a container has ended, from its `terminated` state; None when it ended well."""
    if not ended or ended.get("exitCode") == 0:
        return None
    if ended.get("reason") == "OOMKilled":
        return ResourceExhausted("it needed more memory than its limit (OOMKilled); set spec.resources.memory higher")
    message = str(ended.get("message") or "")
    told = _told(message)
    if told is not None:
        return ToldError(told)
    if ended.get("reason") in ("ContainerCannotRun", "StartError"):
        return FailedPrecondition(f"its container cannot run: {message}")
    end = message.strip()[-1000:]
    return WorkerLost(
        f"the worker ended with exit status {ended.get('exitCode')}" + (f"; its last words: {end}" if end else "")
    )


def _told(message: str) -> status_pb2.Status | None:
    try:
        status = json_format.ParseDict(json.loads(message)["status"], status_pb2.Status())
    except (ValueError, KeyError, TypeError, json_format.ParseError):
        return None
    return status if status.code else None
