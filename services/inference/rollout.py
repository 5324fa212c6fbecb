"""Deployments, their revisions and their traffic: create, move traffic (at once or by a canary), drain, stop, remember.

What runs for a revision is its `lifecycle`'s. Every change is saved (see `saver`), so a restarted service goes on where it
was: an engine that still runs is adopted as it is. The gateway sees a change before that, since it ends with this process:
a store that is away keeps no traffic from moving.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field

import aiohttp

from services.common.clusters import Cluster
from services.common.errors import AlreadyExists, FailedPrecondition, InvalidSpec, NotFound, Violation
from services.inference.canary import Canaries
from services.inference.drive import Driver
from services.inference.engine import Hardware, adapter_model
from services.inference.engines import ENGINES
from services.inference.launch import Artifacts, Launcher, Limits
from services.inference.lifecycle import Lifecycle
from services.inference.revisions import COMING, ENDED, Deployment, Revision, State, check_traffic
from services.inference.routes import RouteTable, Target
from services.inference.saver import Saver
from services.inference.spec import Canary, RevisionSpec


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
        self._watchers: set[asyncio.Queue[Deployment]] = set()
        self._saver = Saver(self.artifacts)
        self._launcher = Launcher(self.cluster, self.artifacts, self.hardware, self.limits)
        self._driver = Driver(self._launcher, self._publish, self._ready)
        self._lifecycle = Lifecycle(self._driver, self.routes)
        self._canaries = Canaries(self.routes.outcomes, self._shift)
        self._changing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def session(self) -> aiohttp.ClientSession:
        """For requests to engines; `generate` uses it too."""
        return self._launcher.session

    async def restore(self, deployments: Iterable[Deployment]) -> None:
        """Go on with what an earlier process left; engines that still run are adopted, others started again."""
        for deployment in deployments:
            self._deployments[deployment.id] = deployment
            for revision in deployment.revisions.values():
                self._lifecycle.resume(deployment, revision)
            await self._publish(deployment)
            self._canaries.resume(deployment)

    async def close(self) -> None:
        """Stop all. Engines are left as they are: the cluster ends them, or the next process adopts them."""
        await self.stop_driving()
        await self._launcher.close()

    async def stop_driving(self) -> None:
        """Change nothing from now on; what is served goes on being served."""
        await self._canaries.close()
        await self._lifecycle.close()
        await self._saver.close()

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
        """A deployment without revisions, or the one that is there; one that is being deleted goes first.

        Raises FailedPrecondition when that takes long.
        """
        while (name := f"deployments/{deployment}") in self._lifecycle.endings:
            await self._lifecycle.endings.outlast(name, self._lifecycle.endings.wait(name))
        if deployment in self._deployments:
            return self._deployments[deployment]
        owner = self._deployments[deployment] = Deployment(deployment, create_time=time.time())
        await self._publish(owner)
        return owner

    async def create_revision(
        self, deployment: str, revision: str, spec: RevisionSpec, take_traffic: bool = False
    ) -> Revision:
        """Start a revision. The same id and spec: the one there is, started again if it had stopped or failed, or is asleep,
        and with that spec's adapters again if they were changed.

        take_traffic: all of it, at once if it is READY and else as soon as it is; whoever asks last has it in the end.
        Returns at once, but one that is about to stop does so first; see `watch` and `wait`. Raises AlreadyExists when the id
        has another spec, FailedPrecondition when its stopping takes long.
        """
        owner = await self.create(deployment)
        known = owner.revisions.get(revision)
        if known is not None and known.asked_spec != spec:
            raise AlreadyExists(f"{known.name} exists with another spec; take another revision id")
        if known is not None and known.state not in ENDED:
            await self._driver.wake(known)
        if known is not None and known.state not in ENDED and not self._lifecycle.drives(known):
            # Nobody drives it: it drains, or could not be stopped when that was tried.
            await self._lifecycle.endings.outlast(known.name, self._lifecycle.stop(owner, known))
            return await self.create_revision(deployment, revision, spec, take_traffic)
        if known is not None and known.state is State.READY and known.spec.adapters != spec.adapters:
            await self.change_adapters(deployment, revision, spec.adapters)
        if known is not None and known.state is State.READY and take_traffic:
            await self.set_traffic(deployment, {revision: 100})
            return known
        made = known or Revision(deployment, revision, spec, create_time=time.time())
        if known is None or known.state in ENDED:
            owner.revisions[revision], made.spec, made.created_spec = made, spec, None
            self._lifecycle.start(owner, made)
        if take_traffic:
            made.take_traffic, made.asked_time = True, time.time()
        await self._publish(owner)
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
        """Move traffic in one step; what is in flight ends where it began.

        Raises InvalidSpec, FailedPrecondition, and Unavailable when it was moved but could not be saved.
        """
        owner = self.get(deployment)
        check_traffic(owner, traffic)
        self._canaries.stop(owner, "traffic was moved by hand")
        await self._shift(owner, traffic)
        self._saver.check(deployment)
        return owner

    async def start_canary(self, deployment: str, traffic: Mapping[str, int], policy: Canary) -> Deployment:
        """Move traffic to one revision by steps; taken back when it does worse. traffic: {revision: 100}.

        Raises InvalidSpec, FailedPrecondition, Unavailable (it goes on, but could not be saved).
        """
        owner = self.get(deployment)
        check_traffic(owner, traffic)
        wanted = [r for r, part in traffic.items() if part]
        if len(wanted) != 1:
            bad = [Violation("traffic", "with a canary it names the one revision that has all of it in the end")]
            raise InvalidSpec(f"this canary cannot be started in deployments/{deployment}", violations=bad)
        if not owner.traffic.keys() - {wanted[0]}:
            raise FailedPrecondition(f"no other revision of deployments/{deployment} takes traffic to compare with")
        self._canaries.stop(owner, "another canary was started")
        await self._canaries.start(owner, wanted[0], policy)
        self._saver.check(deployment)
        return owner

    async def change_adapters(self, deployment: str, revision: str, adapters: tuple[str, ...]) -> Revision:
        """Load and unload adapters of a running revision. Raises NotFound, FailedPrecondition, Unavailable."""
        owner, found = self.get(deployment), self.get_revision(deployment, revision)
        async with self._changing[found.name]:
            await self._driver.change_adapters(owner, found, adapters)
        return found

    async def _shift(self, owner: Deployment, traffic: Mapping[str, int], asked_time: float = math.inf) -> None:
        """asked_time: when this was asked for; what was asked for later will still be done."""
        before, owner.traffic = owner.traffic, {r: part for r, part in traffic.items() if part}
        for revision in owner.revisions.values():
            revision.take_traffic &= revision.asked_time > asked_time
            if revision.revision in owner.traffic:
                revision.warm_since = 0
            elif revision.revision in before:
                revision.warm_since = time.time()
            self._lifecycle.keep_warm(owner, revision)
        await self._publish(owner)

    async def stop_revision(self, deployment: str, revision: str) -> None:
        """Drain and stop it; it is remembered. Raises FailedPrecondition when it takes traffic."""
        owner, found = self.get(deployment), self.get_revision(deployment, revision)
        if owner.traffic.get(revision):
            raise FailedPrecondition(f"{found.name} takes {owner.traffic[revision]} % of the traffic; move that first")
        await self._lifecycle.stop(owner, found)

    async def delete_revision(self, deployment: str, revision: str) -> None:
        """Drain, stop and forget it. Raises FailedPrecondition when it takes traffic."""
        found = self.get_revision(deployment, revision)
        await self.stop_revision(deployment, revision)
        owner = self.get(deployment)
        if found.state in ENDED:  # and not started again meanwhile
            owner.revisions.pop(revision, None)
        await self._publish(owner)

    async def delete(self, deployment: str) -> None:
        """Drain and stop all its revisions and forget it; that goes on when the caller goes away."""
        owner = self.get(deployment)
        await self._lifecycle.endings.end(f"deployments/{deployment}", lambda: self._delete(owner))

    async def _delete(self, owner: Deployment) -> None:
        self._canaries.stop(owner, "the deployment was deleted")
        owner.traffic = {}
        await self._publish(owner)
        await asyncio.gather(*(self._lifecycle.stop(owner, r) for r in owner.revisions.values()))
        await self._saver.forget(owner.id)  # first: what the store still has would come back with the next start
        self._deployments.pop(owner.id, None)
        self.routes.remove(owner.id)
        self._tell(owner)

    async def _ready(self, owner: Deployment, revision: Revision) -> None:
        if not revision.take_traffic:
            return await self._publish(owner)
        self._canaries.stop(owner, "another revision was deployed")
        await self._shift(owner, {revision.revision: 100}, revision.asked_time)

    async def _publish(self, deployment: Deployment) -> None:
        """Let the gateway see it, save it, then let the watchers see it. A store that is away stops none of this."""
        if self._deployments.get(deployment.id) is not deployment:
            return  # it was deleted meanwhile
        targets = {r.revision: self._target(r) for r in deployment.revisions.values()}
        self.routes.put(deployment.id, targets, deployment.traffic)
        await self._saver.save(deployment)
        self._tell(deployment)

    def _target(self, revision: Revision) -> Target:
        ready = revision.state is State.READY
        address = self._driver.addresses.get(revision.name, "") if ready else ""
        ids = (revision.deployment, revision.revision)
        spec, engine = revision.spec, ENGINES[revision.spec.engine]
        adapters = {a: adapter_model(revision.deployment, a, digest) for a, digest in revision.adapters.items()}
        coming = {name.rpartition("/")[2]: "" for name in spec.adapters}
        return Target(
            *ids,
            served_name=revision.deployment,
            address=address,
            ready=ready,
            loading=revision.state in COMING,
            room=spec.max_in_flight,
            says_served_name=engine.says_served_name,
            tools=engine.tools,
            max_prompt_characters=spec.limits.max_prompt_characters or 0,
            adapters=adapters if ready else coming,
        )

    def _tell(self, deployment: Deployment) -> None:
        for queue in self._watchers:
            queue.put_nowait(deployment)
