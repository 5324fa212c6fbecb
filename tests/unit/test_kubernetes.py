"""Manifests, conditions and limits over objects as a real API server (1.37) gave them; tests/e2e talks to one."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from google.rpc import code_pb2

from services.common.clusters import Phase, Workload
from services.common.clusters.api import refusal
from services.common.clusters.conditions import read_engine, read_job
from services.common.clusters.limits import deadline_patch, is_lost
from services.common.clusters.manifests import fill_template, read_template
from services.common.clusters.objects import Seen
from services.common.errors import FailedPrecondition, InvalidData, PermissionDenied, ResourceExhausted, Unavailable

NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
TEMPLATE = """
apiVersion: batch/v1
kind: Job
metadata: {name: training, labels: {app.kubernetes.io/instance: ft}}
spec:
  backoffLimit: 2
  template:
    metadata: {labels: {app.kubernetes.io/instance: ft}}
    spec:
      initContainers: [{name: first, image: i}]
      containers:
        - {name: worker, image: i, env: [{name: KEPT, value: a}, {name: CHANGED, value: b}]}
---
apiVersion: v1
kind: Service
metadata: {name: training}
spec: {clusterIP: None, publishNotReadyAddresses: true}
"""


def _ago(seconds: float) -> str:
    return (NOW - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _job(*conditions: tuple[str, str], **spec: Any) -> dict[str, Any]:
    state = {"startTime": _ago(100), "conditions": [{"type": t, "status": "True", "reason": r} for t, r in conditions]}
    notes = {
        "fabrictune.dev/digest": "d",
        "fabrictune.dev/resources": json.dumps({"queue_timeout": 60, "run_timeout": 9}),
    }
    labels = {"fabrictune.dev/kind": "training"}
    metadata = {
        "name": "training-x",
        "uid": "u",
        "labels": labels,
        "annotations": notes,
        "creationTimestamp": _ago(100),
    }
    return {"kind": "Job", "metadata": metadata, "spec": spec, "status": state}


def _pod(phase: str, container: dict[str, Any] | None = None, **state: Any) -> dict[str, Any]:
    statuses = [{"name": "worker", "state": container or {}}]
    return {
        "metadata": {"name": "training-x-abcde", "creationTimestamp": _ago(99)},
        "spec": {"nodeName": "n1"},
        "status": {"phase": phase, "containerStatuses": statuses, **state},
    }


def _waits(reason: str, message: str) -> dict[str, Any]:
    return {"waiting": {"reason": reason, "message": message}}


def _failed(*pods: dict[str, Any], reason: str = "BackoffLimitExceeded") -> Seen:
    return Seen(_job(("Failed", reason)), pods)


def _ended(code: int, reason: str = "Error", message: str = "") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": _ago(1)}}


@pytest.fixture
def template(tmp_path: Path) -> list[dict[str, Any]]:
    (tmp_path / "training.yaml").write_text(TEMPLATE)
    return read_template(tmp_path, "training")


def test_a_template_is_filled_in_and_what_the_operator_wrote_stays(template: list[dict[str, Any]]) -> None:
    work = Workload(
        "training", "training-x", (sys.executable, "-m", "services.training.worker"), {"CHANGED": "c"}, "d", gpus=2,
        memory="8Gi", retries=3,
    )  # fmt: skip
    [job] = fill_template(template, work)
    pod = job["spec"]["template"]["spec"]
    worker = pod["containers"][0]
    assert job["metadata"]["name"] == "training-x" and job["metadata"]["labels"]["app.kubernetes.io/instance"] == "ft"
    assert worker["command"] == ["python", "-m", "services.training.worker"]
    assert worker["env"] == [{"name": "KEPT", "value": "a"}, {"name": "CHANGED", "value": "c"}]
    assert pod["initContainers"][0]["env"] == [{"name": "CHANGED", "value": "c"}]
    assert worker["resources"] == {"requests": {"memory": "8Gi"}, "limits": {"memory": "8Gi", "nvidia.com/gpu": 2}}
    assert job["spec"]["backoffLimit"] == 3
    assert yaml.safe_load(TEMPLATE.split("---")[0])["metadata"]["name"] == template[0]["metadata"]["name"] == "training"


def test_several_nodes_are_an_indexed_job_that_finds_its_first_pod_by_name(template: list[dict[str, Any]]) -> None:
    job, service = fill_template(template, Workload("training", "training-x", ("python",), nodes=2, retries=1))
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["completionMode"]) == (2, 2, "Indexed")
    env = {e["name"]: e["value"] for e in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["MASTER_ADDR"] == "training-x-0.training-x"
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"] == "training-x"
    assert service["spec"]["selector"] == {"fabrictune.dev/name": "training-x"}


@pytest.mark.parametrize(
    ("text", "said"), [("a: [", "is not YAML"), ("kind: Pod", "exactly one Job"), (None, "cannot be read")]
)
def test_a_template_that_cannot_be_used_is_named(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "training.yaml").write_text(text)
    with pytest.raises(FailedPrecondition, match=said) as caught:
        read_template(tmp_path, "training")
    assert "training.yaml" in caught.value.message


UNSCHEDULABLE = {
    "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
    "message": "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.",
}  # fmt: skip
DISRUPTED = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}


@pytest.mark.parametrize(
    ("seen", "phase", "said"),
    [
        (Seen(_job()), Phase.PENDING, "its pod is on its way"),
        (Seen(_job(), warnings={"training-x": "FailedCreate: exceeded quota: q"}), Phase.PENDING, "raise the quota"),
        (Seen(_job(suspend=True)), Phase.PENDING, "is suspended"),
        (Seen(_job(), [_pod("Pending", conditions=[UNSCHEDULABLE])]), Phase.PENDING, "1 Insufficient nvidia.com/gpu"),
        (
            Seen(
                _job(), [_pod("Pending", conditions=[UNSCHEDULABLE])],
                {"training-x-abcde": "FailedScheduling: no instance type has 17 GPUs"},
            ),
            Phase.PENDING, "Insufficient nvidia.com/gpu; no instance type has 17 GPUs",
        ),
        (
            Seen(_job(), [_pod("Pending", _waits("ImagePullBackOff", 'image "x"'))]),
            Phase.PENDING, 'cannot be pulled; check the name, the registry and image.pullSecrets. image "x"',
        ),
        (
            Seen(_job(), [_pod("Pending", _waits("CreateContainerConfigError", 'secret "s" not found'))]),
            Phase.PENDING, 'secret "s" not found',
        ),
        (Seen(_job(), [_pod("Pending")], {"training-x-abcde": "FailedScheduling: no"}), Phase.PENDING, "starts on node n1"),
        (
            Seen(_job(), [_pod("Pending")], {"training-x-abcde": 'FailedMount: configmap "c" not found'}),
            Phase.PENDING, 'configmap "c" not found',
        ),
        (Seen(_job(), [_pod("Running", {"running": {"startedAt": _ago(9)}})]), Phase.RUNNING, ""),
        (
            Seen(_job(parallelism=2), [_pod("Running"), _pod("Pending", conditions=[UNSCHEDULABLE])]),
            Phase.PENDING, "1 Insufficient nvidia.com/gpu",
        ),
        (
            Seen(_job(parallelism=2), [_pod("Running")], {"training-x": "FailedCreate: exceeded quota: q"}),
            Phase.PENDING, "raise the quota",
        ),
        (Seen(_job(parallelism=2), [_pod("Running"), _pod("Running")]), Phase.RUNNING, ""),
        (Seen(_job(parallelism=2), [_pod("Running"), _pod("Succeeded")]), Phase.RUNNING, ""),
        (Seen(_job(("FailureTarget", "")), [_pod("Running")]), Phase.RUNNING, "ends"),
        (Seen(_job(), [_pod("Succeeded")]), Phase.RUNNING, "ends"),
        (Seen(_job(), [_pod("Failed", _ended(75))]), Phase.PENDING, "the last attempt ended .*the next one is on its way"),
        (Seen(_job(("Complete", ""))), Phase.SUCCEEDED, ""),
        (_failed(_pod("Failed", _ended(137, "OOMKilled"))), Phase.FAILED, "OOMKilled"),
        (_failed(_pod("Failed", _ended(3, message="boom"))), Phase.FAILED, "status 3.*boom"),
        (_failed(_pod("Failed", reason="Evicted", message="low on disk.")), Phase.FAILED, "evicted it: low on disk"),
        (_failed(_pod("Failed", _ended(137), reason="Evicted", message="too big.")), Phase.FAILED, "evicted it: too big"),
        (_failed(_pod("Failed", _ended(137), conditions=[DISRUPTED])), Phase.FAILED, "a node that no longer answers"),
        (_failed(_pod("Failed", conditions=[DISRUPTED])), Phase.FAILED, "a node that no longer answers"),
        (Seen(_job(("Failed", "DeadlineExceeded"))), Phase.FAILED, r"longer than 9 s \(run_timeout\)"),
        (Seen(_job(("Failed", "BackoffLimitExceeded"))), Phase.FAILED, "left no pod to ask"),
    ],
)  # fmt: skip
def test_every_condition_has_a_state_and_a_sentence(seen: Seen, phase: Phase, said: str) -> None:
    status = read_job(seen)
    assert status.phase is phase and re.search(said, status.message), status.message
    assert (status.error is not None) == (phase is Phase.FAILED)


def test_what_a_worker_wrote_when_it_ended_is_the_jobs_error() -> None:
    told = InvalidData("row 7 is broken").to_status()
    word = json.dumps({"exit_code": 65, "status": json_format.MessageToDict(told)})
    status = read_job(Seen(_job(("Failed", "PodFailurePolicy")), [_pod("Failed", _ended(65, message=word))]))
    assert status.error is not None
    assert (status.error.code, status.error.message) == (code_pb2.INVALID_ARGUMENT, "row 7 is broken")


def test_an_engine_that_crashed_is_failed_so_that_the_rollout_begins_anew() -> None:
    deployment = {"kind": "Deployment", "metadata": {"name": "engine-x", "annotations": {}, "labels": {}}, "spec": {}}
    pod = _pod("Running")
    pod["status"]["containerStatuses"] = [{"restartCount": 1, "ready": False, "lastState": _ended(139)}]
    assert read_engine(Seen(deployment, [pod]), "http://e:8000").phase is Phase.FAILED
    fine = read_engine(Seen(deployment, [_pod("Running", {"running": {"startedAt": _ago(1)}})]), "http://e:8000")
    assert (fine.phase, fine.address, fine.each) == (Phase.RUNNING, "http://e:8000", ())


def test_a_crashed_replica_takes_no_pod_with_it_that_is_ready() -> None:
    deployment = {"kind": "Deployment", "metadata": {"name": "engine-x", "annotations": {}, "labels": {}}, "spec": {}}
    crashed, *others = [_pod("Running", {"running": {"startedAt": _ago(1)}}) for _ in range(3)]
    crashed["status"]["containerStatuses"] = [
        {"restartCount": 1, "ready": False, "lastState": _ended(137, "OOMKilled")}
    ]
    for pod in others:
        pod["status"] |= {"podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]}
    status = read_engine(Seen(deployment, [crashed, *others]), "http://e:8000")
    assert (status.phase, status.error, len(status.each)) == (Phase.RUNNING, None, 2)


def test_an_engine_scaled_to_zero_is_asleep_whatever_is_left_of_its_pods() -> None:
    metadata = {"name": "engine-x", "annotations": {}, "labels": {}}
    deployment = {"kind": "Deployment", "metadata": metadata, "spec": {"replicas": 0}}
    for pods in ((), (_pod("Running"),)):
        status = read_engine(Seen(deployment, pods), "http://e:8000")
        assert (status.phase, status.asleep) == (Phase.PENDING, True) and "scaled to 0" in status.message
    going = {**deployment, "metadata": {**metadata, "deletionTimestamp": _ago(1)}}
    assert not read_engine(Seen(going), "http://e:8000").asleep
    awake = {**deployment, "spec": {"replicas": 1}}
    assert not read_engine(Seen(awake), "http://e:8000").asleep


def test_an_engines_pods_are_named_each_once_they_are_ready() -> None:
    deployment = {"kind": "Deployment", "metadata": {"name": "engine-x", "annotations": {}, "labels": {}}, "spec": {}}
    pods = [_pod("Running", {"running": {"startedAt": _ago(1)}}) for _ in range(3)]
    for number, (pod, ready) in enumerate(zip(pods, ("True", "False", "True"), strict=True)):
        pod["status"] |= {"podIP": f"10.0.0.{number}", "conditions": [{"type": "Ready", "status": ready}]}
    status = read_engine(Seen(deployment, pods), "http://e:8000")
    assert status.each == ("http://10.0.0.0:8000", "http://10.0.0.2:8000")


def test_the_time_in_the_queue_and_the_running_time_have_a_limit_each() -> None:
    waiting = _job()
    patch = deadline_patch(waiting, read_job(Seen(waiting)), NOW)
    assert patch is not None and patch["spec"] == {"activeDeadlineSeconds": 1}
    assert "queue_timeout 60 s" in patch["metadata"]["annotations"]["fabrictune.dev/ended-because"]
    running = Seen(_job(), [_pod("Running", {"running": {"startedAt": _ago(30)}})])
    set_now = deadline_patch(running.main, read_job(running), NOW)
    assert set_now is not None and set_now["spec"] == {"activeDeadlineSeconds": 79}  # 70 waited + 9
    suspended = _job(suspend=True)
    assert deadline_patch(suspended, read_job(Seen(suspended)), NOW) is None  # its clock stands


@pytest.mark.parametrize(
    ("nodes", "after"),
    [
        (1, ()),
        (1, (_pod("Pending", conditions=[UNSCHEDULABLE]),)),
        (1, (_pod("Failed", _ended(143)),)),
        (2, (_pod("Running"), _pod("Pending"))),
    ],
)
def test_the_time_in_the_queue_has_no_limit_for_a_job_that_ran_and_was_drained(
    nodes: int, after: tuple[dict[str, Any], ...]
) -> None:
    job = _job(parallelism=nodes, activeDeadlineSeconds=10_000)
    running = Seen(job, [_pod("Running", {"running": {"startedAt": _ago(90)}})] * nodes)
    patch = deadline_patch(job, read_job(running), NOW)
    assert patch is not None and "spec" not in patch
    job["metadata"]["annotations"] |= patch["metadata"]["annotations"]
    assert deadline_patch(job, read_job(running), NOW) is None  # noted once
    drained = Seen(job, after)
    assert read_job(drained).phase is Phase.PENDING
    assert deadline_patch(job, read_job(drained), NOW) is None


@pytest.mark.parametrize("first", [{"ready": 1}, {"failed": 1}])
def test_the_time_in_the_queue_ends_for_a_job_of_which_only_one_node_has_a_place(first: dict[str, int]) -> None:
    job = _job(parallelism=2)
    job["status"] |= first
    half = Seen(job, [_pod("Running"), _pod("Pending", conditions=[UNSCHEDULABLE])])
    patch = deadline_patch(job, read_job(half), NOW)
    assert patch is not None and patch["spec"] == {"activeDeadlineSeconds": 1}
    assert "Insufficient nvidia.com/gpu" in patch["metadata"]["annotations"]["fabrictune.dev/ended-because"]


def test_the_running_time_of_a_job_on_several_nodes_begins_with_its_last() -> None:
    started = [_pod("Running", {"running": {"startedAt": _ago(seconds)}}) for seconds in (90, 30)]
    running = Seen(_job(parallelism=2), started)
    patch = deadline_patch(running.main, read_job(running), NOW)
    assert patch is not None and patch["spec"] == {"activeDeadlineSeconds": 79}


def test_a_pod_is_given_up_only_when_its_node_does_not_answer() -> None:
    going = _pod("Running", conditions=[DISRUPTED])
    going["metadata"]["deletionTimestamp"] = _ago(60)
    assert is_lost(going, NOW)
    going["status"]["conditions"] = []
    assert not is_lost(going, NOW)  # a slow one on a node that answers


def test_a_pod_on_a_silent_node_is_not_given_its_grace_period() -> None:
    silent = [{"type": "ContainersReady", "status": "True"}, {"type": "Ready", "status": "False"}, DISRUPTED]
    going = _pod("Running", conditions=silent)
    going["metadata"] |= {"deletionTimestamp": _ago(-95), "deletionGracePeriodSeconds": 120}
    assert is_lost(going, NOW)  # told 25 s ago
    going["metadata"]["deletionTimestamp"] = _ago(-110)
    assert not is_lost(going, NOW)
    going["metadata"]["deletionTimestamp"] = _ago(-95)
    going["status"]["conditions"] = [{"type": "Ready", "status": "True"}, DISRUPTED]
    assert not is_lost(going, NOW)  # drained by a taint, and still saving


@pytest.mark.parametrize(
    ("code", "message", "kind", "said"),
    [
        (403, 'pods "x" is forbidden: exceeded quota: q', ResourceExhausted, "ResourceQuota"),
        (500, 'failed calling webhook "k": connection refused', Unavailable, "webhook does not answer"),
        (403, "cannot create resource jobs", PermissionDenied, "the verb 'create' for jobs"),
        (422, "spec.x: Invalid value", FailedPrecondition, "template does not fit"),
        (503, "etcd", Unavailable, "503"),
    ],
)
def test_a_refusal_of_the_api_server_says_what_to_do(code: int, message: str, kind: type, said: str) -> None:
    error = refusal(code, message, "create jobs x")
    assert isinstance(error, kind) and said in error.message
