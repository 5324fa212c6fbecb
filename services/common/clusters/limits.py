"""How long a Kubernetes Job may wait and run, and when a pod is given up. Pure; `kubernetes` acts on it.

`activeDeadlineSeconds` alone would count the wait for a node, and a bad image never fails a Job by itself. So a Job gets
that deadline only once it runs, and one that has waited too long gets a deadline of one second and a note that says why:
the Job controller then ends it, whatever happens to us. That it has run is noted on it as well: after a drain nothing else
tells a Job that waits for another place from one that never had any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from services.common.clusters import Phase, WorkloadStatus
from services.common.clusters.failures import ENDED_BECAUSE
from services.common.clusters.manifests import RESOURCES
from services.common.clusters.objects import Object, conditions_of, parse_time, pods_of

BEGAN = "fabrictune.dev/began"
"""Annotation on a Job: when all its pods ran at the same time for the first time."""
LOST_SECONDS = 20.0
"""A pod that was told to go so long ago, on a node that no longer answers, has not heard it: its grace period never began."""


def deadline_patch(job: Object, status: WorkloadStatus, now: datetime) -> dict[str, Any] | None:
    """What to change in a Job so that its limits hold; None when nothing is to be changed."""
    annotations = job["metadata"].get("annotations") or {}
    if ENDED_BECAUSE in annotations or status.stopping:
        return None
    limits = json.loads(annotations.get(RESOURCES) or "{}")
    queue, run = float(limits.get("queue_timeout") or 0), float(limits.get("run_timeout") or 0)
    began = parse_time((job.get("status") or {}).get("startTime"))
    if status.phase is Phase.PENDING and queue and not _has_run(job) and not job["spec"].get("suspend"):
        # Suspended, the clock stands: startTime is set anew when Kueue admits the Job.
        waited = (now - (began or parse_time(job["metadata"].get("creationTimestamp")) or now)).total_seconds()
        if waited > queue:
            why = f"waited {waited:.0f} s for a place to run (queue_timeout {queue:.0f} s): {status.message}"
            return {"metadata": {"annotations": {ENDED_BECAUSE: why}}, "spec": {"activeDeadlineSeconds": 1}}
    patch: dict[str, Any] = {}
    if status.phase is Phase.RUNNING and began and status.start_time:
        if BEGAN not in annotations:
            patch["metadata"] = {"annotations": {BEGAN: status.start_time.isoformat()}}
        if run and job["spec"].get("activeDeadlineSeconds") is None:
            deadline = max(int((status.start_time - began).total_seconds() + run), 1)
            patch["spec"] = {"activeDeadlineSeconds": deadline}
    return patch or None


def is_lost(pod: Object, now: datetime) -> bool:
    """Whether a pod was told to go long ago, on a node that no longer answers."""
    gone = parse_time(pod["metadata"].get("deletionTimestamp"))  # when its grace period ends
    if gone is None:
        return False
    conditions = {c["type"]: c for c in conditions_of(pod)}
    late = (now - gone).total_seconds()
    if _is_ready(conditions, "ContainersReady") and not _is_ready(conditions, "Ready"):
        # Said by the control plane of pods on a node that is silent; a kubelet never says the two apart (no readiness gates).
        return late + float(pod["metadata"].get("deletionGracePeriodSeconds") or 0) >= LOST_SECONDS
    return bool(
        late >= LOST_SECONDS and conditions.get("DisruptionTarget", {}).get("reason") == "DeletionByTaintManager"
    )


def _is_ready(conditions: Mapping[str, Any], kind: str) -> bool:
    return bool(conditions.get(kind, {}).get("status") == "True")


def _has_run(job: Object) -> bool:
    state, pods = job.get("status") or {}, pods_of(job)
    # A job on several nodes has not run when one of its pods has: that one waits for the others, and fails in the end.
    alone = pods == 1 and (state.get("failed") or state.get("succeeded"))
    return bool(BEGAN in (job["metadata"].get("annotations") or {}) or alone or (state.get("ready") or 0) >= pods)
