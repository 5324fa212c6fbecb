"""A Workload and the chart's template → the Kubernetes objects to create. Pure: no cluster is asked.

A template is a list of whole objects as the chart renders them: for a job one Job (and a headless Service, used when it
has several nodes), for an engine a Deployment and a Service (and perhaps an autoscaler). Filled in here: names, labels,
annotations, the first container's command and resources, everybody's env, and what an autoscaler is to ask about: "{deployment}"
and "{revision}" in its texts. All the rest is the operator's.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from services.common.clusters import ADAPTERS_OF, Workload
from services.common.errors import FailedPrecondition

Manifest = dict[str, Any]

NAME, KIND = "fabrictune.dev/name", "fabrictune.dev/kind"
"""Labels of everything that belongs to a workload."""
INSTANCE = "app.kubernetes.io/instance"
DIGEST = "fabrictune.dev/digest"
RESOURCES = "fabrictune.dev/resources"
"""Annotations: what the workload was made from; its time limits, for whoever looks after it."""
GPU_RESOURCE = "fabrictune.dev/gpu-resource"
DEFAULT_GPU_RESOURCE = "nvidia.com/gpu"
RENDEZVOUS_PORT = 29500
BESIDE_ENGINES = "adapters"
"""The container that looks after an engine's adapters; an engine without room for any has none."""


def read_template(folder: Path, kind: str) -> list[Manifest]:
    """The template of one kind of work. Raises FailedPrecondition naming the file and what is wrong in it."""
    file = folder / f"{kind}.yaml"
    try:
        objects = [o for o in yaml.load_all(file.read_text(), yaml.CSafeLoader) if o]
    except OSError as error:
        raise FailedPrecondition(
            f"the template {file} cannot be read ({error.strerror}); the chart mounts it, FABRICTUNE_TEMPLATES says where"
        ) from None
    except yaml.YAMLError as error:
        raise FailedPrecondition(f"the template {file} is not YAML: {error}") from None
    main = "Deployment" if kind == "engine" else "Job"
    if [o.get("kind") for o in objects if isinstance(o, dict)].count(main) != 1:
        raise FailedPrecondition(f"the template {file} must hold exactly one {main}")
    return objects


def fill_template(
    template: Sequence[Manifest], work: Workload, owner: Mapping[str, Any] | None = None
) -> list[Manifest]:
    """The objects of a workload, the Job or Deployment first. owner: an ownerReference for engines."""
    objects = [copy.deepcopy(o) for o in template]
    objects.sort(key=lambda o: o["kind"] not in ("Job", "Deployment"))
    main = objects[0]
    if main["kind"] == "Job":
        kept = [main, *(o for o in objects[1:] if work.nodes > 1)]
        _fill_job(main, work)
    else:
        kept = objects
        main["spec"]["selector"] = {"matchLabels": {NAME: work.name}}
    for each in kept:
        _fill_names(each, work)
    if owner:
        main["metadata"]["ownerReferences"] = [dict(owner)]
    _fill_pod(main, work)
    return kept


def _fill_names(manifest: Manifest, work: Workload) -> None:
    metadata = manifest.setdefault("metadata", {})
    metadata["name"] = work.name
    _merge(metadata, "labels", {NAME: work.name, KIND: work.kind})
    told = {"queue_timeout": work.queue_timeout_seconds, "run_timeout": work.run_timeout_seconds}
    notes = {DIGEST: work.digest, RESOURCES: json.dumps(told)}
    notes |= {f"fabrictune.dev/label.{key}": value for key, value in work.labels.items()}
    _merge(metadata, "annotations", notes)
    spec = manifest.get("spec", {})
    if manifest["kind"] == "Service":
        spec["selector"] = {NAME: work.name}
    elif "scaleTargetRef" in spec:
        manifest["spec"] = _fill_texts(spec, work.labels)
        manifest["spec"]["scaleTargetRef"]["name"] = work.name


def _fill_texts(value: Any, labels: Mapping[str, str]) -> Any:
    """The same with "{label}" replaced in every text."""
    if isinstance(value, dict):
        return {key: _fill_texts(each, labels) for key, each in value.items()}
    if isinstance(value, list):
        return [_fill_texts(each, labels) for each in value]
    if isinstance(value, str):
        for label, said in labels.items():
            value = value.replace(f"{{{label}}}", said)
    return value


def _fill_job(job: Manifest, work: Workload) -> None:
    spec = job["spec"]
    # Every node of a job may be lost `retries` times; what is lost to a drain or a reclaimed machine does not count.
    spec["backoffLimit"] = work.retries * max(work.nodes, 1)
    if work.nodes > 1:
        spec |= {"completions": work.nodes, "parallelism": work.nodes, "completionMode": "Indexed"}
        spec["template"]["spec"]["subdomain"] = work.name


def _fill_pod(main: Manifest, work: Workload) -> None:
    template = main["spec"]["template"]
    metadata = template.setdefault("metadata", {})
    _merge(metadata, "labels", {NAME: work.name, KIND: work.kind})
    env = dict(work.env)
    if work.nodes > 1:
        env |= {"MASTER_ADDR": f"{work.name}-0.{work.name}", "MASTER_PORT": str(RENDEZVOUS_PORT)}
    pod = template["spec"]
    pod["containers"] = [c for c in pod["containers"] if c["name"] != BESIDE_ENGINES or ADAPTERS_OF in env]
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        rest = [entry for entry in container.get("env") or [] if entry["name"] not in env]
        container["env"] = [*rest, *({"name": key, "value": value} for key, value in env.items())]
    first = pod["containers"][0]
    first["command"] = [_word(word, work) for word in work.argv]
    _fill_resources(first, work, main["metadata"].get("annotations", {}).get(GPU_RESOURCE, DEFAULT_GPU_RESOURCE))


def _fill_resources(container: Manifest, work: Workload, gpu_resource: str) -> None:
    resources = container.setdefault("resources", {})
    wanted = {key: value for key, value in (("cpu", work.cpu), ("memory", work.memory)) if value}
    if wanted:
        _merge(resources, "requests", wanted)
        _merge(resources, "limits", wanted)
    if work.gpus:
        _merge(resources, "limits", {gpu_resource: work.gpus})
        resources["requests"] = {k: v for k, v in resources.get("requests", {}).items() if k != gpu_resource}


def _word(word: str, work: Workload) -> str:
    # The worker's image has a Python of its own; where this server's lies means nothing there.
    return "python" if word == sys.executable else word.replace("{port}", str(work.port))


def _merge(owner: Manifest, key: str, more: Mapping[str, Any]) -> None:
    owner[key] = {**(owner.get(key) or {}), **more}
