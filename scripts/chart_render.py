"""What the chart renders to, as text and as objects; those in its ConfigMap of templates are found too."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from kube_tools import tool

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "fabrictune"
CASES = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
"""Name → values file of each case that is linted, validated and kept as a golden file."""
RELEASE = NAMESPACE = "fabrictune"

Manifest = dict[str, Any]
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# A render takes 60 ms and 50 MB: collecting its garbage costs more than it brings.
ENVIRONMENT = {**os.environ, "GOGC": "off", "GOMAXPROCS": "1", "HELM_CACHE_HOME": "/tmp", "HELM_CONFIG_HOME": "/tmp"}


class ChartError(Exception):
    """Helm refused; its own words."""


def helm(*arguments: str) -> str:
    """Run helm; returns what it prints. Raises ChartError."""
    ended = subprocess.run([tool("helm"), *arguments], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    if ended.returncode:
        raise ChartError((ended.stdout + ended.stderr).strip())
    return ended.stdout


def render(files: Sequence[Path] = (), values: Mapping[str, Any] | None = None, release: str = RELEASE) -> str:
    """`helm template` with these values files and, on top, these values. Raises ChartError."""
    arguments = ["template", release, str(CHART), "--namespace", NAMESPACE]
    arguments += [word for file in files for word in ("--values", str(file))]
    if not values:
        return helm(*arguments)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(values, file)
        file.flush()
        return helm(*arguments, "--values", file.name)


def parse(text: str) -> list[Manifest]:
    """The objects of a render."""
    return [document for document in yaml.load_all(text, Loader=Loader) if document]


def templates_of(manifests: Sequence[Manifest]) -> dict[str, list[Manifest]]:
    """File → objects of the ConfigMap that servers create their work from."""
    found = [m for m in manifests if m["kind"] == "ConfigMap" and m["metadata"]["name"].endswith("-templates")]
    return {key: parse(text) for each in found for key, text in each["data"].items()}


def with_templates(manifests: Sequence[Manifest]) -> Iterator[Manifest]:
    """All objects, those that servers will create included."""
    yield from manifests
    for objects in templates_of(manifests).values():
        yield from objects
