from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import chart
import pytest
import yaml
from chart_plain import FOLDER
from chart_render import Manifest, parse, templates_of

from services.common.artifacts import Artifacts
from services.common.config import StoreConfig
from services.common.store import open_store
from services.evaluation.questions import read_questions
from tests.chart.objects import Render, container
from tests.chart.test_jobs import KINDS
from tests.chart.test_security import breaches

EXAMPLES = sorted((FOLDER / "examples").glob("*.yaml"))


def example(name: str) -> list[Manifest]:
    return parse((FOLDER / "examples" / f"{name}.yaml").read_text())


def test_what_kubectl_applies_is_the_chart(render: Render) -> None:
    assert "49 objects" in chart.check_kustomize()
    assert chart.check_plain() and chart.check_golden()


def test_plain_manifests_have_no_hooks_and_nothing_that_only_helm_runs() -> None:
    for path in (FOLDER / "manifests").glob("*.yaml"):
        assert "helm.sh/hook" not in path.read_text(), path.name
    assert not {"selfcheck.yaml", "uninstall-job.yaml"} & {p.name for p in (FOLDER / "manifests").iterdir()}


def test_the_namespace_enforces_pod_security_restricted() -> None:
    [namespace] = parse((FOLDER / "namespace.yaml").read_text())
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_names_a_spec_that_its_worker_accepts(kind: str) -> None:
    config, job = example(kind)
    told = yaml.safe_load(config["data"]["spec.yaml"])
    stage: Any = importlib.import_module(f"services.{kind}.worker").STAGE
    stage.spec.model_validate(told["spec"])
    assert told["name"] == f"{stage.collection}/my-first" and told["output"] == f"{stage.output_collection}/my-first"
    assert container(job)["command"] == ["python", "-m", f"services.{kind}.worker"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_runs_the_image_of_the_chart(render: Render, kind: str) -> None:
    [job] = [m for m in example(kind) if m["kind"] == "Job"]
    assert container(job)["image"] == container(templates_of(render())[f"{kind}.yaml"][0])["image"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_pass_pod_security_restricted_and_ask_no_api_server(path: Path) -> None:
    for job in (m for m in parse(path.read_text()) if m["kind"] == "Job"):
        pod = job["spec"]["template"]["spec"]
        assert not breaches(pod) and pod["automountServiceAccountToken"] is False


def test_rows_become_a_data_set_by_two_plain_jobs_without_any_service(
    object_store: StoreConfig, tmp_path: Path
) -> None:
    """The commands of the examples, as their pods would run them."""
    env = {**os.environ, "FABRICTUNE_DATA_DIR": str(tmp_path), "FABRICTUNE_TERMINATION_LOG": str(tmp_path / "word")}
    env |= {
        "FABRICTUNE_S3_ENDPOINT": object_store.endpoint,
        "FABRICTUNE_S3_ACCESS_KEY": object_store.access_key,
        "FABRICTUNE_S3_SECRET_KEY": object_store.secret_key.get_secret_value(),
        "FABRICTUNE_SPEC_FILE": str(tmp_path / "spec.yaml"),
    }
    rows, upload = example("upload")
    for name, text in rows["data"].items():
        (tmp_path / name).write_text(text)
    script = container(upload)["command"][2].replace("/tmp/", f"{tmp_path}/").replace("/rows/", f"{tmp_path}/")
    subprocess.run([sys.executable, "-c", script], env=env, check=True)
    (tmp_path / "spec.yaml").write_text(example("conversion")[0]["data"]["spec.yaml"])
    subprocess.run([sys.executable, "-m", "services.conversion.worker"], env=env, check=True)
    store = open_store(object_store)
    artifacts = Artifacts(store, tmp_path / "seen")
    made = artifacts.get("datasets/my-first")
    assert made.kind == "dataset"
    folder = artifacts.cached(made.name, made.digest)
    assert read_questions(folder, "test", 9) and (folder / "train.jsonl").read_text()
    outcome = store.get_json("conversionJobs/my-first/outcome.json")
    assert outcome is not None and outcome["state"] == "SUCCEEDED"
