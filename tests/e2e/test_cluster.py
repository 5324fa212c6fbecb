"""What a user meets on a cluster, in order: install, run, scale, lose machines, upgrade, uninstall. `make e2e` runs it."""

from __future__ import annotations

import json
import os
import ssl
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest

from services.inference.engine import engine_name
from tests.e2e.conftest import MODEL, ROOT, Release

pytestmark = pytest.mark.timeout(1800)
Note = Callable[[str], None]

needs_pool = pytest.mark.skipif(
    not os.environ.get("E2E_POOL"), reason="E2E_POOL is not set: no GPU nodes come from zero on this cluster"
)
needs_kill = pytest.mark.skipif(
    not os.environ.get("E2E_KILL_NODE"), reason="E2E_KILL_NODE is not set: no command ends a node of this cluster"
)
ENDED = {"SUCCEEDED", "FAILED", "CANCELLED"}


@pytest.fixture(scope="module", autouse=True)
def rows(release: Release) -> None:
    for name, count in (("train", 8), ("test", 6)):
        lines = (ROOT / f"examples/data/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        short = sorted(lines, key=len)[:count]
        (release.folder / f"{name}.jsonl").write_text("\n".join(short) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def dataset(release: Release, rows: None) -> str:
    release.fabrictune("models", "import", "smollm2-135m-instruct")
    release.fabrictune("convert", "train.jsonl", "--id", "e2e")
    return "datasets/e2e"


def test_helm_test_says_that_all_is_well(release: Release, note: Note) -> None:
    said = release.run("helm", "test", "fabrictune", "-n", release.namespace, "--logs", "--timeout", "3m")
    assert "failed" not in said.lower().replace("failed:      0", ""), said
    images = release.get("pods")["items"]
    note(f"{len(images)} pods")


def test_every_server_is_ready_under_pod_security_restricted(release: Release) -> None:
    names = {d["metadata"]["name"].removeprefix("fabrictune-") for d in release.get("deployments")["items"]}
    assert {"conversion", "training", "merging", "evaluation", "inference", "pipeline"} <= names
    servers = release.get("pods", "-l", "app.kubernetes.io/instance=fabrictune,!fabrictune.dev/kind")["items"]
    assert all(s["restartCount"] == 0 for pod in servers for s in pod["status"]["containerStatuses"])
    for each in release.get("deployments")["items"]:
        assert each["status"].get("readyReplicas") == each["spec"]["replicas"], each["metadata"]["name"]


def test_the_pipeline_ends_with_a_deployment_that_answers(release: Release, note: Note) -> None:
    spec = {
        "conversion": {
            "sources": [{"uri": "train.jsonl", "split": "train"}, {"uri": "test.jsonl", "split": "test"}],
            "questions": {"min": 1, "max": 2},
        },
        "training": {
            "base_model": MODEL, "preset": "smollm2-cpu",
            "arguments": {"max_steps": 4, "save_steps": 2, "num_train_epochs": 100},
        },
        "evaluation": {"limit": 3, "max_tokens": 16},
        "deployment": {"deployment": "deployments/e2e", "spec": {"max_model_len": 1024}},
    }  # fmt: skip
    begin = time.monotonic()
    said = release.fabrictune("run", release.write("run.yaml", spec), timeout=1500)
    note(f"from rows to a deployment: {time.monotonic() - begin:.0f} s")
    answer = _ask(release, "e2e")
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"], (said, answer.text)
    connection, trust = _connection(release)
    assert httpx.get(f"{connection['gateway']}/v1/models", verify=trust).status_code == 401
    [entry] = json.loads(release.fabrictune("agentfabric", "config", "deployments/e2e")).values()
    assert entry["api_base"] == f"{connection['gateway']}/v1"


def test_adapters_come_and_go_in_a_running_engine_and_are_there_again_in_the_pod_that_takes_its_place(
    release: Release, dataset: str, note: Note
) -> None:
    first = release.wait_state(release.train("first", 2), ENDED, 300) and "adapters/first"
    spec = {"adapters": [first], "lora": {"max_adapters": 2}, "max_model_len": 1024}
    release.fabrictune("deploy", MODEL, "--as", "beside", "--spec", release.write("beside.yaml", spec))
    [row] = [r for r in release.json("deployments") if r["name"] == "deployments/beside"]
    [revision] = [r["name"] for r in row["revisions"]]
    release.wait_state(release.train("second", 2), ENDED, 300)
    assert _ask(release, "beside:first").status_code == 200 and _ask(release, "beside:second").status_code == 404
    before, begin = _engine(release, revision)["metadata"]["uid"], time.monotonic()
    release.fabrictune("adapters", revision, first, "adapters/second")
    note(f"one more adapter: {time.monotonic() - begin:.1f} s")
    assert [_ask(release, f"beside:{name}").status_code for name in ("first", "second")] == [200, 200]
    release.kubectl("delete", "pod", _engine(release, revision)["metadata"]["name"], "--wait=false")
    release.until(lambda: (p := _engine(release, revision)) and p["metadata"]["uid"] != before, 120, "another pod")
    release.until(lambda: _ask(release, "beside:second").status_code == 200, 300, "an answer of the second adapter")
    release.fabrictune("adapters", revision, "adapters/second")
    assert [_ask(release, f"beside:{name}").status_code for name in ("first", "second")] == [404, 200]
    release.fabrictune("undeploy", "deployments/beside")


def test_seventeen_gpus_wait_with_the_reason_and_fail_at_the_queue_timeout(release: Release, dataset: str) -> None:
    name = release.train("seventeen", 2, batch=17, gpus=17, queue_timeout="20s")
    waiting = release.until(
        lambda: (j := release.job(name))["execution"].get("message", "").startswith("waits for a node") and j, 15, "why"
    )
    assert waiting["execution"]["state"] == "QUEUED" and "nvidia.com/gpu" in waiting["execution"]["message"]
    failed = release.wait_state(name, ENDED, 60)["execution"]
    assert failed["state"] == "FAILED" and "queue_timeout 20 s" in failed["error"]["message"]
    release.until(
        lambda: not release.get("pods", "-l", "fabrictune.dev/name=training-seventeen")["items"], 60, "pods gone"
    )


def test_a_deleted_server_pod_changes_nothing_for_its_job(release: Release, dataset: str, note: Note) -> None:
    name = release.train("server-gone", 8)
    release.until(lambda: release.step(name) >= 1, 300, "the first step")
    uid = (release.pod(name) or {})["metadata"]["uid"]
    release.kubectl("delete", "pod", "-l", "app.kubernetes.io/component=training", "--wait=false")
    ended = release.until(lambda: _quietly(lambda: release.wait_state(name, ENDED, 300)), 330, "its end")
    assert ended["execution"]["state"] == "SUCCEEDED" and int(ended["execution"]["attempt"]) == 1
    assert uid == release.get("pods", "-l", "fabrictune.dev/name=training-server-gone")["items"][0]["metadata"]["uid"]


def test_a_pod_that_cannot_start_says_why_within_seconds(release: Release, dataset: str) -> None:
    missing = {"name": "missing", "configMap": {"name": "no-such-map"}}
    key = {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "no-such-secret", "key": "key"}}}
    jobs = {
        "merging": {"image": {"tag": "no-such-tag"}},
        "conversion": {"env": [key]},
        "training": {"extraVolumes": [missing], "extraVolumeMounts": [{"name": "missing", "mountPath": "/missing"}]},
    }
    release.helm("upgrade", "-f", release.write("broken.yaml", {"jobs": jobs}), "--wait", "--timeout", "3m")
    try:
        adapter = next(iter(release.manifests("adapters")))
        release.fabrictune("merge", "--model", MODEL, "--adapter", adapter, "--id", "bad-image", "--detach")
        release.fabrictune("convert", "train.jsonl", "--id", "no-secret", "--detach")
        release.train("no-map", 2)
        for name, words in (
            ("mergeJobs/bad-image", "cannot be pulled"),
            ("conversionJobs/no-secret", "no-such-secret"),
            ("trainingJobs/no-map", "no-such-map"),
        ):
            release.until(partial(_says, release, name, words), 45, f"{name} {words}")
            release.fabrictune("jobs", "cancel", name)
            assert release.wait_state(name, ENDED, 90)["execution"]["state"] == "CANCELLED"
    finally:
        release.helm("upgrade", "--wait", "--timeout", "3m")


def test_what_a_cluster_refuses_is_said_with_the_fix(release: Release, dataset: str) -> None:
    said = partial(release.fabrictune, "convert", "train.jsonl", "--detach", status=None, timeout=120)
    quota = {"metadata": {"name": "tight"}, "spec": {"hard": {"pods": "1"}}}
    release.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "ResourceQuota", **quota}))
    try:
        release.until(lambda: "hard" in release.get("resourcequota", "tight").get("status", {}), 30, "the quota counts")
        said("--id", "over-quota")
        release.until(partial(_says, release, "conversionJobs/over-quota", "exceeded quota"), 45, "the quota")
    finally:
        release.kubectl("delete", "resourcequota", "tight")
    release.fabrictune("jobs", "cancel", "conversionJobs/over-quota")
    binding = release.get("rolebinding", "fabrictune-conversion")
    release.kubectl("delete", "rolebinding", "fabrictune-conversion")
    try:
        refused = said("--id", "no-role")
        assert "The Role must hold the verb 'create' for jobs" in " ".join(refused.split()), refused
    finally:
        kept = {key: binding["metadata"].get(key) for key in ("name", "labels", "annotations")}
        release.kubectl("apply", "-f", "-", stdin=json.dumps({**binding, "metadata": kept}))


def test_a_worker_beyond_its_memory_or_its_disk_is_told_apart(release: Release, dataset: str) -> None:
    jobs = {
        "conversion": {"resources": {"limits": {"memory": "24Mi"}, "requests": {"memory": "24Mi"}}},
        "training": {"resources": {"limits": {"ephemeral-storage": "8Mi"}}},
    }
    release.helm("upgrade", "-f", release.write("small.yaml", {"jobs": jobs}), "--wait", "--timeout", "3m")
    try:
        release.fabrictune("convert", "train.jsonl", "--id", "no-memory", "--detach")
        release.train("no-disk", 50)
        for name, words in (("conversionJobs/no-memory", "OOMKilled"), ("trainingJobs/no-disk", "evicted")):
            release.until(partial(_says, release, name, words), 120, f"{name} {words}")
            release.fabrictune("jobs", "cancel", name, status=None)
            release.wait_state(name, ENDED, 90)
    finally:
        release.helm("upgrade", "--wait", "--timeout", "3m")


def test_a_suspended_job_waits_and_goes_on_when_it_is_resumed(release: Release, dataset: str) -> None:
    name = release.train("suspended", 30)
    release.until(lambda: release.step(name) >= 3, 300, "steps")
    release.kubectl("patch", "job", "training-suspended", "--type=merge", "-p", '{"spec": {"suspend": true}}')
    release.until(lambda: release.job(name)["execution"]["state"] == "QUEUED", 90, "QUEUED while suspended")
    assert "suspended" in release.job(name)["execution"]["message"]
    release.kubectl("patch", "job", "training-suspended", "--type=merge", "-p", '{"spec": {"suspend": false}}')
    ended = release.wait_state(name, ENDED, 400)["execution"]
    assert ended["state"] == "SUCCEEDED" and int(ended["attempt"]) == 2
    assert "goes on from" in release.fabrictune("jobs", "logs", name)


def test_helm_upgrade_while_a_job_runs_leaves_its_pod_alone(release: Release, dataset: str) -> None:
    name = release.train("upgraded", 12)
    pod = release.until(lambda: release.step(name) >= 1 and release.pod(name), 300, "the first step")
    release.helm("upgrade", "--set", "services.training.podAnnotations.upgraded=yes", "--wait", "--timeout", "3m")
    ended = release.until(lambda: _quietly(lambda: release.wait_state(name, ENDED, 300)), 330, "its end")
    assert ended["execution"]["state"] == "SUCCEEDED" and int(ended["execution"]["attempt"]) == 1
    pods = release.get("pods", "-l", "fabrictune.dev/name=training-upgraded")["items"]
    assert [p["metadata"]["uid"] for p in pods] == [pod["metadata"]["uid"]]


def test_two_nodes_train_as_one_and_start_again_together_when_one_is_lost(
    release: Release, dataset: str, note: Note
) -> None:
    name = release.train("two-nodes", 16, batch=2, nodes=2)
    label = "fabrictune.dev/name=training-two-nodes"
    release.until(lambda: release.step(name) > 4, 500, "step 5")
    pods = release.get("pods", "-l", label)["items"]
    assert {p["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] for p in pods} == {"0", "1"}
    second = next(p for p in pods if p["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] == "1")
    release.kubectl("delete", "pod", second["metadata"]["name"], "--wait=false")
    ended = release.wait_state(name, ENDED, 900)["execution"]
    assert ended["state"] == "SUCCEEDED" and int(ended["attempt"]) >= 2
    assert "goes on from" in release.fabrictune("jobs", "logs", name)
    note(f"attempts: {ended['attempt']}")


def test_a_conversion_on_two_nodes_gives_the_same_dataset_to_the_byte(release: Release, dataset: str) -> None:
    release.fabrictune(
        "convert", "train.jsonl", "--spec", release.write("shares.yaml", {"resources": {"nodes": 2}}), "--id", "shares"
    )
    alone, shared = (release.json("artifacts", "get", name)["files"] for name in (dataset, "datasets/shares"))
    rows = {f["path"]: f["sha256"] for f in alone if f["path"].endswith(".jsonl")}
    assert rows and rows == {f["path"]: f["sha256"] for f in shared if f["path"].endswith(".jsonl")}


@needs_pool
def test_a_training_brings_a_gpu_node_from_zero_and_its_log_outlives_the_node(
    release: Release, dataset: str, note: Note
) -> None:
    _want_pool(release)
    for turn in ("first", "second"):
        assert not _pool_nodes(release)
        begin = time.monotonic()
        name = release.train(f"pool-{turn}", 2)
        pod = release.until(partial(release.pod, name), 300, "a running worker")
        running, node = time.monotonic() - begin, pod["spec"]["nodeName"]
        assert release.wait_state(name, ENDED, 400)["execution"]["state"] == "SUCCEEDED"
        done = time.monotonic()
        release.until(partial(_is_gone, release, node), 60, "the node gone")
        note(f"{turn}: worker running after {running:.0f} s, node gone {time.monotonic() - done:.0f} s after the end")
        assert "ms-swift" in release.fabrictune("jobs", "logs", name) or "step" in release.fabrictune(
            "jobs", "logs", name
        )


@needs_pool
def test_three_drains_in_mid_training_are_three_resumptions(release: Release, dataset: str, note: Note) -> None:
    _want_pool(release)
    name = release.train("drained", 24)
    for turn in range(3):
        seen = 2 + 4 * turn
        pod = release.until(partial(_past, release, name, seen), 400, f"step {seen}")
        node = pod["spec"]["nodeName"]
        release.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=150s")
    ended = release.wait_state(name, ENDED, 600)["execution"]
    assert ended["state"] == "SUCCEEDED" and int(ended["attempt"]) == 4
    assert release.fabrictune("jobs", "logs", name).count("goes on from") == 3
    note("attempts: 4")


@needs_pool
@needs_kill
def test_a_node_that_dies_without_a_word_is_replaced_within_three_minutes(
    release: Release, dataset: str, note: Note
) -> None:
    _want_pool(release)
    name = release.train("killed", 40)
    pod = release.until(lambda: release.step(name) > 4 and release.pod(name), 400, "step 5")
    begin, node = time.monotonic(), pod["spec"]["nodeName"]
    release.run(*os.environ["E2E_KILL_NODE"].split(), node)
    other = release.until(
        lambda: (p := release.pod(name)) and p["metadata"]["uid"] != pod["metadata"]["uid"] and p, 180, "another pod"
    )
    note(f"another pod runs after {time.monotonic() - begin:.0f} s, on {other['spec']['nodeName']}")
    ended = release.wait_state(name, ENDED, 600)["execution"]
    assert ended["state"] == "SUCCEEDED" and release.manifests("adapters").count("adapters/killed") == 1


def test_servers_that_were_away_past_the_ttl_know_every_outcome(release: Release, dataset: str) -> None:
    name = release.train("forgotten", 2)
    assert release.wait_state(name, ENDED, 400)["execution"]["state"] == "SUCCEEDED"
    release.kubectl("scale", "deployment/fabrictune-training", "--replicas=0")
    release.until(
        lambda: not release.get("jobs", "-l", "fabrictune.dev/name=training-forgotten")["items"], 200, "its TTL"
    )
    release.kubectl("scale", "deployment/fabrictune-training", "--replicas=1")
    release.kubectl("rollout", "status", "deployment/fabrictune-training", "--timeout=120s")
    found = release.until(lambda: _quietly(lambda: release.job(name)), 60, "the server")
    assert found["execution"]["state"] == "SUCCEEDED"
    release.train("forgotten", 2)  # the same id and spec: it is there, nothing starts
    time.sleep(3)
    assert not release.get("jobs", "-l", "fabrictune.dev/name=training-forgotten")["items"]


def test_helm_uninstall_leaves_no_job_running(release: Release, dataset: str) -> None:
    name = release.train("left", 200)
    release.until(lambda: release.pod(name), 300, "a running worker")
    release.disconnect()
    release.run("helm", "uninstall", "fabrictune", "-n", release.namespace, "--timeout", "4m")
    release.until(lambda: not release.get("jobs")["items"], 60, "no Jobs")
    release.until(lambda: not _alive(release), 120, "no pods")


def _connection(release: Release) -> tuple[dict[str, Any], ssl.SSLContext]:
    connection = json.loads((release.folder / ".fabrictune" / "connection.json").read_text())
    return connection, ssl.create_default_context(cafile=connection["ca_file"] or None)


def _ask(release: Release, model: str) -> httpx.Response:
    """A short chat through the gateway."""
    connection, trust = _connection(release)
    return httpx.post(
        f"{connection['gateway']}/v1/chat/completions",
        json={"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4},
        headers={"Authorization": f"Bearer {connection['token']}"},
        verify=trust,
        timeout=150,  # the gateway holds a request for two minutes
    )


def _engine(release: Release, revision: str) -> Any:
    """The live pod of a revision's engine, or None."""
    _, deployment, _, name = revision.split("/")
    workload = engine_name(deployment, name)
    pods = release.get("pods", "-l", f"fabrictune.dev/name={workload}")["items"]
    return next((p for p in pods if not p["metadata"].get("deletionTimestamp")), None)


def _want_pool(release: Release) -> None:
    """From now on trainings ask for a GPU, so that they need a node of the pool; they compute on its CPU."""
    release.helm("upgrade", "--set", "jobs.training.resources.limits.nvidia\\.com/gpu=1", "--wait", "--timeout", "3m")


def _pool_nodes(release: Release) -> list[str]:
    nodes: Any = json.loads(release.run("kubectl", "get", "nodes", "-l", "pool=gpu", "-o", "json"))
    return [n["metadata"]["name"] for n in nodes["items"]]


def _says(release: Release, name: str, words: str) -> bool:
    """Whether a job's message or error has these words by now."""
    execution = release.job(name)["execution"]
    return words in execution.get("message", "") + execution.get("error", {}).get("message", "")


def _alive(release: Release) -> list[str]:
    """Pods that wait or run: that of `helm test`, which has ended, stays for its log."""
    pods = release.get("pods")["items"]
    return [p["metadata"]["name"] for p in pods if p["status"]["phase"] in ("Pending", "Running")]


def _is_gone(release: Release, node: str) -> bool:
    return node not in _pool_nodes(release)


def _past(release: Release, name: str, step: int) -> Any:
    """The pod of a training that is past a step."""
    return release.step(name) > step and release.pod(name)


def _quietly(ask: Callable[[], Any]) -> Any:
    """None while the server is away."""
    try:
        return ask()
    except AssertionError:
        return None
