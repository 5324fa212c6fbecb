"""What Kubernetes says of a Job or an engine's Deployment and its pods → our status and a sentence with the fix.

Pure functions over the objects as the API gives them (dicts). The tables name every condition that users meet; a reason
that no table knows is passed on in Kubernetes' own words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from google.protobuf import json_format
from google.rpc import status_pb2

from services.common.clusters import Phase, WorkloadStatus
from services.common.clusters.manifests import DIGEST, KIND, RESOURCES
from services.common.errors import (
    DeadlineExceeded,
    FabrictuneError,
    FailedPrecondition,
    ResourceExhausted,
    Unavailable,
    WorkerLost,
)

Object = Mapping[str, Any]

ENDED_BECAUSE = "fabrictune.dev/ended-because"
"""Annotation on a Job that a server ended: the sentence for its user."""


@dataclass(frozen=True)
class Seen:
    """A workload's objects."""

    main: Object
    """The Job or the Deployment."""
    pods: Sequence[Object] = ()
    warnings: Mapping[str, str] = field(default_factory=dict)
    """The newest Warning event of each object, by its name: "reason: message"."""


# Why a container does not start: its waiting reason → what to do.
WAITING: Mapping[str, str] = {
    "ImagePullBackOff": "its image cannot be pulled; check the name, the registry and image.pullSecrets",
    "ErrImagePull": "its image cannot be pulled; check the name, the registry and image.pullSecrets",
    "ErrImageNeverPull": "its image is not on the node, and the pull policy forbids to fetch it",
    "InvalidImageName": "its image's name is wrong; check image.registry and the job's image values",
    "CreateContainerConfigError": "something that its environment or volumes name is missing; create it",
    "CreateContainerError": "the node cannot create its container",
    "RunContainerError": "the node cannot run its container; is the image for this CPU?",
    "CrashLoopBackOff": "it crashes again and again",
}
# Reasons of events that say why a pod or a Job does not come: what to do.
WARNINGS: Mapping[str, str] = {
    "FailedScheduling": "",
    "FailedMount": "a volume cannot be mounted; does the Secret or ConfigMap exist?",
    "FailedAttachVolume": "a volume cannot be attached",
    "FailedCreatePodSandBox": "the node cannot start the pod",
    "FailedCreate": "its pod is refused; raise the quota, or change what the sentence names",
}
# Reasons of a pod's DisruptionTarget condition: who took it away.
DISRUPTIONS: Mapping[str, str] = {
    "PreemptionByScheduler": "made room for a workload of higher priority",
    "EvictionByEvictionAPI": "was evicted (its node is drained)",
    "DeletionByTaintManager": "was on a node that no longer answers",
    "DeletionByPodGC": "was on a node that has gone",
    "TerminationByKubelet": "was evicted by its node, which ran short of memory or disk",
}


def read_job(seen: Seen) -> WorkloadStatus:
    """The status of a Job."""
    job, state = seen.main, seen.main.get("status") or {}
    conditions = {c["type"]: c for c in state.get("conditions") or [] if c.get("status") == "True"}
    start, end = _time(state.get("startTime")), _time(state.get("completionTime"))
    attempt = max(int(state.get("failed") or 0) + 1, 1)
    if "Complete" in conditions:
        return _status(job, Phase.SUCCEEDED, attempt, start=start, end=end)
    if "Failed" in conditions:
        error = job_error(seen, conditions["Failed"])
        end = _time(conditions["Failed"].get("lastTransitionTime"))
        return _status(
            job, Phase.FAILED, max(attempt - 1, 1), error.message, error=error.to_status(), start=start, end=end
        )
    stopping = "FailureTarget" in conditions or "SuccessCriteriaMet" in conditions or _is_going(job)
    if "Suspended" in conditions or job["spec"].get("suspend"):
        queue = (job["metadata"].get("labels") or {}).get("kueue.x-k8s.io/queue-name", "")
        told = f"waits in the queue {queue} (Kueue has not admitted it)" if queue else "is suspended (spec.suspend)"
        return _status(job, Phase.PENDING, attempt, told, stopping=stopping)
    if stopping:
        ending = any(_phase(p) in ("Pending", "Running") for p in seen.pods)
        return _status(job, Phase.RUNNING if ending else Phase.PENDING, attempt, "ends", stopping=True, start=start)
    live = [p for p in seen.pods if _phase(p) in ("Pending", "Running") and not _is_going(p)]
    running = [p for p in live if _phase(p) == "Running"]
    if live and len(running) == len(live):
        began = min((t for p in running if (t := _started(p))), default=start)
        return _status(job, Phase.RUNNING, attempt, start=began)
    if not live and any(_phase(p) == "Succeeded" for p in seen.pods):
        return _status(job, Phase.RUNNING, attempt, "ends", start=start)
    waiting = next((p for p in live if _phase(p) == "Pending"), None)
    message = why_pod_waits(waiting, seen.warnings) if waiting else _why_no_pod(seen)
    return _status(job, Phase.PENDING, attempt, message, start=start)


def read_engine(seen: Seen, address: str) -> WorkloadStatus:
    """The status of an engine's Deployment. A container that has crashed is FAILED: whoever started it begins anew."""
    main = seen.main
    pods = [p for p in seen.pods if not _is_going(p) and _phase(p) != "Failed"]
    crashed = next((c for p in pods for c in _containers(p) if c.get("restartCount") and not c.get("ready")), None)
    if crashed is not None:
        last = ((crashed.get("lastState") or {}).get("terminated")) or {}
        error = _container_error(last) or WorkerLost("the engine's container ended")
        return _status(main, Phase.FAILED, message=error.message, error=error.to_status())
    running = next((p for p in pods if _phase(p) == "Running"), None)
    if running is not None:
        began = _started(running)
        return _status(main, Phase.RUNNING, address=address, start=began, stopping=_is_going(main))
    waiting = next(iter(pods), None)
    message = why_pod_waits(waiting, seen.warnings) if waiting else _why_no_pod(seen)
    return _status(main, Phase.PENDING, message=message, stopping=_is_going(main))


def why_pod_waits(pod: Object, warnings: Mapping[str, str]) -> str:
    """One sentence on a Pending pod."""
    name = pod["metadata"]["name"]
    warning = warnings.get(name, "")
    scheduled = next((c for c in _conditions(pod) if c["type"] == "PodScheduled"), {})
    if scheduled.get("status") == "False":
        if scheduled.get("reason") == "SchedulingGated":
            return "waits for a gate on its pod to be lifted"
        # What the scheduler says of preemption after that helps nobody.
        words = str(scheduled.get("message") or "no node has been found yet").partition(" preemption:")[0].rstrip(". ")
        reason, _, karpenter = warning.partition(": ")
        karpenter = karpenter.partition(" preemption:")[0].rstrip(". ")
        more = f"; {karpenter}" if reason == "FailedScheduling" and karpenter not in words else ""
        return f"waits for a node that fits: {words}{more}"
    for status in _containers(pod):
        waits = (status.get("state") or {}).get("waiting") or {}
        reason, detail = str(waits.get("reason") or ""), str(waits.get("message") or "").strip()
        if reason in WAITING:
            return f"{reason}: {WAITING[reason]}. {detail}".strip()
    reason, _, detail = warning.partition(": ")
    node = (pod.get("spec") or {}).get("nodeName")
    if reason in WARNINGS and not (node and reason == "FailedScheduling"):  # that one is over
        return f"{reason}: {WARNINGS[reason]}. {detail}".strip()
    return f"starts on node {node}" if node else "waits for the scheduler"


def job_error(seen: Seen, failed: Object) -> FabrictuneError:
    """Why a Job has failed: a server's own word, the worker's, the container's, the pod's, the Job's."""
    told = (seen.main["metadata"].get("annotations") or {}).get(ENDED_BECAUSE)
    if told:
        return DeadlineExceeded(told)
    ended = sorted((p for p in seen.pods if _phase(p) == "Failed"), key=_ended_at)
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
    """Why a pod has failed; None when it does not tell."""
    for status in _containers(pod):
        ended = (status.get("state") or {}).get("terminated") or {}
        error = _container_error(ended)
        if error is not None:
            return error
    state = pod.get("status") or {}
    if state.get("reason") == "Evicted":
        words = state.get("message", "")
        return ResourceExhausted(f"its node evicted it: {words} Ask for more memory or ephemeral storage")
    target = next((c for c in _conditions(pod) if c["type"] == "DisruptionTarget" and c.get("status") == "True"), None)
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


def _container_error(ended: Object) -> FabrictuneError | None:
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


def _why_no_pod(seen: Seen) -> str:
    reason, _, detail = seen.warnings.get(seen.main["metadata"]["name"], "").partition(": ")
    if reason in WARNINGS:
        return f"{reason}: {WARNINGS[reason]}. {detail}"
    last = max((p for p in seen.pods if _phase(p) == "Failed"), key=_ended_at, default=None)
    error = pod_error(last) if last is not None else None
    if error is not None:
        return f"the last attempt ended ({error.message}); the next one is on its way"
    return "its pod is on its way"


def api_error(code: int, message: str, what: str) -> FabrictuneError:
    """An API server's refusal as one of our errors. what: what was tried, such as "create the Job training-x"."""
    lower = message.lower()
    if "exceeded quota" in lower:
        return ResourceExhausted(f"cannot {what}: {message}. Raise the namespace's ResourceQuota, or ask for less")
    if "failed calling webhook" in lower:
        return Unavailable(f"cannot {what}: an admission webhook does not answer. {message}")
    if code == 403:
        return FailedPrecondition(
            f"cannot {what}: {message}. This service's Role lacks it, or an admission policy forbids it; "
            "`helm upgrade` restores the Role"
        )
    if code in (400, 422):
        return FailedPrecondition(f"cannot {what}, the template does not fit: {message}")
    return Unavailable(f"cannot {what}: the API server answers {code} {message}")


def _status(
    main: Object, phase: Phase, attempt: int = 1, message: str = "", *, error: status_pb2.Status | None = None,
    address: str = "", start: datetime | None = None, end: datetime | None = None, stopping: bool = False,
) -> WorkloadStatus:  # fmt: skip
    metadata = main["metadata"]
    digest = (metadata.get("annotations") or {}).get(DIGEST, "")
    kind = (metadata.get("labels") or {}).get(KIND, "")
    return WorkloadStatus(
        metadata["name"], kind, digest, phase, attempt, message, error, address, start, end, stopping or _is_going(main)
    )


def _phase(pod: Object) -> str:
    return str((pod.get("status") or {}).get("phase", ""))


def _is_going(thing: Object) -> bool:
    return bool(thing["metadata"].get("deletionTimestamp"))


def _conditions(pod: Object) -> Sequence[Object]:
    return (pod.get("status") or {}).get("conditions") or []


def _containers(pod: Object) -> Sequence[Object]:
    state = pod.get("status") or {}
    return [*(state.get("initContainerStatuses") or []), *(state.get("containerStatuses") or [])]


def _started(pod: Object) -> datetime | None:
    return next(
        (t for c in _containers(pod) if (t := _time(((c.get("state") or {}).get("running") or {}).get("startedAt")))),
        None,
    )


def _ended_at(pod: Object) -> str:
    ends = [((c.get("state") or {}).get("terminated") or {}).get("finishedAt") or "" for c in _containers(pod)]
    return max(ends, default="") or str(pod["metadata"].get("creationTimestamp", ""))


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None
