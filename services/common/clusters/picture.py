"""What a namespace holds of ours, kept up to date by one list and then one watch a kind: Jobs or Deployments, pods, warnings.

Reading a workload's status asks the API server nothing. When a watch breaks or its version is too old, it begins again with
a list, and what has gone meanwhile is noticed by its absence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import httpx2
from lightkube import AsyncClient
from lightkube.core.exceptions import ApiError
from lightkube.generic_resource import create_namespaced_resource

from services.common.clusters import Phase, WorkloadStatus
from services.common.clusters.conditions import read_engine, read_job
from services.common.clusters.manifests import NAME, Manifest
from services.common.clusters.objects import Seen
from services.common.errors import WorkerLost
from services.common.logs import get_logger

APIS: Mapping[str, tuple[str, str, str]] = {
    "Job": ("batch", "v1", "jobs"),
    "Deployment": ("apps", "v1", "deployments"),
    "Pod": ("", "v1", "pods"),
    "Event": ("", "v1", "events"),
    "Service": ("", "v1", "services"),
    "HorizontalPodAutoscaler": ("autoscaling", "v2", "horizontalpodautoscalers"),
    "ScaledObject": ("keda.sh", "v1alpha1", "scaledobjects"),
}
"""Kind → group, version, and the name that a Role has for it."""
RESOURCES: Mapping[str, Any] = {
    kind: create_namespaced_resource(group, version, kind, plural) for kind, (group, version, plural) in APIS.items()
}
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0


class Picture:
    """The objects of workloads by name. main: "Job" or "Deployment", the object that stands for a workload."""

    def __init__(self, client: AsyncClient, main: str) -> None:
        self._client, self._main = client, main
        self.mains: dict[str, Manifest] = {}
        self.pods: dict[str, dict[str, Manifest]] = {}
        """Workload → pod → object."""
        self.gone: dict[str, WorkloadStatus] = {}
        """What somebody else deleted while it ran."""
        self.deleting: set[str] = set()
        """What we delete ourselves."""
        self.watchers: set[asyncio.Queue[WorkloadStatus]] = set()
        self._warnings: dict[str, str] = {}
        self._told: dict[str, WorkloadStatus] = {}
        self._log = get_logger("kubernetes")

    def status(self, name: str) -> WorkloadStatus | None:
        """A workload's status, or None."""
        main = self.mains.get(name)
        if main is None:
            return self.gone.get(name)
        uid = main["metadata"].get("uid")
        pods = list(self.pods.get(name, {}).values())
        if self._main == "Job":
            # A Job of the same name that was deleted may have left pods.
            pods = [p for p in pods if any(o.get("uid") == uid for o in p["metadata"].get("ownerReferences") or [])]
        about = [name, *(p["metadata"]["name"] for p in pods)]
        seen = Seen(main, pods, {n: self._warnings[n] for n in about if n in self._warnings})
        if self._main == "Job":
            return read_job(seen)
        port = main["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"]
        return read_engine(seen, f"http://{name}.{self._client.namespace}:{port}")

    def has_ended(self, name: str) -> bool:
        """Whether a workload is known to have ended."""
        told = self._told.get(name)
        return told is not None and told.phase in (Phase.SUCCEEDED, Phase.FAILED)

    async def follow(self, kind: str, seen: asyncio.Event, **selectors: Any) -> None:
        """List, then watch from there, for ever; `seen` is set once the first list is here."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                listing = self._client.list(RESOURCES[kind], **selectors)
                objects = [dict(each) async for each in listing]
                self._replace(kind, objects)
                seen.set()
                pause = FIRST_PAUSE_SECONDS
                version = listing.resourceVersion
                async for change, thing in self._client.watch(RESOURCES[kind], resource_version=version, **selectors):
                    self._apply(kind, str(change), dict(thing))
            except (ApiError, httpx2.HTTPError) as error:
                self._log.warning("the watch broke; it begins again", kind=kind, error=str(error), pause=pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    def _replace(self, kind: str, objects: Sequence[Manifest]) -> None:
        if kind == "Event":
            self._warnings.clear()
        elif kind == "Pod":
            self.pods.clear()
        else:
            for name in self.mains.keys() - {o["metadata"]["name"] for o in objects}:
                self._forget(name)
        for thing in sorted(objects, key=_event_time) if kind == "Event" else objects:
            self._apply(kind, "ADDED", thing)

    def _apply(self, kind: str, change: str, whole: Manifest) -> None:
        thing = _lighten(kind, whole)
        name, there = thing["metadata"]["name"], change != "DELETED"
        if kind == "Event":
            self._tell(self._warn(thing, there))
        elif kind == "Pod":
            self._tell(self._put_pod(name, thing, there))
        elif there:
            self.mains[name] = thing
            self._tell(name)
        else:
            self._forget(name)

    def _warn(self, event: Manifest, there: bool) -> str:
        about = str((event.get("involvedObject") or {}).get("name", ""))
        if there:
            self._warnings[about] = f"{event.get('reason', '')}: {event.get('message', '')}"
        else:
            self._warnings.pop(about, None)
        return about if about in self.mains else next((o for o, pods in self.pods.items() if about in pods), "")

    def _put_pod(self, name: str, pod: Manifest, there: bool) -> str:
        owner = str((pod["metadata"].get("labels") or {}).get(NAME, ""))
        pods = self.pods.setdefault(owner, {})
        if there:
            pods[name] = pod
        else:
            pods.pop(name, None)
        if not pods:
            del self.pods[owner]
        return owner

    def _forget(self, name: str) -> None:
        last = self.status(name)
        self.mains.pop(name, None)
        self._told.pop(name, None)
        if last is None or name in self.deleting or last.phase in (Phase.SUCCEEDED, Phase.FAILED):
            return
        error = WorkerLost(f"its {self._main} was deleted while it ran; `fabrictune jobs resume` begins it again")
        ended = replace(
            last, phase=Phase.FAILED, message=error.message, error=error.to_status(), end_time=datetime.now(UTC)
        )
        self.gone[name] = ended
        for queue in self.watchers:
            queue.put_nowait(ended)

    def _tell(self, name: str) -> None:
        status = self.status(name)
        if status is None or self._told.get(name) == status:
            return
        self._told[name] = status
        for queue in self.watchers:
            queue.put_nowait(status)


def _lighten(kind: str, whole: Manifest) -> Manifest:
    """An object without what nobody reads here, most of its bytes: servers keep thousands of them."""
    thing = {**whole, "metadata": {k: v for k, v in whole["metadata"].items() if k != "managedFields"}}
    spec = whole.get("spec") or {}
    if kind == "Job":
        thing["spec"] = {k: v for k, v in spec.items() if k != "template"}
    elif kind == "Pod":
        thing["spec"] = {
            "nodeName": spec.get("nodeName"),
            "containers": [{"name": c["name"]} for c in spec.get("containers") or []],
        }
    return thing


def _event_time(event: Manifest) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")
