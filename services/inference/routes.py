"""Which revision answers a request: names, weights, what is in flight, what waits. Values and counters, no HTTP.

A client says "x" or "deployments/x" (the revision is chosen by weight), or "x@r", "deployments/x@r" or
"deployments/x/revisions/r" (that revision, traffic or not: so evaluation reaches a candidate). All of it happens in one
event loop; `put` changes a deployment in one step, so no request sees half of a change.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from services.common.errors import NotFound, Unavailable


@dataclass(frozen=True)
class Target:
    """A revision as the gateway sees it."""

    deployment: str
    revision: str
    served_name: str
    """What its engine calls the model."""
    address: str = ""
    """"http://host:port" while its engine answers."""
    ready: bool = False
    loading: bool = False
    """It will be ready soon: requests for it wait."""


@dataclass
class _Deployment:
    targets: dict[str, Target] = field(default_factory=dict)
    traffic: dict[str, int] = field(default_factory=dict)
    current: dict[str, int] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class RouteTable:
    """Deployments by id. Not for several threads."""

    def __init__(self) -> None:
        self._deployments: dict[str, _Deployment] = {}
        self._in_flight: Counter[tuple[str, str]] = Counter()
        self._waiting: Counter[str] = Counter()
        self._idle: dict[tuple[str, str], asyncio.Event] = {}

    def put(self, deployment: str, targets: Mapping[str, Target], traffic: Mapping[str, int]) -> None:
        """Replace what is known of a deployment. targets: by revision; traffic: revision → percent."""
        entry = self._deployments.setdefault(deployment, _Deployment())
        entry.targets = dict(targets)
        if entry.traffic != traffic:
            entry.traffic, entry.current = dict(traffic), {}
        entry.changed.set()
        entry.changed = asyncio.Event()

    def remove(self, deployment: str) -> None:
        """Forget a deployment; requests that wait for it end with NotFound."""
        entry = self._deployments.pop(deployment, None)
        if entry is not None:
            entry.changed.set()

    def models(self) -> list[str]:
        """Deployment ids, sorted."""
        return sorted(self._deployments)

    def in_flight(self, deployment: str, revision: str) -> int:
        """Requests that the revision is answering now."""
        return self._in_flight[deployment, revision]

    def waiting(self, deployment: str) -> int:
        """Requests held until a revision is ready; what a cluster may scale from zero by."""
        return self._waiting[deployment]

    def choose(self, model: str) -> Target | None:
        """The revision for a request; None when one is loading. Raises NotFound, Unavailable."""
        deployment, revision = split_model(model)
        entry = self._deployments.get(deployment)
        if entry is None or (revision and revision not in entry.targets):
            known = ", ".join(self.models()) or "none yet; `fabrictune deploy` makes one"
            raise NotFound(f"there is no model {model!r} here; there are: {known}", {"model": model})
        if revision:
            candidates = {revision: 1}
        elif entry.traffic:
            candidates = {r: w for r, w in entry.traffic.items() if w > 0 and r in entry.targets}
        else:
            candidates = {r: 1 for r, t in entry.targets.items() if t.loading}  # the first one is on its way
        ready = {r: w for r, w in candidates.items() if entry.targets[r].ready}
        if ready:
            return entry.targets[_next(ready, entry.current) if len(ready) > 1 else next(iter(ready))]
        if any(entry.targets[r].loading for r in candidates):
            return None
        why = (
            "it has failed or was stopped"
            if candidates
            else "no revision takes traffic; `fabrictune deploy` gives it one"
        )
        raise Unavailable(f"no revision of {model!r} can answer: {why}", {"model": model})

    @asynccontextmanager
    async def hold(self, model: str, wait_seconds: float) -> AsyncIterator[Target]:
        """The revision for a request, counted as in flight; waits while it loads. Raises NotFound, Unavailable."""
        target = self.choose(model) or await self._wait(model, wait_seconds)
        key = (target.deployment, target.revision)
        self._in_flight[key] += 1
        try:
            yield target
        finally:
            self._in_flight[key] -= 1
            if not self._in_flight[key]:
                del self._in_flight[key]
                if key in self._idle:
                    self._idle.pop(key).set()

    async def drained(self, deployment: str, revision: str, timeout_seconds: float) -> bool:
        """Wait until nothing is in flight; False when that took longer."""
        key = (deployment, revision)
        if not self._in_flight[key]:
            return True
        try:
            await asyncio.wait_for(self._idle.setdefault(key, asyncio.Event()).wait(), timeout_seconds)
        except TimeoutError:
            return False
        return True

    async def _wait(self, model: str, seconds: float) -> Target:
        deployment, _ = split_model(model)
        self._waiting[deployment] += 1
        try:
            async with asyncio.timeout(seconds):
                while (target := self.choose(model)) is None:
                    await self._deployments[deployment].changed.wait()
                return target
        except TimeoutError:
            raise Unavailable(f"{model!r} is still loading; ask again in a moment", {"model": model}) from None
        finally:
            self._waiting[deployment] -= 1


def split_model(model: str) -> tuple[str, str]:
    """(deployment id, revision id or "") of what a client sent as "model"."""
    name = model.removeprefix("deployments/")
    deployment, _, revision = name.replace("/revisions/", "@", 1).partition("@")
    return deployment, revision


def _next(weights: Mapping[str, int], current: dict[str, int]) -> str:
    """Smooth weighted round robin: exact shares, evenly mixed, no randomness. Source: nginx, ngx_http_upstream_rr."""
    for revision, weight in weights.items():
        current[revision] = current.get(revision, 0) + weight
    best = max(weights, key=lambda r: current[r])
    current[best] -= sum(weights.values())
    return best
