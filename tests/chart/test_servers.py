from __future__ import annotations

import importlib.util
import json

import pytest
from chart_render import CASES, parse
from chart_render import render as render_text

from services.common.config import ServerConfig, StoreConfig
from tests.chart.objects import Render, container, env

SERVERS = ("conversion", "training", "merging", "evaluation", "inference", "pipeline")


@pytest.mark.parametrize("case", CASES)
def test_every_variable_that_the_chart_sets_is_a_setting(render: Render, case: str) -> None:
    known = {f"FABRICTUNE_{f}".upper() for f in ServerConfig.model_fields}
    known |= {f"FABRICTUNE_S3_{f}".upper() for f in StoreConfig.model_fields}
    known |= {"FABRICTUNE_BOOTSTRAP"}
    for title, pod in render(case).pods():
        ours = {name for name in env(pod) if name.startswith("FABRICTUNE_")}
        assert ours <= known, f"{title}: {ours - known}"


@pytest.mark.parametrize("case", CASES)
def test_no_container_is_told_a_variable_twice(render: Render, case: str) -> None:
    for title, pod in render(case).pods():
        for each in [*pod.get("initContainers", ()), *pod["containers"]]:
            names = [variable["name"] for variable in each.get("env", ())]
            assert len(names) == len(set(names)), f"{title}: {names}"


@pytest.mark.parametrize("case", CASES)
def test_every_module_that_a_pod_runs_is_there(render: Render, case: str) -> None:
    modules = set()
    for _, pod in render(case).pods():
        for each in [*pod.get("initContainers", ()), *pod["containers"]]:
            if each.get("command", [])[:2] == ["python", "-m"]:
                modules.add(each["command"][2])
    assert {"services.pipeline", "services.training.worker", "services.inference.prepare"} <= modules
    missing = {m for m in modules if m.startswith("services.") and importlib.util.find_spec(m) is None}
    assert not missing


def test_the_pipeline_knows_where_every_other_service_is(render: Render) -> None:
    endpoints = json.loads(env(render().get("Deployment", "fabrictune-pipeline"))["FABRICTUNE_ENDPOINTS"])
    assert endpoints == {x: f"fabrictune-{x}.fabrictune.svc:8470" for x in SERVERS if x != "pipeline"}
    assert {f"fabrictune-{x}" for x in endpoints} <= set(render().names("Service"))


def test_the_inference_server_knows_its_owner_and_the_engines_nodes(render: Render) -> None:
    hardware = {"gpus": 1, "cores": 8, "memory": "1.5Gi", "bfloat16": True}
    found = env(render(engine={"hardware": hardware}).get("Deployment", "fabrictune-inference"))
    assert found["FABRICTUNE_OWNER"] == "fabrictune-inference"
    assert json.loads(found["FABRICTUNE_ENGINE_HARDWARE"]) == {
        "gpus": 1,
        "cores": 8,
        "memory_bytes": 3 << 29,
        "cpu_flags": ["avx512_bf16"],
    }


@pytest.mark.parametrize(("quantity", "size"), [("8Gi", 8 << 30), ("8G", 8 * 10**9), (1048576, 1 << 20)])
def test_memory_is_told_in_bytes(render: Render, quantity: str | int, size: int) -> None:
    found = env(render(engine={"hardware": {"memory": quantity}}).get("Deployment", "fabrictune-inference"))
    assert json.loads(found["FABRICTUNE_ENGINE_HARDWARE"])["memory_bytes"] == size


def test_probes_ask_the_metrics_port(render: Render) -> None:
    for name in SERVERS:
        server = container(render().get("Deployment", f"fabrictune-{name}"))
        assert {"name": "metrics", "containerPort": 8490} in server["ports"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert server[probe]["httpGet"]["port"] == "metrics"


def test_no_server_is_gone_while_it_is_replaced_but_of_those_that_drive_there_are_never_two(render: Render) -> None:
    for name in SERVERS:
        strategy = render().get("Deployment", f"fabrictune-{name}")["spec"]["strategy"]
        if name in ("pipeline", "inference"):
            assert strategy == {"type": "Recreate"}
        else:
            assert strategy["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_a_server_is_told_to_end_after_its_endpoints_have_gone_and_has_the_rest_of_its_grace_for_what_is_in_flight(
    render: Render,
) -> None:
    objects = render(services={"inference": {"terminationGracePeriodSeconds": 600}})
    for name in SERVERS:
        server = objects.get("Deployment", f"fabrictune-{name}")
        pause = container(server)["lifecycle"]["preStop"]["sleep"]["seconds"]
        grace = server["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace == (600 if name == "inference" else 30)
        assert int(env(server)["FABRICTUNE_DRAIN_SECONDS"]) + pause == grace - 5, name


def test_zero_replicas_are_zero(render: Render) -> None:
    objects = render(services={"training": {"replicas": 0}})
    assert objects.get("Deployment", "fabrictune-training")["spec"]["replicas"] == 0


def test_a_budget_for_disruptions_is_made_only_for_more_than_one_replica(render: Render) -> None:
    assert not render().names("PodDisruptionBudget")
    assert render(services={"merging": {"replicas": 2}}).names("PodDisruptionBudget") == ["fabrictune-merging"]


def test_a_variable_that_the_user_names_replaces_the_charts_own(render: Render) -> None:
    told = [{"name": "FABRICTUNE_LOG_FORMAT", "value": "console"}]
    for objects in (render(services={"merging": {"env": told}}), render(pods={"env": told})):
        merging = container(objects.get("Deployment", "fabrictune-merging"))
        assert [e for e in merging["env"] if e["name"] == "FABRICTUNE_LOG_FORMAT"] == told


def test_templates_are_mounted_as_a_folder_and_a_server_whose_own_has_changed_starts_anew(render: Render) -> None:
    before, after = render(), render(jobs={"training": {"ttlSecondsAfterFinished": 7}})
    server = before.get("Deployment", "fabrictune-training")
    [mount] = [m for m in container(server)["volumeMounts"] if m["mountPath"] == "/etc/fabrictune/templates"]
    assert "subPath" not in mount
    for name, same in (("fabrictune-training", False), ("fabrictune-merging", True), ("fabrictune-inference", True)):
        pods = [o.get("Deployment", name)["spec"]["template"] for o in (before, after)]
        assert (pods[0] == pods[1]) is same, name


def test_replicas_are_spread_over_nodes(render: Render) -> None:
    [spread] = render().get("Deployment", "fabrictune-merging")["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert spread["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == "merging"


def test_helm_test_runs_with_the_pipelines_settings(render: Render) -> None:
    objects = render()
    check = objects.get("Pod", "fabrictune-selfcheck")
    assert check["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert container(check)["command"] == ["python", "-m", "services.common.hooks.selfcheck"]
    assert env(check) == env(objects.get("Deployment", "fabrictune-pipeline"))
    assert check["metadata"]["labels"]["app.kubernetes.io/component"] == "test"  # not behind the pipeline's Service


def test_a_long_release_name_still_makes_valid_names() -> None:
    for manifest in parse(render_text(release="a" * 53)):
        assert len(manifest["metadata"]["name"]) <= 63


def test_where_an_ingress_is_people_are_told_its_address(render: Render) -> None:
    server = render("external-s3").get("Deployment", "fabrictune-inference")
    assert env(server)["FABRICTUNE_GATEWAY_URL"] == "https://fabrictune.example.com"
    off = render("external-s3", ingress={"enabled": False}).get("Deployment", "fabrictune-inference")
    assert env(off)["FABRICTUNE_GATEWAY_URL"].startswith("https://fabrictune-inference.")
    evaluation = render("external-s3").template("evaluation")[0]
    assert env(evaluation)["FABRICTUNE_GATEWAY_URL"].startswith("https://fabrictune-inference.")
