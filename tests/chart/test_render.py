from __future__ import annotations

import re
import tomllib

import pytest
import yaml
from chart_render import CASES, CHART, ROOT, helm, parse, with_templates
from chart_render import render as render_text
from chart_schemas import findings

from tests.chart.objects import Render


@pytest.mark.parametrize("case", CASES)
def test_two_renders_are_the_same_bytes(case: str) -> None:
    assert render_text([CASES[case]]) == render_text([CASES[case]])


def test_no_template_asks_the_cluster_the_clock_or_chance() -> None:
    for path in (CHART / "templates").rglob("*"):
        if path.is_file():
            found = re.findall(r"\b(lookup|now|rand\w+|gen\w*C\w+|uuidv4|htpasswd|Capabilities)\b", path.read_text())
            assert not found, f"{path.name}: {found}"


def test_a_template_is_one_object_of_at_most_sixty_lines() -> None:
    for path in (CHART / "templates").rglob("*.yaml"):
        text = path.read_text()
        assert len(re.findall(r"^kind:", text, re.MULTILINE)) == 1, path.name
        assert len(text.splitlines()) <= 60, path.name


def test_the_version_of_the_chart_is_that_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (chart["version"], chart["appVersion"]) == (project, project)


def test_there_is_no_crd_and_nothing_of_a_third_party_by_default(render: Render) -> None:
    assert not (CHART / "crds").exists()
    assert all(findings(m, "1.37") is not None for m in with_templates(render()))


def test_a_field_that_kubernetes_does_not_know_is_found(render: Render) -> None:
    deployment = render().get("Deployment", "fabrictune-training")
    deployment["spec"]["replica"] = 2
    assert "replica" in str(findings(deployment, "1.37"))


def test_common_labels_and_annotations_are_on_every_object(render: Render) -> None:
    objects = render(commonLabels={"team": "agents"}, commonAnnotations={"contact": "me"})
    for manifest in with_templates(objects):
        assert manifest["metadata"]["labels"]["team"] == "agents", manifest["metadata"]["name"]
        assert manifest["metadata"]["annotations"]["contact"] == "me", manifest["metadata"]["name"]


def text_names(text: str) -> set[tuple[str, str]]:
    return {(m["kind"], m["metadata"]["name"]) for m in parse(text)}


def test_two_releases_in_one_namespace_share_no_name() -> None:
    one, other = (text_names(render_text(release=release)) for release in ("a", "b"))
    assert not one & other


def test_the_instance_label_is_the_release_that_servers_look_for(render: Render) -> None:
    objects = render(fullnameOverride="other")
    for manifest in with_templates(objects):
        assert manifest["metadata"]["labels"]["app.kubernetes.io/instance"] == "other"
    server = objects.get("Deployment", "other-training")
    assert {"name": "FABRICTUNE_RELEASE", "value": "other"} in server["spec"]["template"]["spec"]["containers"][0][
        "env"
    ]


def test_the_notes_say_the_next_three_commands_for_this_release() -> None:
    said = helm("install", "mine", str(CHART), "--namespace", "there", "--dry-run=client").partition("NOTES:")[2]
    assert "fabrictune connect --namespace there --release mine-fabrictune" in said
    assert "fabrictune run " in said and "fabrictune jobs logs " in said
    assert "WARNING" not in said


def test_the_notes_warn_when_anybody_may_ask() -> None:
    said = helm("install", "mine", str(CHART), "--dry-run=client", "--set", "auth.mode=off").partition("NOTES:")[2]
    assert "WARNING: no tokens are asked for" in said
