from __future__ import annotations

import json

import pytest
from chart_render import CASES

from tests.chart.objects import Render, env


@pytest.mark.parametrize("case", CASES)
def test_no_secret_is_in_the_release(render: Render, case: str) -> None:
    assert not render(case).names("Secret")


def test_what_the_hook_makes_is_what_nobody_else_brings(render: Render) -> None:
    wanted = json.loads(env(render().get("Job", "fabrictune-bootstrap"))["FABRICTUNE_BOOTSTRAP"])
    assert wanted == {
        "tls": True,
        "auth": True,
        "store": True,
        "services": ["conversion", "evaluation", "inference", "merging", "pipeline", "training"],
        "hosts": [],
    }
    external = json.loads(env(render("external-s3").get("Job", "fabrictune-bootstrap"))["FABRICTUNE_BOOTSTRAP"])
    assert (external["tls"], external["auth"], external["store"]) == (False, True, False)
    assert external["hosts"] == ["fabrictune.example.com"]


def test_there_is_no_hook_when_everything_is_brought(render: Render) -> None:
    assert not [name for name in render("locked-down").names("Job") if "bootstrap" in name]


def test_the_hook_may_read_its_secrets_only(render: Render) -> None:
    rules = render().get("Role", "fabrictune-bootstrap")["rules"]
    names = {name for rule in rules if rule["verbs"] != ["create"] for name in rule["resourceNames"]}
    suffixes = ("tls", "tokens", "token-admin", "token-services", "store")
    assert names == {f"fabrictune-{suffix}" for suffix in suffixes}
    assert [rule["resourceNames"] for rule in rules if rule["verbs"] == ["update"]] == [["fabrictune-tls"]]


def test_the_hooks_account_and_rights_come_before_its_job_and_go_with_it(render: Render) -> None:
    weights = {}
    for manifest in render():
        notes = manifest["metadata"].get("annotations", {})
        if notes.get("helm.sh/hook") in ("pre-install,pre-upgrade", "post-delete"):
            weights[manifest["kind"], manifest["metadata"]["name"]] = int(notes["helm.sh/hook-weight"])
            assert notes["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
    assert len(weights) == 8
    assert {kind for (kind, _), weight in weights.items() if weight == -5} == {"Job"}


def test_workload_identity_means_no_keys_anywhere(render: Render) -> None:
    for title, pod in render("external-s3").pods():
        assert not {"FABRICTUNE_S3_ACCESS_KEY", "FABRICTUNE_S3_SECRET_KEY"} & env(pod).keys(), title


def test_keys_and_tokens_are_only_ever_references(render: Render) -> None:
    for title, pod in render().pods():
        for name, value in env(pod).items():
            if name.endswith(("KEY", "TOKEN", "PASSWORD", "KEY_ID", "_USER")) and name != "FABRICTUNE_TLS_KEY":
                assert "secretKeyRef" in value, f"{title}: {name}"


def test_certificates_of_cert_manager_name_every_service(render: Render) -> None:
    certificate = render("external-s3").get("Certificate", "fabrictune-tls")["spec"]
    assert certificate["secretName"] == "fabrictune-tls"
    assert {"fabrictune.fabrictune.svc", "fabrictune-training.fabrictune.svc"} <= set(certificate["dnsNames"])
    assert "fabrictune.example.com" in certificate["dnsNames"]


def test_without_tls_or_tokens_servers_are_told_in_plain_words(render: Render) -> None:
    open_house = render(tls={"mode": "off"}, auth={"mode": "off"}).get("Deployment", "fabrictune-pipeline")
    assert env(open_house)["FABRICTUNE_INSECURE"] == "true"
    assert env(open_house)["FABRICTUNE_GATEWAY_URL"].startswith("http://")
    assert "FABRICTUNE_INSECURE" not in env(render().get("Deployment", "fabrictune-pipeline"))
