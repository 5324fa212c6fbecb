"""What a render gives to a test: objects by kind and name, pods wherever they are made, variables of a container."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from chart_render import Manifest, templates_of, with_templates


class Objects(list[Manifest]):
    """The objects of a render."""

    def get(self, kind: str, name: str) -> Manifest:
        """The one of this kind and name."""
        found = [m for m in self if (m["kind"], m["metadata"]["name"]) == (kind, name)]
        assert len(found) == 1, f"{kind} {name}: {self.names(kind)}"
        return found[0]

    def names(self, kind: str) -> list[str]:
        """Names of all of a kind."""
        return [m["metadata"]["name"] for m in self if m["kind"] == kind]

    def template(self, kind: str) -> list[Manifest]:
        """The objects that servers make a kind of work from."""
        return templates_of(self)[f"{kind}.yaml"]

    def pods(self) -> Iterator[tuple[str, Manifest]]:
        """(title, PodSpec) of everything that makes pods, templates included."""
        for manifest in with_templates(self):
            spec = manifest.get("spec", {})
            pod = spec if manifest["kind"] == "Pod" else spec.get("template", {}).get("spec")
            if pod:
                yield f"{manifest['kind']} {manifest['metadata']['name']}", pod


class Render(Protocol):
    """Top-level values as keyword arguments; `case` begins with a values file of helm/fabrictune/ci."""

    def __call__(self, case: str = "default", **values: Any) -> Objects:
        """Raises ChartError."""


def container(pod: Manifest) -> Manifest:
    """The first container of a PodSpec, or of what has one."""
    spec = pod.get("spec", pod)
    first: Manifest = spec.get("template", {}).get("spec", spec)["containers"][0]
    return first


def env(pod: Manifest) -> dict[str, Any]:
    """Variable → value, or where it comes from, of the first container."""
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container(pod).get("env", ())}
