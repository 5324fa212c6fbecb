from __future__ import annotations

import pytest
from chart_render import CASES, Manifest

from tests.chart.objects import Render

# Volumes that Pod Security "restricted" lets through.
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def breaches(pod: Manifest) -> list[str]:
    """What Pod Security "restricted" would refuse."""
    context = pod["securityContext"]
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    found += [v["name"] for v in pod.get("volumes", ()) if not VOLUMES & v.keys()]
    if not context.get("runAsNonRoot") or context.get("runAsUser") == 0:
        found.append("root")
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        found.append("seccomp")
    for each in [*pod.get("initContainers", []), *pod["containers"]]:
        own = each["securityContext"]
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
            found.append(each["name"])
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_pod_passes_pod_security_restricted(render: Render, case: str) -> None:
    for title, pod in render(case).pods():
        assert not breaches(pod), title


@pytest.mark.parametrize("case", CASES)
def test_every_root_filesystem_is_read_only_and_tmp_can_be_written(render: Render, case: str) -> None:
    for title, pod in render(case).pods():
        for each in [*pod.get("initContainers", []), *pod["containers"]]:
            assert each["securityContext"]["readOnlyRootFilesystem"] is True, title
            assert "/tmp" in [m["mountPath"] for m in each["volumeMounts"]], title


def test_openshift_chooses_the_user_of_every_pod(render: Render) -> None:
    for title, pod in render("openshift").pods():
        assert "runAsUser" not in pod["securityContext"], title
        assert "fsGroup" not in pod["securityContext"], title


def test_a_security_context_that_says_false_is_not_overruled(render: Render) -> None:
    pod = render(services={"merging": {"securityContext": {"readOnlyRootFilesystem": False}}})
    spec = pod.get("Deployment", "fabrictune-merging")["spec"]["template"]["spec"]
    assert spec["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is False
    assert spec["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize("case", CASES)
def test_only_pods_that_ask_the_cluster_get_a_token_for_it(render: Render, case: str) -> None:
    asks = {"Deployment fabrictune-" + x for x in ("conversion", "training", "merging", "evaluation", "inference")}
    for title, pod in render(case).pods():
        hook = title in ("Job fabrictune-bootstrap", "Job fabrictune-uninstall")
        assert pod["automountServiceAccountToken"] is (title in asks or hook), title


def test_workers_and_engines_have_accounts_without_rights(render: Render) -> None:
    objects = render()
    bound = {s["name"] for m in objects if m["kind"] == "RoleBinding" for s in m["subjects"]}
    workers = {objects.template(k)[0]["spec"]["template"]["spec"]["serviceAccountName"] for k in ("training", "engine")}
    assert workers == {"fabrictune-training-worker", "fabrictune-engine"} and not workers & bound
    assert workers <= set(objects.names("ServiceAccount"))


def test_roles_say_no_more_than_the_servers_do(render: Render) -> None:
    objects = render()
    rules = {
        m["metadata"]["name"].removeprefix("fabrictune-"): {
            resource: set(rule["verbs"]) for rule in m["rules"] for resource in rule["resources"]
        }
        for m in objects
        if m["kind"] == "Role"
    }
    assert "pipeline" not in rules
    assert rules["merging"].keys() == {"jobs", "pods", "pods/log", "pods/status", "events"}
    assert rules["training"].keys() == {"jobs", "pods", "pods/log", "pods/status", "events", "services"}
    assert rules["inference"].keys() == {"deployments", "services", "pods", "pods/log", "pods/status", "events"}
    assert not any("secrets" in found for name, found in rules.items() if name != "bootstrap")
    assert not any("*" in verbs for found in rules.values() for verbs in found.values())
