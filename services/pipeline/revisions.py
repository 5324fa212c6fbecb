"""Revisions that runs start beside the traffic, to ask a model before it serves, and who uses them.

Runs with the same model and settings share one revision: the last run to let go of it stops it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from google.rpc import code_pb2

from services.common.manifests import Manifest
from services.common.records import digest_of
from services.pipeline.clients import InferenceClient, RemoteError
from services.pipeline.spec import DeploymentStage


@dataclass(frozen=True)
class Served:
    """One model as a revision."""

    deployment: str
    revision_id: str
    spec: Mapping[str, Any] = field(compare=False)
    """fabrictune.v1.RevisionSpec. The revision's id is made from it."""
    temporary: bool = False
    """The deployment is there for this revision alone."""

    @property
    def name(self) -> str:
        """The revision's resource name."""
        return f"{self.deployment}/revisions/{self.revision_id}"


def plan_revision(model: Manifest, stage: DeploymentStage | None) -> Served:
    """Where a model is served: the same model and settings have the same names, whichever run asks.

    An evaluation's job is known by what it asks, so the name of a run in it would keep every report from being reused.
    """
    spec = {**(stage.spec if stage else {}), "model": model.name}
    digest = digest_of([model.digest, spec])[:10]
    deployment = stage.deployment if stage else f"deployments/eval-{digest}"
    return Served(deployment, f"r-{digest}", spec, temporary=stage is None)


class Revisions:
    """Starts and stops them. A run uses what it has started until it releases or forgets it."""

    def __init__(self, inference: InferenceClient) -> None:
        self._inference = inference
        self._users: dict[Served, set[str]] = {}
        self._leaving = False

    def leave(self) -> None:
        """From now on none is stopped: this process ends, and the next one goes on with them."""
        self._leaving = True

    async def start(self, served: Served, run: str) -> None:
        """Start it without traffic, or find it; returns when it is ready. Raises RemoteError when it fails."""
        self._users.setdefault(served, set()).add(run)
        await self._inference.start_revision(served.deployment, served.revision_id, served.spec)

    async def release(self, served: Served, run: str) -> None:
        """Stop it, unless it takes traffic or another run uses it; a temporary deployment goes with its revision.

        The run lets go only when that is done, so what was interrupted can be done again.
        """
        if self._leaving:
            return
        if self._is_free(served, run):
            await self._delete(served)
        if served.temporary and self._is_free(served, run):
            await self._inference.delete_empty(served.deployment)
        self._let_go(served, run)

    async def release_all(self, run: str) -> None:
        """Release all that a run uses."""
        for served in [s for s, users in self._users.items() if run in users]:
            await self.release(served, run)

    def forget(self, run: str) -> None:
        """The run has ended; what it has not released stays as it is."""
        for served in list(self._users):
            self._let_go(served, run)

    async def _delete(self, served: Served) -> None:
        try:
            await self._inference.delete_revision(served.name)
        except RemoteError as error:
            if error.status.code != code_pb2.FAILED_PRECONDITION:  # it takes traffic
                raise

    def _is_free(self, served: Served, run: str) -> bool:
        return self._users.get(served, set()) <= {run}

    def _let_go(self, served: Served, run: str) -> None:
        users = self._users.get(served, set())
        users.discard(run)
        if not users:
            self._users.pop(served, None)
