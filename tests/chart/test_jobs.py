from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_plain import FOLDER
from chart_render import CASES, parse
from chart_schemas import VERSIONS, findings

from services.common.clusters import Workload
from services.common.clusters.manifests import fill_template, read_template
from services.inference.follow import READY
from services.inference.routes import in_flight_requests, waiting_requests
from tests.chart.objects import Objects, Render, container, env

KINDS = ("conversion", "training", "merging", "evaluation")


def work(kind: str, **more: Any) -> Workload:
    told = {"env": {"FABRICTUNE_JOB": "j"}, **more}
    return Workload(kind=kind, name=f"{kind}-abc", argv=("python", "-m", "x"), **told)


def pod_of(objects: Objects, kind: str) -> dict[str, Any]:
    pod: dict[str, Any] = objects.template(kind)[0]["spec"]["template"]["spec"]
    return pod


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", [*KINDS, "engine"])
def test_what_a_server_makes_of_a_template_is_valid_in_every_version(
    render: Render, tmp_path: Path, case: str, kind: str
) -> None:
    [data] = [m["data"] for m in render(case) if m["metadata"]["name"] == "fabrictune-templates"]
    (tmp_path / f"{kind}.yaml").write_text(data[f"{kind}.yaml"])
    template = read_template(tmp_path, kind)
    large = {"gpus": 2, "nodes": 2, "cpu": "4", "memory": "8Gi", "env": {"FABRICTUNE_ADAPTERS_OF": "x/r"}}
    for more in ({}, large):
        if kind == "engine":
            more.pop("nodes", None)
        for manifest in fill_template(template, work(kind, **more)):
            wrong = [text for version in VERSIONS for text in findings(manifest, version) or ()]
            assert not wrong, yaml.safe_dump(manifest)


def test_a_job_of_two_nodes_is_indexed_and_its_workers_find_each_other(render: Render) -> None:
    job, service = fill_template(render().template("training"), work("training", nodes=2))
    assert (job["spec"]["completionMode"], job["spec"]["completions"]) == ("Indexed", 2)
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]


def test_a_gpu_resource_of_another_vendor_is_what_limits_ask_for(render: Render) -> None:
    template = render(jobs={"training": {"gpuResource": "amd.com/gpu"}}).template("training")
    [job] = fill_template(template, work("training", gpus=1))
    assert container(job)["resources"]["limits"] == {"amd.com/gpu": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_drain_costs_no_attempt_and_a_wrong_spec_is_not_tried_again(render: Render, kind: str) -> None:
    spec = render().template(kind)[0]["spec"]
    drained, refused, stopped = spec["podFailurePolicy"]["rules"]
    assert (drained["action"], drained["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert (refused["action"], refused["onExitCodes"]["values"]) == ("FailJob", [64, 65, 66, 77, 78])
    assert (stopped["action"], stopped["onExitCodes"]["values"]) == ("Ignore", [143])
    assert (spec["podReplacementPolicy"], spec["backoffLimit"]) == ("Failed", 2)
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("kind", [*KINDS, "engine"])
def test_autoscalers_leave_a_running_pod_and_a_silent_node_loses_it_soon(render: Render, kind: str) -> None:
    [main, *_] = render().template(kind)
    notes = main["spec"]["template"]["metadata"]["annotations"]
    assert notes["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert notes["karpenter.sh/do-not-disrupt"] == "true"
    lost = {t["key"]: t["tolerationSeconds"] for t in pod_of(render(), kind)["tolerations"] if "tolerationSeconds" in t}
    assert lost == {"node.kubernetes.io/not-ready": 30, "node.kubernetes.io/unreachable": 30}


@pytest.mark.parametrize("kind", ["training", "engine"])
def test_gpu_pods_tolerate_gpu_nodes_by_key_and_have_sized_shared_memory(render: Render, kind: str) -> None:
    pod = pod_of(render(), kind)
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}} in pod["volumes"]
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container(pod)["volumeMounts"]
    assert not any("persistentVolumeClaim" in volume for volume in pod["volumes"])


def test_ephemeral_storage_is_asked_for_only_when_told(render: Render) -> None:
    assert "ephemeral-storage" not in container(pod_of(render(), "training"))["resources"]["requests"]
    asked = render(jobs={"training": {"ephemeralStorage": "20Gi"}})
    assert container(pod_of(asked, "training"))["resources"]["requests"]["ephemeral-storage"] == "20Gi"


def test_kueues_queue_is_a_label_and_its_jobs_begin_suspended(render: Render) -> None:
    [job, *_] = render(jobs={"training": {"kueueQueue": "gpu"}}).template("training")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu" and job["spec"]["suspend"] is True
    assert "suspend" not in render().template("training")[0]["spec"]


def test_the_queue_that_we_ship_covers_all_that_the_jobs_of_its_example_request(render: Render) -> None:
    [job] = fill_template(render("gpu").template("training"), work("training", gpus=2, cpu="4", memory="8Gi"))
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    asked = container(job)["resources"]
    [group] = next(
        m["spec"]["resourceGroups"]
        for m in parse((FOLDER / "kueue" / "queues.yaml").read_text())
        if m["kind"] == "ClusterQueue"
    )
    assert asked["requests"].keys() | asked["limits"].keys() <= set(group["coveredResources"])
    for flavor in group["flavors"]:  # Kueue wants the same, in the same order
        assert [r["name"] for r in flavor["resources"]] == group["coveredResources"]


def test_training_has_time_to_save_a_checkpoint(render: Render) -> None:
    assert pod_of(render(), "training")["terminationGracePeriodSeconds"] == 120
    assert pod_of(render(), "merging")["terminationGracePeriodSeconds"] == 30


def test_workers_know_the_store_and_evaluations_the_gateway_and_nothing_else_of_the_servers(render: Render) -> None:
    store = {f"FABRICTUNE_S3_{x}" for x in ("ENDPOINT", "BUCKET", "REGION", "PATH_STYLE", "ACCESS_KEY", "SECRET_KEY")}
    caller = {"FABRICTUNE_GATEWAY_URL", "FABRICTUNE_TOKEN", "FABRICTUNE_CA_FILE"}
    for kind in KINDS:
        found = set(env(pod_of(render(), kind)))
        more = {"evaluation": caller, "training": {"FABRICTUNE_GRACE_SECONDS"}}.get(kind, set())
        assert found == store | {"FABRICTUNE_DATA_DIR"} | more, kind


def test_evaluations_see_the_authority_but_not_the_private_key(render: Render) -> None:
    [tls] = [v for v in pod_of(render(), "evaluation")["volumes"] if v["name"] == "tls"]
    assert tls["secret"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]


def test_an_engine_prepares_its_model_before_it_serves_and_holds_no_keys(render: Render) -> None:
    pod = pod_of(render(), "engine")
    [prepare] = pod["initContainers"]
    assert prepare["command"] == ["python", "-m", "services.inference.prepare"]
    assert prepare["image"] == container(pod)["image"]
    assert not [name for name in env(pod) if "KEY" in name]
    assert {m["mountPath"] for m in container(pod)["volumeMounts"]} == {"/models", "/tmp", "/dev/shm"}


def test_an_engine_with_room_for_adapters_has_a_container_beside_it_that_alone_holds_keys(render: Render) -> None:
    template = render().template("engine")
    without = fill_template(template, work("engine"))[0]["spec"]["template"]["spec"]
    assert [c["name"] for c in without["containers"]] == ["engine"]
    pod = fill_template(template, work("engine", env={"FABRICTUNE_ADAPTERS_OF": "x/r"}))[0]["spec"]["template"]["spec"]
    engine, beside = pod["containers"]
    assert beside["command"] == ["python", "-m", "services.inference.follow"]
    assert beside["readinessProbe"]["exec"]["command"] == ["test", "-f", str(READY)]
    keys = [[e["name"] for e in c["env"] if "KEY" in e["name"]] for c in (engine, beside)]
    assert keys == [[], ["FABRICTUNE_S3_ACCESS_KEY", "FABRICTUNE_S3_SECRET_KEY"]]
    assert beside["resources"]["requests"] == {"cpu": "20m", "memory": "128Mi"}, "the engine's are its own"
    assert {"name": "FABRICTUNE_ADAPTERS_OF", "value": "x/r"} in beside["env"]


def test_an_engine_has_started_when_it_names_its_model_within_the_budget_that_the_server_knows(render: Render) -> None:
    objects = render(engine={"startSeconds": 600})
    probe = container(pod_of(objects, "engine"))["startupProbe"]
    assert probe["httpGet"]["path"] == "/v1/models"
    assert probe["periodSeconds"] * probe["failureThreshold"] == 600
    server = objects.get("Deployment", "fabrictune-inference")
    assert env(server)["FABRICTUNE_ENGINE_START_SECONDS"] == "600"


def test_workers_and_engines_know_how_long_they_may_take_to_end(render: Render) -> None:
    changed = {"terminationGracePeriodSeconds": 300}
    objects = render(engine=changed, jobs={"training": changed})
    assert env(pod_of(objects, "training"))["FABRICTUNE_GRACE_SECONDS"] == "300"
    assert env(objects.get("Deployment", "fabrictune-inference"))["FABRICTUNE_ENGINE_GRACE_SECONDS"] == "300"


def test_an_engine_asks_for_its_ephemeral_storage_once(render: Render) -> None:
    pod = pod_of(render(engine={"ephemeralStorage": "100Gi"}), "engine")
    asked = [c["resources"].get("requests", {}).get("ephemeral-storage") for c in pod["containers"]]
    assert asked == ["100Gi", None]


def test_arguments_pass_through(render: Render) -> None:
    objects = render(engine={"args": ["--swap-space", "4"]})
    assert container(pod_of(objects, "engine"))["args"] == ["--swap-space", "4"]


def test_an_upgrade_of_the_chart_alone_does_not_show_in_pods(render: Render) -> None:
    for kind in [*KINDS, "engine"]:
        template = render().template(kind)[0]["spec"]["template"]
        assert "helm.sh/chart" not in template["metadata"]["labels"]


def test_engines_scale_by_one_of_hpa_and_keda(render: Render) -> None:
    assert [m["kind"] for m in render().template("engine")] == ["Deployment", "Service"]
    for case, kind in (("gpu", "HorizontalPodAutoscaler"), ("openshift", "ScaledObject")):
        deployment, service, scaler = fill_template(render(case).template("engine"), work("engine"))
        assert (deployment["kind"], service["kind"], scaler["kind"]) == ("Deployment", "Service", kind)
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"] == "engine-abc"


def test_what_an_engine_scales_by_is_what_the_gateway_counts_of_its_own_revision(render: Render) -> None:
    counted = {"fabrictune_gateway_waiting_requests": waiting_requests}
    counted["fabrictune_gateway_in_flight_requests"] = in_flight_requests
    template = render("openshift").template("engine")
    for revision in ("r1", "r2"):
        own = {"deployment": "x", "revision": revision}
        *_, scaler = fill_template(template, work("engine", labels=own))
        asked = [trigger["metadata"]["query"] for trigger in scaler["spec"]["triggers"]]
        assert len(asked) == len(counted)
        for query, (name, metric) in zip(asked, counted.items(), strict=True):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', query))
            metric.labels(**labels)  # refuses names that it does not have
            assert query.startswith(f"sum({name}{{") and labels.items() <= own.items()
            assert ("revision" in labels) is (metric is in_flight_requests)


def test_a_new_engine_is_not_put_to_sleep_before_it_can_be_ready(render: Render) -> None:
    deployment, _, scaler = render("openshift").template("engine")
    assert scaler["spec"]["initialCooldownPeriod"] == deployment["spec"]["progressDeadlineSeconds"]


def test_the_inference_server_may_make_the_autoscaler_that_its_template_has(render: Render) -> None:
    for case, resource in (("gpu", "horizontalpodautoscalers"), ("openshift", "scaledobjects")):
        rules = render(case).get("Role", "fabrictune-inference")["rules"]
        assert any(resource in rule["resources"] and "create" in rule["verbs"] for rule in rules)
