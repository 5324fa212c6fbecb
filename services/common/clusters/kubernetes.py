"""The Kubernetes cluster: jobs are batch/v1 Jobs, engines are Deployments, made from the templates that the chart owns.

A server holds no state: what there is, is watched (one list, then one watch, for Jobs or Deployments, for pods and for
warnings), so that reading costs no request and any server can be deleted at any time. What the API server does not do
by itself is done here: a job's time in the queue and its running time are limited separately, and a pod whose node no
longer answers is given up, so that another one takes its place.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import yaml
from lightkube import AsyncClient
from lightkube.config import client_adapter
from lightkube.core.exceptions import ApiError, ConfigError
from lightkube.generic_resource import create_namespaced_resource
from lightkube.types import CascadeType, PatchType

from services.common.clusters import Phase, Workload, WorkloadStatus
from services.common.clusters.conditions import ENDED_BECAUSE, Seen, api_error, read_engine, read_job
from services.common.clusters.limits import deadline_patch, is_lost
from services.common.clusters.manifests import DIGEST, INSTANCE, KIND, NAME, Manifest, fill_template, read_template
from services.common.errors import AlreadyExists, FabrictuneError, FailedPrecondition, Unavailable, WorkerLost
from services.common.logs import get_logger

ENGINE = "engine"
RESOURCES: dict[str, Any] = {
    "Job": create_namespaced_resource("batch", "v1", "Job", "jobs"),
    "Deployment": create_namespaced_resource("apps", "v1", "Deployment", "deployments"),
    "Pod": create_namespaced_resource("", "v1", "Pod", "pods"),
    "Event": create_namespaced_resource("", "v1", "Event", "events"),
    "Service": create_namespaced_resource("", "v1", "Service", "services"),
    "HorizontalPodAutoscaler": create_namespaced_resource(
        "autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers"
    ),
    "ScaledObject": create_namespaced_resource("keda.sh", "v1alpha1", "ScaledObject", "scaledobjects"),
}
TEND_SECONDS = 1.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
DELETE_SECONDS = 180.0
LOG_LINES = 400


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
            raise FailedPrecondition(
                f"no Kubernetes can be found: {error}. In a pod the service account is used, elsewhere KUBECONFIG"
            ) from None
        self._http = client_adapter.AsyncClient(self._client.config, client_adapter.ConnectionParams())
        self._mains: dict[str, Manifest] = {}
        self._pods: dict[str, dict[str, Manifest]] = {}
        self._warnings: dict[str, str] = {}
        self._gone: dict[str, WorkloadStatus] = {}
        self._deleting: set[str] = set()
        self._told: dict[str, WorkloadStatus] = {}
        self._watchers: set[asyncio.Queue[WorkloadStatus]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._log = get_logger("kubernetes")

    @property
    def namespace(self) -> str:
        """Where everything is made."""
        return str(self._client.namespace)

    async def start(self) -> None:
        """See what is there, and follow it from then on. Raises FailedPrecondition, Unavailable."""
        seen = [asyncio.Event() for _ in range(3)]
        selector = {KIND: list(self._kinds), INSTANCE: self._place.release}
        self._tasks = [
            asyncio.create_task(self._follow(self._main, seen[0], labels=selector)),
            asyncio.create_task(self._follow("Pod", seen[1], labels=selector)),
            asyncio.create_task(self._follow("Event", seen[2], fields={"type": "Warning"})),
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
        await self._http.aclose()
        await self._client.close()

    async def create(self, workload: Workload) -> WorkloadStatus:
        """Make its objects. The same name and digest: what is there. Raises AlreadyExists, FailedPrecondition, …"""
        self._gone.pop(workload.name, None)
        main, *others = await self._render(workload)
        made = await self._create_object(self._main, main)
        if (made["metadata"].get("annotations") or {}).get(DIGEST) != workload.digest:
            raise AlreadyExists(
                f"a {self._main} {workload.name} made from another spec exists; delete it or take another id"
            )
        self._mains.setdefault(workload.name, made)
        for manifest in others:
            manifest["metadata"]["ownerReferences"] = [_owner_of(made)]  # they go when it goes
            await self._create_object(manifest["kind"], manifest)
        return self._status(workload.name) or WorkloadStatus(
            workload.name, workload.kind, workload.digest, Phase.PENDING
        )

    async def get(self, name: str) -> WorkloadStatus | None:
        """Its status, or None."""
        return self._status(name)

    async def list(self, kind: str = "") -> list[WorkloadStatus]:
        """All workloads, of one kind or of every kind."""
        found = [status for name in list(self._mains) if (status := self._status(name)) is not None]
        return [status for status in found if not kind or status.kind == kind]

    async def stop(self, name: str) -> None:
        """Delete it; its pods get SIGTERM and their grace period."""
        if self._mains.get(name) is None:
            return
        await self._delete_object(self._main, name)

    async def delete(self, name: str) -> None:
        """Delete its objects and wait until they and their pods are gone."""
        self._deleting.add(name)
        try:
            await self._delete_object(self._main, name)
            deadline = time.monotonic() + DELETE_SECONDS
            while name in self._mains or self._pods.get(name):
                if time.monotonic() > deadline:
                    raise Unavailable(f"{name} has not gone within {DELETE_SECONDS:.0f} s; does its node answer?")
                await asyncio.sleep(0.1)
        finally:
            self._deleting.discard(name)
            self._gone.pop(name, None)

    async def watch(self) -> AsyncIterator[WorkloadStatus]:
        """Every change of any workload from now on."""
        queue: asyncio.Queue[WorkloadStatus] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)

    async def read_log(self, name: str) -> str:
        """The end of its newest pod's log, of the container that crashed last if one did."""
        pods = sorted(self._pods.get(name, {}).values(), key=lambda p: str(p["metadata"].get("creationTimestamp")))
        if not pods:
            return ""
        pod = pods[-1]
        state = pod.get("status") or {}
        waiting = [s["name"] for s in state.get("initContainerStatuses") or [] if not s.get("ready")]
        crashed = [s["name"] for s in state.get("containerStatuses") or [] if s.get("restartCount")]
        container = (waiting or crashed or [pod["spec"]["containers"][0]["name"]])[0]
        return await self._read_pod_log(pod["metadata"]["name"], container, previous=bool(crashed and not waiting))

    async def _read_pod_log(self, pod: str, container: str, previous: bool) -> str:
        # lightkube 1.0.1's `log` cannot ask for a container that has crashed and was started again.
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/log"
        asked: dict[str, str | int] = {
            "container": container,
            "tailLines": LOG_LINES,
            "previous": str(previous).lower(),
        }
        try:
            answer = await self._http.get(path, params=asked)
        except httpx2.HTTPError:
            return ""
        return answer.text[-20_000:] if answer.status_code == 200 else ""

    def render(self, workload: Workload) -> str:
        """The objects as YAML."""
        template = read_template(self._place.templates, workload.kind)
        return str(yaml.safe_dump_all(fill_template(template, workload), sort_keys=False, allow_unicode=True))

    async def _render(self, workload: Workload) -> builtins.list[Manifest]:
        template = await asyncio.to_thread(read_template, self._place.templates, workload.kind)
        owner = await self._owner() if workload.kind == ENGINE and self._place.owner else None
        return fill_template(template, workload, owner)

    async def _owner(self) -> dict[str, Any]:
        return _owner_of(
            await self._call(f"get the Deployment {self._place.owner}", "get", "Deployment", self._place.owner)
        )

    async def _create_object(self, kind: str, manifest: Manifest) -> Manifest:
        name = manifest["metadata"]["name"]
        if kind not in RESOURCES:
            raise FailedPrecondition(f"the template holds a {kind}; this service makes {', '.join(RESOURCES)}")
        try:
            return dict(await self._client.create(RESOURCES[kind](manifest)))
        except ApiError as error:
            if error.status.code == 409 and error.status.reason == "AlreadyExists":
                return dict(await self._client.get(RESOURCES[kind], name))
            raise api_error(error.status.code or 0, error.status.message or "", f"create the {kind} {name}") from None
        except httpx2.HTTPError as error:
            raise Unavailable(f"the API server cannot be reached: {error!r}") from None

    async def _delete_object(self, kind: str, name: str) -> None:
        try:
            await self._client.delete(RESOURCES[kind], name, cascade=CascadeType.FOREGROUND)
        except ApiError as error:
            if error.status.code != 404:
                raise api_error(
                    error.status.code or 0, error.status.message or "", f"delete the {kind} {name}"
                ) from None
            self._mains.pop(name, None)
        except httpx2.HTTPError as error:
            raise Unavailable(f"the API server cannot be reached: {error!r}") from None

    async def _call(self, what: str, verb: str, kind: str, *arguments: Any, **options: Any) -> Any:
        try:
            return await getattr(self._client, verb)(RESOURCES[kind], *arguments, **options)
        except ApiError as error:
            raise api_error(error.status.code or 0, error.status.message or "", what) from None
        except httpx2.HTTPError as error:
            raise Unavailable(f"the API server cannot be reached: {error!r}") from None

    # What follows keeps the picture up to date.

    async def _follow(self, kind: str, seen: asyncio.Event, **selectors: Any) -> None:
        """List, then watch from there; begin again when the connection breaks or the version is too old."""
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

    def _replace(self, kind: str, objects: builtins.list[Manifest]) -> None:
        if kind == "Event":
            self._warnings.clear()
        elif kind == "Pod":
            self._pods.clear()
        else:
            for name in self._mains.keys() - {o["metadata"]["name"] for o in objects}:
                self._apply(kind, "DELETED", self._mains[name])
        for thing in sorted(objects, key=_event_time) if kind == "Event" else objects:
            self._apply(kind, "ADDED", thing)

    def _apply(self, kind: str, change: str, thing: Manifest) -> None:
        metadata = thing.get("metadata") or {}
        name, labels = metadata.get("name", ""), metadata.get("labels") or {}
        if kind == "Event":
            about = (thing.get("involvedObject") or {}).get("name", "")
            if change == "DELETED":
                self._warnings.pop(about, None)
            else:
                self._warnings[about] = f"{thing.get('reason', '')}: {thing.get('message', '')}"
            name = self._workload_of(about)
        elif kind == "Pod":
            owner = labels.get(NAME, "")
            pods = self._pods.setdefault(owner, {})
            if change == "DELETED":
                pods.pop(name, None)
            else:
                pods[name] = thing
            if not pods:
                del self._pods[owner]
            name = owner
        elif change == "DELETED":
            self._forget(name)
            return
        else:
            self._mains[name] = thing
        self._tell(name)

    def _workload_of(self, name: str) -> str:
        if name in self._mains:
            return name
        return next((owner for owner, pods in self._pods.items() if name in pods), "")

    def _forget(self, name: str) -> None:
        last = self._status(name)
        self._mains.pop(name, None)
        self._told.pop(name, None)
        if last is None or name in self._deleting or last.phase in (Phase.SUCCEEDED, Phase.FAILED):
            return
        error = WorkerLost(f"its {self._main} was deleted while it ran; `fabrictune jobs resume` begins it again")
        ended = datetime.now(UTC)
        self._gone[name] = replace(
            last, phase=Phase.FAILED, message=error.message, error=error.to_status(), end_time=ended
        )
        for queue in self._watchers:
            queue.put_nowait(self._gone[name])

    def _status(self, name: str) -> WorkloadStatus | None:
        main = self._mains.get(name)
        if main is None:
            return self._gone.get(name)
        uid = main["metadata"].get("uid")
        pods = list(self._pods.get(name, {}).values())
        if self._main == "Job":
            # A Job of the same name that was deleted may have left pods.
            pods = [p for p in pods if any(o.get("uid") == uid for o in p["metadata"].get("ownerReferences") or [])]
        about = [name, *(p["metadata"]["name"] for p in pods)]
        seen = Seen(main, pods, {n: self._warnings[n] for n in about if n in self._warnings})
        if self._main == "Job":
            return read_job(seen)
        port = main["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"]
        return read_engine(seen, f"http://{name}.{self.namespace}:{port}")

    def _tell(self, name: str) -> None:
        status = self._status(name)
        if status is None or self._told.get(name) == status:
            return
        self._told[name] = status
        for queue in self._watchers:
            queue.put_nowait(status)

    async def _tend(self) -> None:
        """Limit the time of jobs and give up pods on dead nodes, once a second, from what is known here."""
        while True:
            await asyncio.sleep(TEND_SECONDS)
            now = datetime.now(UTC)
            for name in list(self._mains):
                try:
                    await self._tend_one(name, now)
                except FabrictuneError as error:
                    self._log.warning("cannot look after it now", workload=name, error=error.message)

    async def _tend_one(self, name: str, now: datetime) -> None:
        main, status = self._mains.get(name), self._status(name)
        if main is None or status is None or status.phase in (Phase.SUCCEEDED, Phase.FAILED):
            return
        if self._main == "Job" and (patch := deadline_patch(main, status, now)) is not None:
            because = patch.get("metadata", {}).get("annotations", {}).get(ENDED_BECAUSE, "")
            self._log.info("a limit is set", workload=name, because=because)
            what = f"limit the Job {name}"
            self._mains[name] = dict(await self._call(what, "patch", "Job", name, patch, patch_type=PatchType.MERGE))
        for pod in list(self._pods.get(name, {}).values()):
            if is_lost(pod, now):
                self._log.warning("its node does not answer: the pod is given up", pod=pod["metadata"]["name"])
                with contextlib.suppress(FabrictuneError):
                    await self._call("delete a lost pod", "delete", "Pod", pod["metadata"]["name"], grace_period=0)


def _owner_of(thing: Mapping[str, Any]) -> dict[str, Any]:
    """An ownerReference."""
    metadata = thing["metadata"]
    return {
        "apiVersion": thing["apiVersion"],
        "kind": thing["kind"],
        "name": metadata["name"],
        "uid": metadata["uid"],
    }


def _event_time(event: Manifest) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")
