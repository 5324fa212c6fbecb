"""Brings revisions up and down: fetch the model, start the engine, compare it with the reference, let it take traffic.

One task drives each revision from PENDING to READY and watches its engine from then on; a crashed engine is started
again with growing pauses. Every change is saved before others see it, so a restarted service goes on where it was: an
engine that still runs is adopted as it is. A revision that has lost its traffic stays warm for a while, so that going
back to it needs no loading.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp

from services.common.clusters import Cluster
from services.common.errors import (
    AlreadyExists,
    FabrictuneError,
    FailedPrecondition,
    NotFound,
    Unavailable,
    WorkerLost,
)
from services.common.logs import get_logger
from services.inference.engine import (
    Hardware,
    engine_name,
    render_engine,
)
from services.inference.launch import Artifacts, Launcher, Limits, run_both
from services.inference.revisions import COMING, Deployment, Revision, State, check_traffic, move
from services.inference.routes import RouteTable, Target
from services.inference.spec import RevisionSpec

_T = TypeVar("_T")
_U = TypeVar("_U")


@dataclass
class _Driver:
    task: asyncio.Task[None]
    warm: asyncio.Task[None] | None = None


@dataclass
class Rollout:
    """All deployments of one inference service. Use `restore` once, then the rest; `close` at the end."""

    cluster: Cluster
    routes: RouteTable
    artifacts: Artifacts
    hardware: Hardware
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Nothing runs yet."""
        self._deployments: dict[str, Deployment] = {}
        self._drivers: dict[tuple[str, str], _Driver] = {}
        self._addresses: dict[str, str] = {}
        self._watchers: set[asyncio.Queue[Deployment]] = set()
        self._saving = asyncio.Lock()
        self._launcher = Launcher(self.cluster, self.artifacts, self.hardware, self.limits)
        self._log = get_logger("rollout")

    @property
    def session(self) -> aiohttp.ClientSession:
        """For requests to engines; `generate` uses it too."""
        return self._launcher.session

    async def restore(self, deployments: Iterable[Deployment]) -> None:
        """Go on with what an earlier process left; engines that still run are adopted, others started again."""
        for deployment in deployments:
            self._deployments[deployment.id] = deployment
            for revision in deployment.revisions.values():
                if revision.state is State.DRAINING:
                    await self.cluster.delete(engine_name(deployment.id, revision.revision))
                    move(revision, State.STOPPED)
                elif revision.state in COMING or revision.state is State.READY:
                    adopt = revision.state is State.READY
                    revision.state = State.PENDING
                    self._drive(revision, adopt)
            await self._publish(deployment)

    async def close(self) -> None:
        """Stop driving. Engines are left as they are: the cluster ends them, or the next process adopts them."""
        tasks = [t for d in self._drivers.values() for t in (d.task, d.warm) if t]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._launcher.close()

    def get(self, deployment: str) -> Deployment:
        """By id. Raises NotFound."""
        if deployment not in self._deployments:
            known = ", ".join(sorted(self._deployments)) or "none"
            raise NotFound(f"there is no deployments/{deployment}; there are: {known}")
        return self._deployments[deployment]

    def get_revision(self, deployment: str, revision: str) -> Revision:
        """By ids. Raises NotFound."""
        there = self.get(deployment).revisions
        if revision not in there:
            raise NotFound(
                f"deployments/{deployment} has no revision {revision}; it has: {', '.join(sorted(there)) or 'none'}"
            )
        return there[revision]

    def list(self) -> list[Deployment]:
        """All, by id."""
        return [self._deployments[name] for name in sorted(self._deployments)]

    async def create(self, deployment: str) -> Deployment:
        """A deployment without revisions, or the one that is there."""
        if deployment not in self._deployments:
            self._deployments[deployment] = Deployment(deployment, create_time=time.time())
            await self._publish(self._deployments[deployment])
        return self._deployments[deployment]

    async def create_revision(
        self, deployment: str, revision: str, spec: RevisionSpec, take_traffic: bool = False
    ) -> Revision:
        """Start a revision. The same id and spec: the one there is, started again if it had stopped or failed.

        Raises AlreadyExists when the id has another spec. Returns at once; see `watch` and `wait`.
        """
        owner = await self.create(deployment)
        known = owner.revisions.get(revision)
        if known is not None and known.spec != spec:
            raise AlreadyExists(f"{known.name} exists with another spec; take another revision id")
        if known is not None and known.state not in (State.STOPPED, State.FAILED):
            return known
        made = known or Revision(deployment, revision, spec, create_time=time.time())
        if known is not None:
            move(made, State.PENDING)
            made.restarts, made.parity = 0, {}
        made.take_traffic = take_traffic
        owner.revisions[revision] = made
        await self._publish(owner)
        self._drive(made)
        return made

    async def wait(self, deployment: str, revision: str) -> Revision:
        """Until it is READY, STOPPED or FAILED. Raises NotFound when it is deleted meanwhile."""
        async for _ in self.watch(deployment):
            found = self.get_revision(deployment, revision)
            if found.state not in COMING:
                return found
        raise NotFound(f"deployments/{deployment} was deleted")

    async def watch(self, deployment: str) -> AsyncIterator[Deployment]:
        """The present state, then each change, until it is deleted. Raises NotFound."""
        queue: asyncio.Queue[Deployment] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            yield self.get(deployment)
            while deployment in self._deployments:
                changed = await queue.get()
                if changed.id == deployment and deployment in self._deployments:
                    yield changed
        finally:
            self._watchers.discard(queue)

    async def set_traffic(self, deployment: str, traffic: Mapping[str, int]) -> Deployment:
        """Move traffic in one step; what is in flight ends where it began. Raises InvalidSpec, FailedPrecondition."""
        owner = self.get(deployment)
        check_traffic(owner, traffic)
        before = owner.traffic
        owner.traffic = {r: part for r, part in traffic.items() if part}
        for revision in owner.revisions.values():
            revision.take_traffic = False
        await self._publish(owner)
        for revision_id in before.keys() - owner.traffic.keys():
            driver = self._drivers.get((deployment, revision_id))
            if driver is not None:
                driver.warm = asyncio.create_task(self._cool(deployment, revision_id))
        for revision_id in owner.traffic:
            driver = self._drivers.get((deployment, revision_id))
            if driver is not None and driver.warm is not None:
                driver.warm.cancel()
                driver.warm = None
        return owner

    async def stop_revision(self, deployment: str, revision: str) -> None:
        """Drain and stop it; it is remembered. Raises FailedPrecondition when it takes traffic."""
        owner, found = self.get(deployment), self.get_revision(deployment, revision)
        if owner.traffic.get(revision):
            raise FailedPrecondition(f"{found.name} takes {owner.traffic[revision]} % of the traffic; move that first")
        await self._stop(owner, found)

    async def delete_revision(self, deployment: str, revision: str) -> None:
        """Drain, stop and forget it. Raises FailedPrecondition when it takes traffic."""
        await self.stop_revision(deployment, revision)
        owner = self.get(deployment)
        owner.revisions.pop(revision, None)
        await self._publish(owner)

    async def delete(self, deployment: str) -> None:
        """Drain and stop all its revisions and forget it."""
        owner = self.get(deployment)
        owner.traffic = {}
        await self._publish(owner)
        await asyncio.gather(*(self._stop(owner, r) for r in owner.revisions.values()))
        self._deployments.pop(deployment, None)
        self.routes.remove(deployment)
        await self.artifacts.forget(deployment)
        self._tell(owner)

    # One task a revision runs what is below.

    def _drive(self, revision: Revision, adopt: bool = False) -> None:
        task = asyncio.create_task(self._run(revision, adopt), name=revision.name)
        self._drivers[revision.deployment, revision.revision] = _Driver(task)

    async def _run(self, revision: Revision, adopt: bool) -> None:
        owner = self._deployments[revision.deployment]
        name = engine_name(revision.deployment, revision.revision)
        try:
            while True:
                try:
                    await self._bring_up(owner, revision, adopt)
                except (WorkerLost, Unavailable) as error:
                    if not revision.restarts:
                        raise  # the first start: it would end the same way again
                    lost = error.message
                else:
                    if revision.take_traffic:
                        await self.set_traffic(owner.id, {revision.revision: 100})
                    since = time.monotonic()
                    lost = await self._launcher.watch(name)
                    revision.restarts *= time.monotonic() - since < self.limits.calm
                adopt = False
                revision.restarts += 1
                if revision.restarts > self.limits.restarts:
                    raise WorkerLost(f"the engine crashed {revision.restarts} times in a row. {lost}")
                pause = min(self.limits.first_pause * 2 ** (revision.restarts - 1), 60)
                self._log.warning("engine lost", revision=revision.name, restarts=revision.restarts, pause=pause)
                move(revision, State.PENDING, f"the engine crashed; it is started again in {pause:.0f} s. {lost}")
                await self._publish(owner)
                await self.cluster.delete(name)
                await asyncio.sleep(pause)
        except FabrictuneError as error:
            await self._fail(owner, revision, error)
        except Exception:  # noqa: BLE001 - the rim of this task: without it the revision would stay LOADING for ever
            self._log.exception("driving a revision failed", revision=revision.name)
            await self._fail(owner, revision, FabrictuneError("internal error; the server's log says more"))

    async def _fail(self, owner: Deployment, revision: Revision, error: FabrictuneError) -> None:
        self._log.warning("revision failed", revision=revision.name, error=error.message)
        self._addresses.pop(revision.name, None)
        move(revision, State.FAILED, error=error)
        await self._publish(owner)
        await self.cluster.delete(engine_name(revision.deployment, revision.revision))

    async def _bring_up(self, owner: Deployment, revision: Revision, adopt: bool) -> None:
        """From PENDING to READY."""
        clock = time.monotonic()
        spec = revision.spec
        model = await self.artifacts.fetch_model(spec.model)
        work = render_engine(revision.deployment, revision.revision, spec, model, self.hardware)
        revision.seconds = {"fetch": round(time.monotonic() - clock, 2)}
        clock = time.monotonic()
        adopted = adopt and await self._launcher.runs_already(work)
        await self._launcher.start(work)
        move(revision, State.LOADING, "the engine loads the model")
        await self._publish(owner)

        async def tell(message: str) -> None:
            if revision.message != message:
                revision.message = message
                await self._publish(owner)

        healthy = self._launcher.healthy(work, tell)
        if adopted:
            address = await healthy
        else:
            # Importing vLLM takes one core for most of the start; the reference is computed on the other meanwhile,
            # unless both copies of the weights would not fit into memory.
            together = not model.remote and 4 * model.weight_bytes < self.hardware.memory_bytes / 2
            if together:
                address, reference = await run_both(
                    self._timed(revision, "load", healthy),
                    self._timed(revision, "reference", self._launcher.reference(model, spec)),
                )
            else:
                address = await self._timed(revision, "load", healthy)
                reference = await self._timed(revision, "reference", self._launcher.reference(model, spec))
            move(revision, State.PROBING, "the engine is compared with the reference")
            await self._publish(owner)
            await self._timed(revision, "probe", self._launcher.probe(revision, work, address, reference))
        move(revision, State.READY)
        revision.ready_time = time.time()
        self._addresses[revision.name] = address
        self._log.info("ready", revision=revision.name, seconds=revision.seconds)
        await self._publish(owner)

    async def _timed(self, revision: Revision, step: str, work: Coroutine[Any, Any, _T]) -> _T:
        clock = time.monotonic()
        result = await work
        revision.seconds[step] = round(time.monotonic() - clock, 2)
        return result

    async def _cool(self, deployment: str, revision: str) -> None:
        await asyncio.sleep(self.limits.keep_warm)
        await self.stop_revision(deployment, revision)

    async def _stop(self, owner: Deployment, revision: Revision) -> None:
        driver = self._drivers.pop((owner.id, revision.revision), None)
        tasks = [t for t in ((driver.task, driver.warm) if driver else ()) if t and t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if revision.state is State.READY:
            move(revision, State.DRAINING, "finishes what it has begun")
            await self._publish(owner)
            if not await self.routes.drained(owner.id, revision.revision, self.limits.drain):
                self._log.warning("answers are cut off", revision=revision.name, after_seconds=self.limits.drain)
        await self.cluster.delete(engine_name(owner.id, revision.revision))
        self._addresses.pop(revision.name, None)
        if revision.state not in (State.STOPPED, State.FAILED):
            move(revision, State.STOPPED)
            await self._publish(owner)

    async def _publish(self, deployment: Deployment) -> None:
        """Save it, then let the gateway and the watchers see it."""
        async with self._saving:
            await self.artifacts.save(deployment)
        if self._deployments.get(deployment.id) is deployment:
            targets = {r.revision: self._target(r) for r in deployment.revisions.values()}
            self.routes.put(deployment.id, targets, deployment.traffic)
        self._tell(deployment)

    def _target(self, revision: Revision) -> Target:
        ready = revision.state is State.READY
        address = self._addresses.get(revision.name, "") if ready else ""
        ids = (revision.deployment, revision.revision)
        return Target(
            *ids, served_name=revision.deployment, address=address, ready=ready, loading=revision.state in COMING
        )

    def _tell(self, deployment: Deployment) -> None:
        for queue in self._watchers:
            queue.put_nowait(deployment)
