"""Which revision answers a request: names, weights, what is in flight, what waits. Values and counters, no HTTP.

A client says "x" or "deployments/x" (the revision is chosen by weight), or "x@r", "deployments/x@r" or
"deployments/x/revisions/r" (that revision, traffic or not: so evaluation reaches a candidate); ":a" or "/adapters/a"
behind it asks for an adapter of the model. All of it happens in one event loop; `put` changes a deployment in one step,
so no request sees half of a change. Where there is no room a request is refused at once: it never waits for a time-out.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from prometheus_client import Counter as MetricCounter
from prometheus_client import Gauge

from services.common.errors import NotFound, ResourceExhausted, Unavailable
from services.common.metrics import REGISTRY
from services.inference.outcomes import Outcomes

RETRY_SECONDS = 1.0
"""What a client is told when there is no room; an answer ends every moment."""

waiting_requests = Gauge(
    "fabrictune_gateway_waiting_requests",
    "Requests that wait for a revision to load; what a cluster may scale from zero by",
    ["deployment"],
    registry=REGISTRY,
)
in_flight_requests = Gauge(
    "fabrictune_gateway_in_flight_requests", "Requests being answered", ["deployment", "revision"], registry=REGISTRY
)
refused_requests = MetricCounter(
    "fabrictune_gateway_refused_total", "Requests refused for want of room", ["deployment"], registry=REGISTRY
)


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
    room: int = 0
    """Requests that may be in flight, or wait while it loads; 0: any number."""
    max_prompt_characters: int = 0
    """0: any number; the engine counts tokens."""
    says_served_name: bool = True
    """Whether its engine's answers call the model that, too."""
    tools: bool = True
    """Whether a request may have `tools`."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Adapter id → what its engine calls it."""


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
        self.outcomes = Outcomes()

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
        deployment, revision, adapter = split_model(model)
        entry = self._deployments.get(deployment)
        if entry is None or (revision and revision not in entry.targets):
            known = ", ".join(self.models()) or "none yet; `fabrictune deploy` makes one"
            raise NotFound(f"there is no model {model!r} here; there are: {known}", {"model": model})
        if revision:
            candidates = {revision: 1}
        elif entry.traffic:
            candidates = {r: w for r, w in entry.traffic.items() if w > 0 and r in entry.targets}
            if adapter:  # while a rollout goes on, not every revision need have it
                candidates = {r: w for r, w in candidates.items() if adapter in entry.targets[r].adapters}
        else:
            candidates = {r: 1 for r, t in entry.targets.items() if t.loading}  # the first one is on its way
        if adapter and not any(adapter in entry.targets[r].adapters for r in candidates):
            known = ", ".join(sorted({a for t in entry.targets.values() for a in t.adapters})) or "none"
            raise NotFound(f"{deployment} serves no adapter {adapter!r}; it serves: {known}", {"model": model})
        ready = {r: w for r, w in candidates.items() if entry.targets[r].ready}
        if ready:
            chosen = entry.targets[_next(ready, entry.current) if len(ready) > 1 else next(iter(ready))]
            return replace(chosen, served_name=chosen.adapters[adapter]) if adapter else chosen
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
        """The revision for a request, counted as in flight; waits while it loads.

        Raises NotFound, Unavailable, ResourceExhausted (no room).
        """
        target = self.choose(model) or await self._wait(model, wait_seconds)
        key = (target.deployment, target.revision)
        if target.room and self._in_flight[key] >= target.room:
            raise _no_room(target.deployment, f"{self._in_flight[key]} requests are answered or wait")
        self._in_flight[key] += 1
        in_flight_requests.labels(*key).set(self._in_flight[key])
        try:
            yield target
        finally:
            self._in_flight[key] -= 1
            in_flight_requests.labels(*key).set(self._in_flight[key])
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
        deployment, _, _ = split_model(model)
        room = max((t.room for t in self._deployments[deployment].targets.values() if t.loading), default=0)
        if room and self._waiting[deployment] >= room:
            raise _no_room(deployment, f"{self._waiting[deployment]} requests wait until it has loaded")
        self._waiting[deployment] += 1
        waiting_requests.labels(deployment).set(self._waiting[deployment])
        try:
            async with asyncio.timeout(seconds):
                while (target := self.choose(model)) is None:
                    await self._deployments[deployment].changed.wait()
                return target
        except TimeoutError:
            raise Unavailable(f"{model!r} is still loading; ask again in a moment", {"model": model}) from None
        finally:
            self._waiting[deployment] -= 1
            waiting_requests.labels(deployment).set(self._waiting[deployment])


def split_model(model: str) -> tuple[str, str, str]:
    """(deployment id, revision id or "", adapter id or "") of what a client sent as "model"."""
    name = model.removeprefix("deployments/").replace("/revisions/", "@", 1).replace("/adapters/", ":", 1)
    name, _, adapter = name.partition(":")
    deployment, _, revision = name.partition("@")
    return deployment, revision, adapter


def _no_room(deployment: str, why: str) -> ResourceExhausted:
    refused_requests.labels(deployment).inc()
    return ResourceExhausted(
        f"{deployment} has too much to do: {why}; ask again in {RETRY_SECONDS:g} s, or raise spec.limits.max_queued or "
        "spec.max_concurrency",
        {"model": deployment},
        reason_override="OVERLOADED",
        retry_seconds=RETRY_SECONDS,
    )


def _next(weights: Mapping[str, int], current: dict[str, int]) -> str:
    """Smooth weighted round robin: exact shares, evenly mixed, no randomness. Source: nginx, ngx_http_upstream_rr."""
    for revision, weight in weights.items():
        current[revision] = current.get(revision, 0) + weight
    best = max(weights, key=lambda r: current[r])
    current[best] -= sum(weights.values())
    return best
