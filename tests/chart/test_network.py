from __future__ import annotations

import json
import urllib.parse
import urllib.request
from typing import Any

import pytest
from chart_render import CASES

from tests.chart.objects import Objects, Render, env


def policy(objects: Objects, name: str) -> dict[str, Any]:
    spec: dict[str, Any] = objects.get("NetworkPolicy", f"fabrictune-{name}")["spec"]
    return spec


def components(selector: dict[str, Any]) -> set[str]:
    return set(selector["matchExpressions"][0]["values"])


@pytest.mark.parametrize("case", CASES)
def test_every_pod_of_the_release_is_denied_everything_but_names(render: Render, case: str) -> None:
    objects = render(case)
    default = policy(objects, "default")
    assert default["policyTypes"] == ["Ingress", "Egress"] and "ingress" not in default
    assert {port["port"] for rule in default["egress"] for port in rule["ports"]} <= {53, 5353}
    chosen = default["podSelector"]["matchLabels"].items()
    for manifest in [*objects, *(m for k in ("training", "engine") for m in objects.template(k))]:
        pod = (
            manifest["metadata"]
            if manifest["kind"] == "Pod"
            else manifest.get("spec", {}).get("template", {}).get("metadata")
        )
        if pod:
            assert chosen <= pod["labels"].items(), manifest["metadata"]["name"]


def test_engines_are_reached_by_inference_only_and_reach_the_store_only(render: Render) -> None:
    engines = policy(render(), "engines")
    assert components(engines["podSelector"]) == {"engine"}
    [asked], [reached] = engines["ingress"], engines["egress"]
    assert components(asked["from"][0]["podSelector"]) == {"inference"} and asked["ports"][0]["port"] == 8000
    assert components(reached["to"][0]["podSelector"]) == {"store"}


def test_workers_reach_the_store_and_the_gateway_and_trainings_each_other(render: Render) -> None:
    workers = policy(render(), "workers")
    assert components(workers["podSelector"]) == {
        f"{k}-worker" for k in ("conversion", "training", "merging", "evaluation")
    }
    [reached] = workers["egress"]
    assert components(reached["to"][0]["podSelector"]) == {"inference", "store", "training-worker"}
    assert components(workers["ingress"][0]["from"][0]["podSelector"]) == {"training-worker"}


def test_clients_reach_the_front_door_the_gateway_and_the_store(render: Render) -> None:
    clients = policy(render(), "clients")
    assert components(clients["podSelector"]) == {"inference", "pipeline", "store"}
    [rule] = clients["ingress"]
    assert [port["port"] for port in rule["ports"]] == [8470, 8480, 9000] and "from" not in rule
    [rule] = policy(render("locked-down"), "clients")["ingress"]
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"fabrictune.dev/clients": "true"}}}]


def test_behind_an_ingress_every_service_is_reached(render: Render) -> None:
    assert "training" in components(policy(render("external-s3"), "clients")["podSelector"])


def test_the_api_server_is_reached_by_those_that_ask_it(render: Render) -> None:
    asks = {"conversion", "training", "merging", "evaluation", "inference", "hooks"}
    assert components(policy(render(), "api")["podSelector"]) == asks
    assert components(policy(render("locked-down"), "api")["podSelector"]) == asks | {"pipeline"}  # its JWTs' issuer


@pytest.mark.parametrize(
    ("issuer", "ports"),
    [
        ("https://sso.example.com", [443, 6443]),
        ("https://sso:8443/realms/a", [443, 6443, 8443]),
    ],
)
def test_an_issuer_is_reached_at_its_port(render: Render, issuer: str, ports: list[int]) -> None:
    api = policy(render(auth={"oidc": {"issuer": issuer}}), "api")
    assert [port["port"] for port in api["egress"][0]["ports"]] == ports
    assert "pipeline" in components(api["podSelector"])


def test_where_there_is_a_proxy_it_is_reached_but_not_for_the_api_server_and_our_own(render: Render) -> None:
    objects = render("air-gapped")
    for title, pod in objects.pods():
        found = env(pod)
        proxy, direct = urllib.parse.urlsplit(found["HTTPS_PROXY"]), found["NO_PROXY"]
        assert "$(KUBERNETES_SERVICE_HOST)" in direct.split(","), title
        urls = [str(v) for k, v in found.items() if k.endswith(("_URL", "_ENDPOINT"))]
        urls += [f"https://{to}" for to in json.loads(found.get("FABRICTUNE_ENDPOINTS", "{}")).values()]
        for url in urls:
            host = urllib.parse.urlsplit(url).netloc
            assert urllib.request.proxy_bypass(host, {"no": direct}), f"{title}: {url}"
    for name in ("servers", "workers"):
        open_to_all = [rule["ports"] for rule in policy(objects, name)["egress"] if "to" not in rule]
        assert [{"protocol": "TCP", "port": proxy.port}] in open_to_all, name


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [("https://s3.example.com", 443), ("http://s3.example.com", 80), ("http://10.0.0.1:9000", 9000)],
)
def test_an_external_store_is_reached_at_its_port(render: Render, endpoint: str, port: int) -> None:
    values = {"endpoint": endpoint, "existingSecret": "keys"}
    store = policy(render("external-s3", objectStore=values), "store")
    assert store["egress"] == [{"ports": [{"protocol": "TCP", "port": port}]}]
    assert {"training", "training-worker", "engine", "test"} <= components(store["podSelector"])


def test_without_keys_a_workload_reaches_what_gives_it_some(render: Render) -> None:
    store, sts, agent = policy(render("external-s3"), "store")["egress"]
    assert store == sts == {"ports": [{"protocol": "TCP", "port": 443}]}
    assert agent["ports"] == [{"protocol": "TCP", "port": 80}]
    assert [peer["ipBlock"]["cidr"] for peer in agent["to"]] == ["169.254.170.23/32", "fd00:ec2::23/128"]


def test_policies_can_be_left_out(render: Render) -> None:
    assert not render(networkPolicy={"enabled": False}).names("NetworkPolicy")
