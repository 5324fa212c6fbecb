"""One revision from PENDING to READY, and again after each crash with growing pauses: a task a revision runs `drive`.

An engine that an autoscaler puts to sleep has not crashed: its revision is PENDING, so requests wait and wake it.

Nothing here knows of traffic; `rollout` says what happens when a revision is ready.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from prometheus_client import Histogram

from services.common.errors import FabrictuneError, FailedPrecondition, Unavailable, WorkerLost
from services.common.logs import get_logger
from services.common.metrics import REGISTRY
from services.inference.adapters import Adapter, check_base, largest_rank
from services.inference.beside import Beside, InOneEngine, InPods
from services.inference.engine import Model, adapter_model, engine_name, render_engine
from services.inference.launch import LONGEST_PAUSE_SECONDS, Launcher, run_both
from services.inference.revisions import Deployment, Revision, State, move
from services.inference.spec import RevisionSpec

_T = TypeVar("_T")

start_seconds = Histogram(
    "fabrictune_engine_start_seconds",
    "From the request for a revision to its first token, by step",
    ["step"],
    buckets=(0.5, 1, 2.5, 5, 10, 20, 30, 45, 60, 120, 300, 600, 1800),
    registry=REGISTRY,
)


@dataclass
class Driver:
    """Brings revisions up. addresses: of those that are READY, by resource name."""

    launcher: Launcher
    publish: Callable[[Deployment], Awaitable[None]]
    ready: Callable[[Deployment, Revision], Awaitable[None]]
    """Publishes that one has become READY, with the traffic that it takes from then on."""
    addresses: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Nothing runs yet."""
        self._log = get_logger("rollout")
        self._to_wake: set[str] = set()

    @cached_property
    def _beside(self) -> Beside:
        lister = self.launcher.artifacts.list_adapters
        return InPods(self.launcher, lister) if lister else InOneEngine(self.launcher)

    async def drive(self, owner: Deployment, revision: Revision, adopt: bool) -> None:
        """Until it has failed or is cancelled. adopt: an engine that still runs is taken as it is."""
        name, slept = engine_name(revision.deployment, revision.revision), False
        try:
            while True:
                slept = await self._sleep(owner, revision, name) or slept
                try:
                    await self._bring_up(owner, revision, adopt)
                except (WorkerLost, Unavailable) as error:
                    if not (adopt or revision.restarts or slept or await self.launcher.asleep(name)):
                        raise  # the first start: it would end the same way again
                    lost = error.message
                else:
                    since = time.monotonic()
                    lost = await self.launcher.watch(name)
                    revision.restarts *= time.monotonic() - since < self.launcher.limits.calm
                adopt = False
                if not await self.launcher.asleep(name):
                    await self._clear_away(owner, revision, name, lost)
        except FabrictuneError as error:
            await self._fail(owner, revision, error)
        except Exception:  # noqa: BLE001 - the rim of this task: without it the revision would stay LOADING for ever
            self._log.exception("driving a revision failed", revision=revision.name)
            await self._fail(owner, revision, FabrictuneError("internal error; the server's log says more"))

    async def wake(self, revision: Revision) -> None:
        """Start it anew if it is asleep: whoever asks for a revision waits until it is READY, and no request would wake it."""
        if await self.launcher.asleep(engine_name(revision.deployment, revision.revision)):
            self._to_wake.add(revision.name)

    async def _sleep(self, owner: Deployment, revision: Revision, name: str) -> bool:
        """Return once it is not asleep, however long that takes; whether it was."""
        if not (message := await self.launcher.asleep(name)):
            return False
        self.addresses.pop(revision.name, None)
        if revision.state is not State.PENDING:
            move(revision, State.PENDING)
        revision.message = f"the engine {message}"
        self._log.info("asleep", revision=revision.name)
        await self.publish(owner)
        while await self.launcher.asleep(name):
            if revision.name in self._to_wake:
                await self.launcher.remove(name)  # it is made anew with a pod
            await asyncio.sleep(self.launcher.limits.poll)
        self._to_wake.discard(revision.name)
        return True

    async def _clear_away(self, owner: Deployment, revision: Revision, name: str, lost: str) -> None:
        """Count a lost engine, remove what is left of it and pause. Raises WorkerLost when it was one too many."""
        revision.restarts, revision.lost = revision.restarts + 1, revision.lost + 1
        if revision.restarts > self.launcher.limits.restarts:
            raise WorkerLost(f"the engine was lost {revision.restarts} times in a row. {lost}")
        pause = min(self.launcher.limits.first_pause * 2 ** (revision.restarts - 1), 60)
        self._log.warning("engine lost", revision=revision.name, restarts=revision.restarts, pause=pause)
        self.addresses.pop(revision.name, None)
        move(revision, State.PENDING, f"the engine was lost; it is started again in {pause:.0f} s. {lost}")
        await self.publish(owner)
        if not await self.launcher.is_coming(name):
            await self.launcher.remove(name)
        await asyncio.sleep(pause)

    async def change_adapters(self, owner: Deployment, revision: Revision, names: tuple[str, ...]) -> None:
        """Load what is new and unload what is gone in the running engine. Raises FailedPrecondition, Unavailable."""
        if revision.state is not State.READY:
            raise FailedPrecondition(
                f"{revision.name} is {revision.state.value}, not READY; its adapters cannot change"
            )
        spec, address = revision.spec, self.addresses[revision.name]
        model = await self._model(revision)
        old = await self._adapters(spec, model)
        rank, room = largest_rank(spec.lora.max_rank, old), spec.max_adapters
        if len(names) > room:
            raise FailedPrecondition(
                f"{revision.name} was started with room for {room} adapters, not for {len(names)}; make a new revision "
                "with spec.lora.max_adapters"
            )
        # What the engine was started with stays in its spec: after a crash it gets the same flags.
        lora = spec.lora.model_copy(update={"max_adapters": room, "max_rank": rank})
        wanted = spec.model_copy(update={"adapters": names, "lora": lora})
        adapters = await self._adapters(wanted, model)
        if large := [a for a in adapters if a.rank > rank]:
            raise FailedPrecondition(
                f"{large[0].name} has rank {large[0].rank}; the engine was started for {rank} at most. Make a new "
                "revision with spec.lora.max_rank"
            )
        both = list({a.digest: a for a in (*old, *adapters)}.values())
        try:
            await self._beside.load(revision, address, both)
            await self._try_out(revision, address, adapters)
        except FabrictuneError:
            await self._beside.keep(revision, address, old)
            raise
        revision.created_spec, revision.spec = revision.asked_spec, wanted
        revision.adapters = {a.id: a.digest for a in adapters}
        await self.publish(owner)  # no new request asks for what is let go now
        await self._beside.keep(revision, address, adapters)

    async def _fail(self, owner: Deployment, revision: Revision, error: FabrictuneError) -> None:
        self._log.warning("revision failed", revision=revision.name, error=error.message)
        self.addresses.pop(revision.name, None)
        move(revision, State.FAILED, error=error)
        try:
            await self.publish(owner)
        finally:
            await self.launcher.remove(engine_name(revision.deployment, revision.revision))

    async def _bring_up(self, owner: Deployment, revision: Revision, adopt: bool) -> None:
        begin = clock = time.monotonic()
        spec = revision.spec
        if adopt and (address := await self._find(revision)):
            self._log.info("adopted", revision=revision.name)
            return await self._tell_ready(owner, revision, address)
        model, adapters = await self._fetch(owner, revision, patient=adopt or revision.restarts > 0)
        work = render_engine(
            revision.deployment, revision.revision, spec, model, self.launcher.hardware,
            largest_rank(spec.lora.max_rank, adapters), self.launcher.limits.shutdown,
        )  # fmt: skip
        revision.seconds = {"fetch": round(time.monotonic() - clock, 2)}
        await self.launcher.start(work)
        move(revision, State.LOADING, "the engine loads the model")
        await self.publish(owner)

        async def tell(message: str) -> None:
            if revision.message != message:
                revision.message = message
                await self.publish(owner)

        placed = time.monotonic()

        def note_place() -> None:
            revision.seconds["place"] = round(time.monotonic() - placed, 2)

        healthy = self.launcher.healthy(work, tell, note_place)
        # Importing vLLM takes one core for most of the start; the reference is computed on the other meanwhile,
        # unless both copies of the weights would not fit into memory.
        together = not model.remote and 4 * model.weight_bytes < self.launcher.hardware.memory_bytes / 2
        if together:
            address, reference = await run_both(
                self._timed(revision, "load", healthy),
                self._timed(revision, "reference", self.launcher.reference(model, spec)),
            )
        else:
            address = await self._timed(revision, "load", healthy)
            reference = await self._timed(revision, "reference", self.launcher.reference(model, spec))
        revision.seconds["load"] = round(revision.seconds["load"] - revision.seconds.get("place", 0), 2)
        move(revision, State.PROBING, "the engine is compared with the reference")
        await self.publish(owner)
        await self._timed(revision, "probe", self.launcher.probe(revision, work, address, reference))
        await self._timed(revision, "first_token", self.launcher.smoke(address, revision.deployment))
        if adapters:
            await self._timed(revision, "adapters", self._load(revision, address, adapters))
        revision.adapters = {a.id: a.digest for a in adapters}
        revision.engine_digest = work.digest
        revision.seconds["total"] = round(time.monotonic() - begin, 2)
        for step, seconds in revision.seconds.items():
            start_seconds.labels(step).observe(seconds)
        self._log.info("ready", revision=revision.name, seconds=revision.seconds)
        await self._tell_ready(owner, revision, address)

    async def _find(self, revision: Revision) -> str:
        """Where the engine of an earlier process answers, with the adapters that it had; "" when it has gone."""
        revision.message = "waits for the engine that runs already to answer"
        return await self.launcher.find(engine_name(revision.deployment, revision.revision), revision.engine_digest)

    async def _tell_ready(self, owner: Deployment, revision: Revision, address: str) -> None:
        move(revision, State.READY)
        revision.ready_time = time.time()
        self.addresses[revision.name] = address
        await self.ready(owner, revision)

    async def _fetch(self, owner: Deployment, revision: Revision, patient: bool) -> tuple[Model, list[Adapter]]:
        """What it serves. patient: a store that is away is waited for, for that says nothing of an engine that ran before."""
        pause = self.launcher.limits.first_pause
        while True:
            try:
                model = await self._model(revision)
                adapters = await self._adapters(revision.spec, model)
                await self._beside.expect(revision, adapters)
            except Unavailable as error:
                if not patient:
                    raise
                revision.message = f"waits for the object store: {error.message}"
                await self.publish(owner)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                return model, adapters

    async def _model(self, revision: Revision) -> Model:
        """What it serves from its beginning to its end. Raises FailedPrecondition when the name has another model now."""
        model = await self.launcher.artifacts.fetch_model(revision.spec.model)
        if revision.model_digest not in ("", model.digest):
            raise FailedPrecondition(
                f"{model.name} is not the model any more that {revision.name} began with; deploy it as a new revision"
            )
        revision.model_digest = model.digest
        return model

    async def _adapters(self, spec: RevisionSpec, model: Model) -> list[Adapter]:
        if not spec.adapters:
            return []
        if self.launcher.artifacts.fetch_adapter is None:
            raise FailedPrecondition("adapters come from the artifact store, and a folder is served without one")
        adapters = [await self.launcher.artifacts.fetch_adapter(name) for name in spec.adapters]
        for adapter in adapters:
            check_base(adapter, model)
        return adapters

    async def _load(self, revision: Revision, address: str, adapters: Sequence[Adapter]) -> None:
        await self._beside.load(revision, address, adapters)
        await self._try_out(revision, address, adapters)

    async def _try_out(self, revision: Revision, address: str, adapters: Sequence[Adapter]) -> None:
        for adapter in adapters:
            await self.launcher.smoke(address, adapter_model(revision.deployment, adapter.id, adapter.digest))

    async def _timed(self, revision: Revision, step: str, work: Coroutine[Any, Any, _T]) -> _T:
        clock = time.monotonic()
        result = await work
        revision.seconds[step] = round(time.monotonic() - clock, 2)
        return result
