"""The Kubernetes cluster: jobs are batch/v1 Jobs, engines are Deployments, made from the templates that the chart owns.

A server holds no state: what there is, is watched (see `picture`), so that reading costs no request and any server can be
deleted at any time. What the API server does not do
by itself is done here: a job's time in the queue and its running time are limited separately, and a pod whose node no
longer answers is given up, so that another one takes its place.
"""

from __future__ import annotations

import asyncio
import builtins
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from lightkube import AsyncClient
from lightkube.core.exceptions import ApiError, ConfigError
from lightkube.types import CascadeType, PatchType

from services.common.clusters import Phase, Workload, WorkloadStatus
from services.common.clusters.api import explained, no_cluster
from services.common.clusters.failures import ENDED_BECAUSE
from services.common.clusters.limits import deadline_patch, is_lost
from services.common.clusters.manifests import DIGEST, INSTANCE, KIND, Manifest, fill_template, read_template
from services.common.clusters.picture import APIS, RESOURCES, Picture
from services.common.clusters.pod_logs import PodLogs
from services.common.errors import AlreadyExists, FabrictuneError, FailedPrecondition, Unavailable
from services.common.logs import get_logger

TEND_SECONDS = 1.0
ENGINE = "engine"
WARNINGS_ONLY = {"type": "Warning"}
NODE_LOST = {
    "type": "DisruptionTarget",
    "status": "True",
    "reason": "DeletionByTaintManager",
    "message": "its node does not answer",
}
DELETE_SECONDS = 180.0


@dataclass(frozen=True)
class Place:
    """Where in Kubernetes a server works."""

    namespace: str
    release: str
    """app.kubernetes.io/instance of all that it may see."""
    templates: Path
    owner: str = ""
    """A Deployment; what is made for engines goes when it goes."""


class KubernetesCluster:
    """The workloads of some kinds in one namespace. Use `start` and `close`."""

    def __init__(self, place: Place, kinds: Sequence[str], client: AsyncClient | None = None) -> None:
        """kinds: one or more kinds of jobs, or "engine" alone."""
        self._place, self._kinds = place, tuple(kinds)
        self._main = "Deployment" if ENGINE in kinds else "Job"
        try:
            self._client = client or AsyncClient(namespace=place.namespace or None)
        except ConfigError as error:
            raise no_cluster(error) from None
        self._logs = PodLogs(self._client.config, self.namespace)
        self._picture = Picture(self._client, self._main)
        self._tasks: list[asyncio.Task[None]] = []
        self._log = get_logger("kubernetes")

    @property
    def namespace(self) -> str:
        """Where everything is made."""
        return str(self._client.namespace)

    async def start(self) -> None:
        """See what is there, and follow it from then on. Raises FailedPrecondition, Unavailable."""
        labels = {KIND: list(self._kinds), INSTANCE: self._place.release}
        seen = [asyncio.Event() for _ in range(3)]
        watched: tuple[tuple[str, dict[str, Any]], ...] = (
            (self._main, {"labels": labels}),
            ("Pod", {"labels": labels}),
            ("Event", {"fields": WARNINGS_ONLY}),
        )
        self._tasks = [
            asyncio.create_task(self._picture.follow(kind, event, **selectors))
            for (kind, selectors), event in zip(watched, seen, strict=True)
        ]
        try:
            await asyncio.wait_for(asyncio.gather(*(event.wait() for event in seen)), 30)
        except TimeoutError:
            raise Unavailable(
                f"the API server does not answer in namespace {self.namespace}, or this service may not list "
                f"{self._main}s, Pods and Events there; its log says which"
            ) from None
        self._tasks.append(asyncio.create_task(self._tend()))

    async def close(self) -> None:
        """Stop following. All that runs goes on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._logs.close()
        await self._client.close()

    async def create(self, workload: Workload) -> WorkloadStatus:
        """Make its objects. The same name and digest: what is there. Raises AlreadyExists, FailedPrecondition, …"""
        self._picture.gone.pop(workload.name, None)
        main, *others = await self._render(workload)
        made = await self._create_object(self._main, main)
        if (made["metadata"].get("annotations") or {}).get(DIGEST) != workload.digest:
            raise AlreadyExists(
                f"a {self._main} {workload.name} made from another spec exists; delete it or take another id"
            )
        self._picture.mains.setdefault(workload.name, made)
        for manifest in others:
            manifest["metadata"]["ownerReferences"] = [_owner_of(made)]  # they go when it goes
            await self._create_object(manifest["kind"], manifest)
        return self._picture.status(workload.name) or WorkloadStatus(
            workload.name, workload.kind, workload.digest, Phase.PENDING
        )

    async def get(self, name: str) -> WorkloadStatus | None:
        """Its status, or None."""
        return self._picture.status(name)

    async def list(self, kind: str = "") -> list[WorkloadStatus]:
        """All workloads, of one kind or of every kind."""
        found = [status for name in list(self._picture.mains) if (status := self._picture.status(name)) is not None]
        return [status for status in found if not kind or status.kind == kind]

    async def stop(self, name: str) -> None:
        """Delete it; its pods get SIGTERM and their grace period."""
        if name not in self._picture.mains:
            return
        await self._delete_object(self._main, name, cascade=CascadeType.FOREGROUND)

    async def delete(self, name: str) -> None:
        """Delete its objects and wait until they and their pods are gone."""
        self._picture.deleting.add(name)
        try:
            await self._delete_object(self._main, name, cascade=CascadeType.FOREGROUND)
            deadline = time.monotonic() + DELETE_SECONDS
            while name in self._picture.mains or self._picture.pods.get(name):
                if time.monotonic() > deadline:
                    raise Unavailable(f"{name} has not gone within {DELETE_SECONDS:.0f} s; does its node answer?")
                await asyncio.sleep(0.1)
        finally:
            self._picture.deleting.discard(name)
            self._picture.gone.pop(name, None)

    async def watch(self) -> AsyncIterator[WorkloadStatus]:
        """Every change of any workload from now on."""
        queue: asyncio.Queue[WorkloadStatus] = asyncio.Queue()
        self._picture.watchers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._picture.watchers.discard(queue)

    async def read_log(self, name: str) -> str:
        """The end of its newest pod's log, of the container that crashed last if one did."""
        pods = sorted(
            self._picture.pods.get(name, {}).values(), key=lambda p: str(p["metadata"].get("creationTimestamp"))
        )
        if not pods:
            return ""
        return await self._logs.read(pods[-1])

    def render(self, workload: Workload) -> str:
        """The objects as YAML."""
        template = read_template(self._place.templates, workload.kind)
        return str(yaml.safe_dump_all(fill_template(template, workload), sort_keys=False, allow_unicode=True))

    async def _render(self, workload: Workload) -> builtins.list[Manifest]:
        template = await asyncio.to_thread(read_template, self._place.templates, workload.kind)
        owner = await self._owner() if workload.kind == ENGINE and self._place.owner else None
        return fill_template(template, workload, owner)

    async def _owner(self) -> dict[str, Any]:
        with explained("get", "deployments", self._place.owner):
            return _owner_of(await self._client.get(RESOURCES["Deployment"], self._place.owner))

    async def _create_object(self, kind: str, manifest: Manifest) -> Manifest:
        name = manifest["metadata"]["name"]
        if kind not in RESOURCES:
            raise FailedPrecondition(f"the template holds a {kind}; this service makes {', '.join(RESOURCES)}")
        with explained("create", APIS[kind][2], name):
            try:
                return dict(await self._client.create(RESOURCES[kind](manifest)))
            except ApiError as error:
                if error.status.reason != "AlreadyExists":
                    raise
                return dict(await self._client.get(RESOURCES[kind], name))

    async def _delete_object(self, kind: str, name: str, **options: Any) -> None:
        with explained("delete", APIS[kind][2], name):
            try:
                await self._client.delete(RESOURCES[kind], name, **options)
            except ApiError as error:
                if error.status.code != 404:
                    raise
                if kind == self._main:
                    self._picture.mains.pop(name, None)

    async def _tend(self) -> None:
        """Limit the time of jobs and give up pods on dead nodes, once a second, from what is known here."""
        while True:
            await asyncio.sleep(TEND_SECONDS)
            now = datetime.now(UTC)
            for name in [name for name in self._picture.mains if not self._picture.has_ended(name)]:
                try:
                    await self._tend_one(name, now)
                except FabrictuneError as error:
                    self._log.warning("cannot look after it now", workload=name, error=error.message)

    async def _tend_one(self, name: str, now: datetime) -> None:
        main, status = self._picture.mains.get(name), self._picture.status(name)
        if main is None or status is None or status.phase in (Phase.SUCCEEDED, Phase.FAILED):
            return
        if self._main == "Job" and (patch := deadline_patch(main, status, now)) is not None:
            if "spec" in patch:
                because = patch.get("metadata", {}).get("annotations", {}).get(ENDED_BECAUSE, "")
                self._log.info("a limit is set", workload=name, because=because)
            with explained("patch", "jobs", name):
                changed = await self._client.patch(RESOURCES["Job"], name, patch, patch_type=PatchType.MERGE)
            self._picture.mains[name] = dict(changed)
        for pod in list(self._picture.pods.get(name, {}).values()):
            if is_lost(pod, now):
                self._log.warning("its node does not answer: the pod is given up", pod=pod["metadata"]["name"])
                await self._give_up(pod["metadata"]["name"])

    async def _give_up(self, pod: str) -> None:
        """What Kubernetes' pod garbage collector does once a Node object has gone: FAILED first, then deleted at once.

        Without the first the Job controller waits for ever (podReplacementPolicy Failed) and keeps its finalizer.
        """
        failed = {"status": {"phase": "Failed", "reason": "NodeLost", "conditions": [NODE_LOST]}}
        with explained("patch", "pods/status", pod):
            await self._client.patch(RESOURCES["Pod"].Status, pod, failed, patch_type=PatchType.STRATEGIC)
        await self._delete_object("Pod", pod, grace_period=0)


def _owner_of(thing: Mapping[str, Any]) -> dict[str, Any]:
    """An ownerReference."""
    metadata = thing["metadata"]
    return {
        "apiVersion": thing["apiVersion"],
        "kind": thing["kind"],
        "name": metadata["name"],
        "uid": metadata["uid"],
    }
