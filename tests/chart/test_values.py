from __future__ import annotations

from typing import Any

import pytest
import yaml
from chart_render import CHART, ChartError
from chart_walk import leaves_of, load_schema

from tests.chart.objects import Render

# What somebody writes → the path that the error names.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"service": {}}, "service"),
    ({"services": {"trainning": {}}}, "/services"),
    ({"services": {"training": {"replica": 2}}}, "/services/training"),
    ({"services": {"training": {"replicas": "2"}}}, "/services/training/replicas"),
    ({"services": {"training": {"pdb": {"maxUnavailable": "0%"}}}}, "/services/training/pdb/maxUnavailable"),
    ({"services": {"training": {"pdb": {"maxUnavailable": "101%"}}}}, "/services/training/pdb/maxUnavailable"),
    ({"services": {"pipeline": {"replicas": 2}}}, "/services/pipeline/replicas"),
    ({"services": {"training": {"env": {"A": "b"}}}}, "/services/training/env"),
    ({"services": {"training": {"env": [{"name": "A", "valeu": "b"}]}}}, "/services/training/env/0"),
    ({"jobs": {"training": {"sharedMemory": "lots"}}}, "/jobs/training/sharedMemory"),
    ({"jobs": {"training": {"nodeSelector": {"gpu": True}}}}, "/jobs/training/nodeSelector/gpu"),
    ({"jobs": {"training": {"resources": {"limits": {"cpu": "many"}}}}}, "/jobs/training/resources/limits/cpu"),
    ({"jobs": {"training": {"tolerations": [{"key": "a", "operater": "Exists"}]}}}, "/jobs/training/tolerations/0"),
    ({"engine": {"image": {"digest": "sha256:abc"}}}, "/engine/image/digest"),
    (
        {"services": {"inference": {"terminationGracePeriodSeconds": 5}}},
        "/services/inference/terminationGracePeriodSeconds",
    ),
    ({"services": {"training": {"args": ["--verbose"]}}}, "/services/training"),
    ({"jobs": {"training": {"args": ["--verbose"]}}}, "/jobs/training"),
    ({"objectStore": {"pathStyle": False}}, "/objectStore/pathStyle"),
    ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy"),
    ({"objectStore": {"mode": "s3"}}, "/objectStore/mode"),
    ({"objectStore": {"mode": "external"}}, "/objectStore/endpoint"),
    ({"objectStore": {"endpoint": "https://s3.example.com"}}, "/objectStore/endpoint"),
    ({"objectStore": {"mode": "external", "endpoint": "s3.example.com"}}, "/objectStore/endpoint"),
    ({"objectStore": {"caSecret": "ca"}}, "/objectStore/caSecret"),
    (
        {"objectStore": {"persistence": {"enabled": False, "existingClaim": "c"}}},
        "/objectStore/persistence/existingClaim",
    ),
    ({"objectStore": {"persistence": {"existingClaim": "c", "retain": False}}}, "/objectStore/persistence/retain"),
    ({"tls": {"mode": "existing"}}, "/tls/existingSecret"),
    ({"tls": {"existingSecret": "mine"}}, "/tls/existingSecret"),
    ({"tls": {"mode": "certManager"}}, "/tls/certManager/issuerRef/name"),
    ({"auth": {"mode": "existing"}}, "/auth/existingSecret"),
    ({"auth": {"mode": "off", "oidc": {"issuer": "https://login.example.com"}}}, "/auth/oidc/issuer"),
    ({"ingress": {"enabled": True}}, "/ingress/host"),
    ({"gatewayApi": {"enabled": True, "host": "a.example.com"}}, "/gatewayApi/parentRefs"),
    ({"services": {"training": {"serviceAccount": {"create": False}}}}, "/services/training/serviceAccount/name"),
    ({"engine": {"autoscaling": {"mode": "hpa"}}}, "/engine/autoscaling/hpa/metrics"),
    ({"engine": {"autoscaling": {"mode": "keda"}}}, "/engine/autoscaling/keda/triggers"),
    (
        {"engine": {"autoscaling": {"mode": "hpa", "hpa": {"metrics": [{}]}, "keda": {"triggers": [{}]}}}},
        "/engine/autoscaling/keda/triggers",
    ),
    ({"engine": {"autoscaling": {"minReplicas": 5, "maxReplicas": 4}}}, "engine.autoscaling.minReplicas"),
]


@pytest.mark.parametrize(("values", "path"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_a_typo_or_a_contradiction_is_refused_with_its_path(render: Render, values: dict[str, Any], path: str) -> None:
    with pytest.raises(ChartError) as refused:
        render(**values)
    assert path in str(refused.value)


def test_the_schema_knows_every_default_and_values_show_every_name() -> None:
    def names(values: Any, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
        if not isinstance(values, dict) or path in leaves:
            return {path}
        return set().union(*(names(value, (*path, key)) for key, value in values.items()))

    leaves = {leaf.path for leaf in leaves_of(load_schema())}
    shown = names(yaml.safe_load((CHART / "values.yaml").read_text()))
    # What a map such as `resources` may hold beside its default is not spelled out.
    unspelled = {path for path in leaves - shown if path[-1] in ("requests", "limits", "claims")}
    unspelled |= {path for path in leaves - shown if path[-1].endswith("Affinity")}
    assert shown <= leaves
    assert leaves - shown == unspelled
