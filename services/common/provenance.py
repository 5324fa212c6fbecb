"""Where an artifact came from, as its manifest says it."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from services.common.job_state import JobRecord
from services.common.stage import Stage


def provenance(stage: Stage[Any], record: JobRecord) -> dict[str, Any]:
    """What the manifest of a job's output says of its making."""
    return {
        "job": record.name,
        "spec": dict(record.spec),
        "digest": record.digest,
        "inputs": [{"name": i["name"], "digest": i["digest"]} for i in record.inputs],
        "versions": versions(("fabrictune", *stage.versions)),
    }


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of packages; those that are absent are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
