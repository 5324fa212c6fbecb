from __future__ import annotations

import json

import pytest

from fabrictune.v1 import conversion_pb2, evaluation_pb2, inference_pb2, merging_pb2, pipeline_pb2, training_pb2
from services.common import metrics
from tests.chart.objects import Render

MODULES = {
    "conversion": conversion_pb2,
    "training": training_pb2,
    "merging": merging_pb2,
    "evaluation": evaluation_pb2,
    "inference": inference_pb2,
    "pipeline": pipeline_pb2,
}
GRPC = {
    f"/{next(iter(module.DESCRIPTOR.services_by_name.values())).full_name}": f"fabrictune-{kind}"
    for kind, module in MODULES.items()
} | {"/": "fabrictune"}


def test_the_front_door_leads_to_the_pipeline(render: Render) -> None:
    objects = render()
    selector = objects.get("Service", "fabrictune")["spec"]["selector"]
    pipeline = objects.get("Deployment", "fabrictune-pipeline")["spec"]["template"]["metadata"]["labels"]
    assert selector.items() <= pipeline.items()


def test_an_ingress_routes_grpc_by_service_and_v1_to_the_gateway(render: Render) -> None:
    objects = render("external-s3")
    found: dict[str, str] = {}
    for name in ("grpc", "http"):
        [rule] = objects.get("Ingress", f"fabrictune-{name}")["spec"]["rules"]
        assert rule["host"] == "fabrictune.example.com"
        found |= {p["path"]: p["backend"]["service"]["name"] for p in rule["http"]["paths"]}
    assert found == GRPC | {"/v1": "fabrictune-inference"}


def test_a_gateway_gets_one_route_since_it_takes_one_kind_for_a_host(render: Render) -> None:
    objects = render("openshift")
    route = objects.get("HTTPRoute", "fabrictune")["spec"]
    found = {r["matches"][0]["path"]["value"]: r["backendRefs"][0]["name"] for r in route["rules"]}
    assert found == GRPC | {"/v1": "fabrictune-inference"}
    policy = objects.get("BackendTLSPolicy", "fabrictune")["spec"]
    assert {t["name"] for t in policy["targetRefs"]} == set(found.values())


@pytest.mark.parametrize(("mode", "protocol"), [("generated", "https"), ("off", "kubernetes.io/h2c")])
def test_services_tell_proxies_how_grpc_is_spoken(render: Render, mode: str, protocol: str) -> None:
    ports = render(tls={"mode": mode}).get("Service", "fabrictune-training")["spec"]["ports"]
    assert next(p for p in ports if p["name"] == "grpc")["appProtocol"] == protocol


def test_prometheus_scrapes_each_server_once(render: Render) -> None:
    objects = render("openshift")
    monitor = objects.get("ServiceMonitor", "fabrictune")["spec"]
    chosen = set(monitor["selector"]["matchExpressions"][0]["values"])
    with_metrics = {
        s["metadata"]["labels"]["app.kubernetes.io/component"]
        for s in objects
        if s["kind"] == "Service" and any(p["name"] == "metrics" for p in s["spec"]["ports"])
    }
    assert chosen == with_metrics == set(MODULES)


def test_the_dashboard_shows_metrics_that_exist(render: Render) -> None:
    [text] = render("openshift").get("ConfigMap", "fabrictune-dashboard")["data"].values()
    known = {f"{s.name}" for family in metrics.REGISTRY.collect() for s in family.samples}
    known |= {family.name for family in metrics.REGISTRY.collect()}
    for panel in json.loads(text)["panels"]:
        name = next(
            w
            for w in panel["targets"][0]["expr"].replace("(", " ").replace("{", " ").split()
            if w[:11] == "fabrictune_"
        )
        assert name.removesuffix("_total").removesuffix("_bucket") in known, name
