"""deploy/k8s: the chart's default render as plain manifests, for `kubectl apply -k`.

Helm's hooks have no meaning to kubectl. The Job that makes the Secrets becomes a plain Job: pods that need them wait for
them, and the Job is gone an hour after it ended, so that a later `apply` makes it anew. What ends Jobs after an uninstall,
and `helm test`, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from chart_render import NAMESPACE, ROOT, Manifest

FOLDER = ROOT / "deploy" / "k8s"
SOURCE = re.compile(r"^---\n# Source: fabrictune/templates/(\S+)\n", re.MULTILINE)
DROPPED = re.compile(r"^ +helm\.sh/hook: (post-delete|test)$", re.MULTILINE)
HOOK = re.compile(r"^ +helm\.sh/hook.*\n", re.MULTILINE)
NO_ANNOTATIONS = re.compile(r"^  annotations:\n(?! {4})", re.MULTILINE)
HEADER = "# Rendered from helm/fabrictune with its default values by scripts/chart.py --update; do not edit.\n"


def plain_files(render: str) -> dict[Path, str]:
    """Path → text of every file that is made from the chart, deploy/k8s/kustomization.yaml included."""
    texts: dict[str, str] = {}
    pieces = SOURCE.split(render)
    for source, text in zip(pieces[1::2], pieces[2::2], strict=True):
        if not DROPPED.search(text):
            plain = NO_ANNOTATIONS.sub("", HOOK.sub("", text)).rstrip()
            texts[source] = texts.get(source, HEADER) + f"---\n{plain}\n"
    listed = "".join(f"  - manifests/{source}\n" for source in texts)
    kustomization = (
        f"{HEADER}apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"sortOptions: {{order: fifo}}\nresources:\n  - namespace.yaml\n{listed}"
    )
    files = {FOLDER / "manifests" / source: text for source, text in texts.items()}
    return {FOLDER / "kustomization.yaml": kustomization, FOLDER / "namespace.yaml": _namespace(), **files}


def plain(manifests: Sequence[Manifest]) -> list[Manifest]:
    """The same, of objects: what `kubectl kustomize deploy/k8s` must print beside the Namespace."""
    kept = []
    for manifest in manifests:
        notes = manifest["metadata"].get("annotations", {})
        if notes.get("helm.sh/hook") in ("post-delete", "test"):
            continue
        rest = {key: value for key, value in notes.items() if not key.startswith("helm.sh/hook")}
        metadata = {key: value for key, value in manifest["metadata"].items() if key != "annotations"}
        kept.append({**manifest, "metadata": metadata | ({"annotations": rest} if rest else {})})
    return kept


def _namespace() -> str:
    level = "pod-security.kubernetes.io"
    return (
        f"{HEADER}apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {NAMESPACE}\n"
        f"  labels: {{{level}/enforce: restricted, {level}/enforce-version: latest}}\n"
    )
