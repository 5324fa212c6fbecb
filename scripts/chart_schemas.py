"""Strict validation against the schemas of Kubernetes 1.31 … 1.37, from the package kubernetes-validate.

Its own `validate` reads 2 MB of definitions for each object. Here a kind's schema is cut out of them once, and what is the
same in two versions is asked once: 3,000 validations in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import jsonschema  # type: ignore[import-untyped]
from chart_render import Manifest

VERSIONS = ("1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
REFERENCE = "/api/_definitions.json#/$defs/"


def findings(manifest: Manifest, version: str) -> Sequence[str] | None:
    """What is wrong with an object in this version of Kubernetes; None when there is no schema of its kind."""
    group, _, api_version = manifest["apiVersion"].rpartition("/")
    # As the package names its files: rbac.authorization.k8s.io/v1 Role → role-rbac-v1.json.
    parts = [manifest["kind"].lower(), group.split(".")[0], api_version]
    schema = _schema(version, "-".join(part for part in parts if part))
    # Third parties' groups begin like Kubernetes' own: gateway.networking.k8s.io, kueue.x-k8s.io.
    if schema is None or ("." in group and group.split(".", 1)[1] not in ("k8s.io", "authorization.k8s.io")):
        return None
    return _check(schema, json.dumps(manifest, sort_keys=True))


@cache
def _check(schema: str, manifest: str) -> Sequence[str]:
    found = _validator(schema).iter_errors(json.loads(manifest))
    return [f"{'.'.join(str(part) for part in error.path)}: {error.message}" for error in found]


@cache
def _validator(schema: str) -> Any:
    return jsonschema.Draft202012Validator(json.loads(schema))


@cache
def _schema(version: str, name: str) -> str | None:
    """The schema of a kind with all that it refers to, as canonical JSON."""
    try:
        root = _read(version, name)
    except FileNotFoundError:
        return None
    definitions = _read(version, "_definitions")["$defs"]
    needed: dict[str, Any] = {}
    waiting = [root]
    while waiting:
        for reference in _strip(waiting.pop()):
            if reference not in needed:
                needed[reference] = definitions[reference]
                waiting.append(needed[reference])
    return json.dumps({**root, "$defs": needed}, sort_keys=True)


def _strip(node: Any) -> set[str]:
    """Take descriptions out and make references local, in place; returns the names that are referred to."""
    if isinstance(node, list):
        return set().union(*(_strip(item) for item in node))
    if not isinstance(node, dict):
        return set()
    if isinstance(node.get("description"), str):
        del node["description"]
    found = set().union(*(_strip(item) for item in node.values()))
    reference = node.get("$ref")
    if isinstance(reference, str) and reference.startswith(REFERENCE):
        found.add(reference.removeprefix(REFERENCE))
        node["$ref"] = f"#/$defs/{reference.removeprefix(REFERENCE)}"
    elif isinstance(reference, str):
        found.add(reference.removeprefix("#/$defs/"))
    return found


@cache
def _read(version: str, name: str) -> Any:
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    return json.loads((folder / f"{name}.json").read_text())
