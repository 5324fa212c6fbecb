"""`python -m services.common.hooks.uninstall`: ends what a release has started by itself, since Helm does not know of it.

Deletes the Jobs, engine Deployments and their Services of the release, again and again until none comes back: a server that
has not ended yet may still make one. Data in the object store stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightkube import Client
from lightkube.core.exceptions import ApiError
from lightkube.resources.apps_v1 import Deployment
from lightkube.resources.batch_v1 import Job
from lightkube.resources.core_v1 import Pod, Service
from lightkube.types import CascadeType
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.common.clusters.api import explained, open_client
from services.common.clusters.manifests import INSTANCE, KIND
from services.common.config import load
from services.common.main import run_until_stopped

WAIT_SECONDS = 60.0
POLL_SECONDS = 1.0
# What lightkube calls it → the resource, as a Role names it.
OURS: Mapping[Any, str] = {Job: "jobs", Deployment: "deployments", Service: "services"}


class UninstallConfig(BaseSettings):
    """FABRICTUNE_…, from the chart."""

    model_config = SettingsConfigDict(env_prefix="FABRICTUNE_", frozen=True)

    namespace: str = Field(min_length=1)
    release: str = Field(min_length=1, description="the label app.kubernetes.io/instance")


def uninstall(
    client: Client, release: str, seconds: float = WAIT_SECONDS, pause: Callable[[float], None] = time.sleep
) -> Iterator[str]:
    """Delete all, and wait until the pods are gone; a line for each object, and one for pods that take longer.

    Raises PermissionDenied, Unavailable.
    """
    selector: dict[str, Any] = {INSTANCE: release, KIND: None}  # None: the label is there
    deadline = time.monotonic() + seconds
    while True:
        deleted = 0
        for line in _delete_all(client, selector):
            deleted += 1
            yield line
        with explained("list", "pods"):
            pods = [
                str(p.metadata.name)
                for p in client.list(Pod, namespace=client.namespace, labels=selector)
                if p.metadata
            ]
        if not pods and not deleted:
            return
        if time.monotonic() > deadline:
            yield f"still ending: {', '.join(sorted(pods)) or 'something makes them anew'}"
            return
        pause(POLL_SECONDS)


def _delete_all(client: Client, selector: dict[str, Any]) -> Iterator[str]:
    for kind, resource in OURS.items():
        with explained("list", resource):
            found = [o.metadata for o in client.list(kind, labels=selector) if o.metadata]
        for metadata in found:
            if metadata.deletionTimestamp or not metadata.name:
                continue
            with explained("delete", resource, metadata.name):
                try:
                    client.delete(kind, metadata.name, cascade=CascadeType.BACKGROUND)
                except ApiError as error:
                    if error.status.code != 404:
                        raise
            yield f"deleted the {kind.__name__} {metadata.name}"


def main() -> None:
    """The hook's entry."""
    config = load(UninstallConfig)
    assert isinstance(config, UninstallConfig)
    for line in uninstall(open_client(config.namespace), config.release):
        print(line, flush=True)


if __name__ == "__main__":
    run_until_stopped(main)
