"""What Kubernetes says of a Job or an engine's Deployment and its pods → our status and a sentence with the fix.

Pure functions over the objects as the API gives them (dicts). The tables name every condition that users meet; a reason
that no table knows is passed on in Kubernetes' own words.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from google.rpc import status_pb2

from services.common.clusters import Phase, WorkloadStatus
from services.common.clusters.failures import container_error, job_error, pod_error
from services.common.clusters.manifests import DIGEST, KIND
from services.common.clusters.objects import (
    Object,
    Seen,
    conditions_of,
    containers_of,
    ended_at,
    is_going,
    parse_time,
    phase_of,
    pods_of,
    started_at,
)
from services.common.errors import WorkerLost

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
ASLEEP = "is asleep: its Deployment is scaled to 0; its autoscaler wakes it when requests wait"


def read_job(seen: Seen) -> WorkloadStatus:
    """The status of a Job."""
    job, state = seen.main, seen.main.get("status") or {}
    conditions = {c["type"]: c for c in state.get("conditions") or [] if c.get("status") == "True"}
    start, end = parse_time(state.get("startTime")), parse_time(state.get("completionTime"))
    attempt = max(int(state.get("failed") or 0) + 1, 1)
    if "Complete" in conditions:
        return _status(job, Phase.SUCCEEDED, attempt, start=start, end=end)
    if "Failed" in conditions:
        error = job_error(seen, conditions["Failed"])
        end = parse_time(conditions["Failed"].get("lastTransitionTime"))
        return _status(
            job, Phase.FAILED, max(attempt - 1, 1), error.message, error=error.to_status(), start=start, end=end
        )
    stopping = "FailureTarget" in conditions or "SuccessCriteriaMet" in conditions or is_going(job)
    if "Suspended" in conditions or job["spec"].get("suspend"):
        queue = (job["metadata"].get("labels") or {}).get("kueue.x-k8s.io/queue-name", "")
        told = f"waits in the queue {queue} (Kueue has not admitted it)" if queue else "is suspended (spec.suspend)"
        return _status(job, Phase.PENDING, attempt, told, stopping=stopping)
    if stopping:
        ending = any(phase_of(p) in ("Pending", "Running") for p in seen.pods)
        return _status(job, Phase.RUNNING if ending else Phase.PENDING, attempt, "ends", stopping=True, start=start)
    live = [p for p in seen.pods if phase_of(p) in ("Pending", "Running") and not is_going(p)]
    running = [p for p in live if phase_of(p) == "Running"]
    ended = sum(phase_of(p) == "Succeeded" for p in seen.pods)
    if running and len(running) + ended >= pods_of(job):  # fewer than all wait for the others
        began = max((t for p in running if (t := started_at(p))), default=start)
        return _status(job, Phase.RUNNING, attempt, start=began)
    if not live and ended >= pods_of(job):
        return _status(job, Phase.RUNNING, attempt, "ends", start=start)
    waiting = next((p for p in live if phase_of(p) == "Pending"), None)
    message = why_pod_waits(waiting, seen.warnings) if waiting else _why_no_pod(seen)
    return _status(job, Phase.PENDING, attempt, message, start=start)


def read_engine(seen: Seen, address: str) -> WorkloadStatus:
    """The status of an engine's Deployment. FAILED once a container has crashed and no pod is ready: whoever started it begins
    anew. While others answer, the kubelet starts the crashed one again.
    """
    main = seen.main
    if main["spec"].get("replicas") == 0 and not is_going(main):
        return _status(main, Phase.PENDING, message=ASLEEP, asleep=True)
    pods = [p for p in seen.pods if not is_going(p) and phase_of(p) != "Failed"]
    crashed = next((c for p in pods for c in containers_of(p) if c.get("restartCount") and not c.get("ready")), None)
    if crashed is not None and not any(_is_ready(p) for p in pods):
        last = ((crashed.get("lastState") or {}).get("terminated")) or {}
        error = container_error(last) or WorkerLost("the engine's container ended")
        return _status(main, Phase.FAILED, message=error.message, error=error.to_status())
    running = next((p for p in pods if phase_of(p) == "Running"), None)
    if running is not None:
        began = started_at(running)
        port = address.rpartition(":")[2]
        each = tuple(f"http://{p['status']['podIP']}:{port}" for p in pods if _is_ready(p))
        return _status(main, Phase.RUNNING, address=address, start=began, stopping=is_going(main), each=each)
    waiting = next(iter(pods), None)
    message = why_pod_waits(waiting, seen.warnings) if waiting else _why_no_pod(seen)
    return _status(main, Phase.PENDING, message=message, stopping=is_going(main))


def _is_ready(pod: Object) -> bool:
    return any(c["type"] == "Ready" and c.get("status") == "True" for c in conditions_of(pod))


def why_pod_waits(pod: Object, warnings: Mapping[str, str]) -> str:
    """One sentence on a Pending pod."""
    name = pod["metadata"]["name"]
    warning = warnings.get(name, "")
    scheduled = next((c for c in conditions_of(pod) if c["type"] == "PodScheduled"), {})
    if scheduled.get("status") == "False":
        if scheduled.get("reason") == "SchedulingGated":
            return "waits for a gate on its pod to be lifted"
        # What the scheduler says of preemption after that helps nobody.
        words = str(scheduled.get("message") or "no node has been found yet").partition(" preemption:")[0].rstrip(". ")
        reason, _, karpenter = warning.partition(": ")
        karpenter = karpenter.partition(" preemption:")[0].rstrip(". ")
        more = f"; {karpenter}" if reason == "FailedScheduling" and karpenter not in words else ""
        return f"waits for a node that fits: {words}{more}"
    for status in containers_of(pod):
        waits = (status.get("state") or {}).get("waiting") or {}
        reason, detail = str(waits.get("reason") or ""), str(waits.get("message") or "").strip()
        if reason in WAITING:
            return f"{reason}: {WAITING[reason]}. {detail}".strip()
    reason, _, detail = warning.partition(": ")
    node = (pod.get("spec") or {}).get("nodeName")
    if reason in WARNINGS and not (node and reason == "FailedScheduling"):  # that one is over
        return f"{reason}: {WARNINGS[reason]}. {detail}".strip()
    return f"starts on node {node}" if node else "waits for the scheduler"


def _why_no_pod(seen: Seen) -> str:
    reason, _, detail = seen.warnings.get(seen.main["metadata"]["name"], "").partition(": ")
    if reason in WARNINGS:
        return f"{reason}: {WARNINGS[reason]}. {detail}"
    last = max((p for p in seen.pods if phase_of(p) == "Failed"), key=ended_at, default=None)
    error = pod_error(last) if last is not None else None
    if error is not None:
        return f"the last attempt ended ({error.message}); the next one is on its way"
    return "its pod is on its way"


def _status(
    main: Object, phase: Phase, attempt: int = 1, message: str = "", *, error: status_pb2.Status | None = None,
    address: str = "", start: datetime | None = None, end: datetime | None = None, stopping: bool = False,
    each: tuple[str, ...] = (), asleep: bool = False,
) -> WorkloadStatus:  # fmt: skip
    metadata = main["metadata"]
    digest = (metadata.get("annotations") or {}).get(DIGEST, "")
    kind = (metadata.get("labels") or {}).get(KIND, "")
    return WorkloadStatus(
        metadata["name"], kind, digest, phase, attempt, message, error, address, start, end, stopping or is_going(main),
        each, asleep,
    )  # fmt: skip
