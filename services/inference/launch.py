"""One engine from its workload to its first right answer: start it, wait until it answers, compare it with the reference.

Nothing here knows of deployments and traffic; see `rollout`.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from google.rpc import code_pb2

from services.common.clusters import Cluster, Phase, Workload, WorkloadStatus
from services.common.errors import DeadlineExceeded, FailedPrecondition, Unavailable, WorkerLost
from services.common.logs import get_logger
from services.inference import parity
from services.inference.adapters import Adapter
from services.inference.connections import OWN_REQUEST, open_session
from services.inference.engine import (
    HEALTH_PATH,
    Hardware,
    Model,
    reference_dtype,
    trusts_remote_code,
)
from services.inference.engines import ENGINES, SHUTDOWN_SECONDS
from services.inference.failures import explain_failure
from services.inference.reference import Reference, run_reference
from services.inference.revisions import Deployment, Revision
from services.inference.spec import RevisionSpec

LONGEST_PAUSE_SECONDS = 10.0
"""Between two attempts to reach a cluster or a store that is away."""

_T = TypeVar("_T")
_U = TypeVar("_U")


@dataclass(frozen=True)
class Artifacts:
    """How a rollout reaches what is stored. All may raise errors of services.common.errors."""

    fetch_model: Callable[[str], Awaitable[Model]]
    """By "models/{id}"."""
    fetch_reference: Callable[[str, str], Awaitable[Reference | None]]
    """By model digest and dtype; None when there is none of this version."""
    store_reference: Callable[[Reference], Awaitable[None]]
    save: Callable[[Deployment], Awaitable[None]]
    forget: Callable[[str], Awaitable[None]]
    """By deployment id: it was deleted."""
    fetch_adapter: Callable[[str], Awaitable[Adapter]] | None = None
    """By "adapters/{id}"; None where there is no store."""
    list_adapters: Callable[[str, str, Sequence[Adapter]], Awaitable[None]] | None = None
    """By deployment and revision id: which adapters its engines are to have, where each pod sees to that itself."""


@dataclass(frozen=True)
class Limits:
    """Times in seconds."""

    place: float = 1800
    """Until there is a place to run (resources.queue_timeout says otherwise)."""
    start: float = 1800
    """From then on until it answers: the budget for loading (FABRICTUNE_ENGINE_START_SECONDS)."""
    shutdown: float = SHUTDOWN_SECONDS
    """Answers in flight may take so long when an engine is told to end, as the cluster does that drains a node."""
    drain: float = 300
    """What is in flight may take this long once a revision is to stop."""
    keep_warm: float = 300
    """How long a revision without traffic that once had some stays ready for a rollback."""
    restarts: int = 5
    """Crashes in a row after which a revision has failed."""
    first_pause: float = 1
    """Before the first restart; it doubles each time, up to a minute."""
    adapters: float = 300
    """Until all pods of an engine have the adapters that they are to have."""
    calm: float = 600
    """Having been READY for so long forgives earlier crashes."""
    poll: float = 0.25


class Launcher:
    """Starts engines. Close it at the end."""

    def __init__(self, cluster: Cluster, artifacts: Artifacts, hardware: Hardware, limits: Limits) -> None:
        self.cluster, self.artifacts, self.hardware, self.limits = cluster, artifacts, hardware, limits
        self._reference_lock = asyncio.Lock()
        self._log = get_logger("rollout")
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """For requests to engines; `generate` uses it too."""
        if self._session is None:
            self._session = open_session()
        return self._session

    async def close(self) -> None:
        """Close the connections to engines."""
        if self._session:
            await self._session.close()

    async def find(self, name: str, digest: str) -> str:
        """Where this very engine answers, from an earlier process; "" when it does not run (any more)."""
        deadline = time.monotonic() + self.limits.start
        while time.monotonic() < deadline:
            status = await self.cluster.get(name)
            if status is None or status.phase is not Phase.RUNNING or status.digest != digest or status.stopping:
                return ""
            if status.address and await self._answers(status.address + HEALTH_PATH):
                return status.address
            await asyncio.sleep(self.limits.poll)
        return ""

    async def is_coming(self, name: str) -> bool:
        """Whether the cluster is about to run it, perhaps once more after its pod was lost."""
        status = await self.cluster.get(name)
        return status is not None and status.phase is Phase.PENDING and not status.stopping

    async def asleep(self, name: str) -> str:
        """Says so when somebody has scaled it to no pod at all; else ""."""
        status = await self.cluster.get(name)
        return status.message if status is not None and status.asleep else ""

    async def start(self, work: Workload) -> None:
        """Give it to the cluster; one of that name that is another, or has ended, goes first."""
        status = await self.cluster.get(work.name)
        ended = status is not None and (status.stopping or status.phase in (Phase.SUCCEEDED, Phase.FAILED))
        if status is not None and (ended or status.digest != work.digest):
            await self.cluster.delete(work.name)
        await self.cluster.create(work)

    async def remove(self, name: str) -> None:
        """Delete an engine, however long the cluster does not answer: nobody else would. Raises PermissionDenied."""
        pause = self.limits.first_pause
        while True:
            try:
                return await self.cluster.delete(name)
            except Unavailable as error:
                self._log.warning("an engine is not deleted yet", workload=name, error=error.message)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def healthy(
        self, work: Workload, tell: Callable[[str], Awaitable[None]], placed: Callable[[], None] = lambda: None
    ) -> str:
        """The engine's address once it answers. tell: what it waits for, when that changes; placed: its process runs now.

        Raises WorkerLost (it ended, or was put to sleep), DeadlineExceeded; with the end of its log.
        """
        deadline = time.monotonic() + (work.queue_timeout_seconds or self.limits.place)
        waits, said = True, ""
        while time.monotonic() < deadline:
            status = await self.cluster.get(work.name)
            if status is None or status.phase in (Phase.SUCCEEDED, Phase.FAILED):
                raise WorkerLost(f"the engine ended while it started. {await self._last_words(work.name, status)}")
            if status.asleep:  # how long nobody wakes it is no fault of the place
                raise WorkerLost(f"the engine {status.message}")
            if waits and status.phase is Phase.RUNNING:
                waits, deadline = False, time.monotonic() + self.limits.start
                placed()
            message = status.message if waits else "the engine loads the model"
            if message and message != said:
                said = message
                await tell(message)
            if status.address and await self._answers(status.address + work.health_path):
                return status.address
            await asyncio.sleep(self.limits.poll)
        if waits:
            raise DeadlineExceeded(f"the engine found no place to run: {said}")
        raise DeadlineExceeded(
            f"the engine did not answer within {self.limits.start:.0f} s (FABRICTUNE_ENGINE_START_SECONDS; in the chart "
            f"engine.startSeconds). {await self._last_words(work.name)}"
        )

    async def _answers(self, url: str) -> bool:
        # A connection of its own: one made before kube-proxy knew the Service may end somewhere else, and stay there.
        fresh = {"connection": "close"}
        try:
            async with self.session.get(url, headers=fresh, timeout=aiohttp.ClientTimeout(total=5)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def watch(self, name: str) -> str:
        """Until the engine has gone, or the cluster has put another in its place; returns why."""
        while True:
            status = await self.cluster.get(name)
            if status is None or status.phase in (Phase.SUCCEEDED, Phase.FAILED):
                return await self._last_words(name, status)
            if status.phase is Phase.PENDING:
                return f"Its pod is gone: {status.message}"
            await asyncio.sleep(self.limits.poll)

    async def _last_words(self, name: str, status: WorkloadStatus | None = None) -> str:
        log, told = (await self.cluster.read_log(name)).strip(), status.message if status else ""
        advice = explain_failure(f"{told}\n{log}")
        if log and status and status.error and status.error.code == code_pb2.ABORTED:
            told = ""  # it has merely gone: its log says more. That memory ran out, only the cluster says
        end = "\n".join(log.splitlines()[-15:])
        return "".join(f"{words[0].upper()}{words[1:]}. " for words in (told, advice) if words) + (
            f"The end of its log:\n{end}" if end else "It left no log"
        )

    async def reference(self, model: Model, spec: RevisionSpec) -> Reference:
        """The stored reference, or a new one; never two computations at a time."""
        dtype = reference_dtype(model, self.hardware)
        async with self._reference_lock:
            known = await self.artifacts.fetch_reference(model.digest, dtype)
            if known is not None:
                return known
            if model.remote:
                raise FailedPrecondition("the engine's pod has left no parity reference; the log of `prepare` says why")
            with tempfile.TemporaryDirectory(prefix="fabrictune-reference-") as scratch:
                output, trusted = Path(scratch) / "reference.json", trusts_remote_code(spec)
                made = await run_reference(model.folder, model.digest, dtype, output, trusted)
            await self.artifacts.store_reference(made)
            return made

    async def probe(self, revision: Revision, work: Workload, address: str, reference: Reference) -> None:
        """Compare a running engine with the reference. Raises FailedPrecondition when it is too far off."""
        engine, wanted = ENGINES[revision.spec.engine], revision.spec.parity
        flags = (engine.flags["dtype"], engine.flags["max_model_len"])
        dtype, length = (work.argv[work.argv.index(flag) + 1] for flag in flags)
        result = await parity.probe(
            self.session, address, revision.deployment, reference, dtype, wanted, int(length), engine.forced_tokens
        )
        revision.parity = asdict(result)
        parity.check(result, wanted)

    async def smoke(self, address: str, model: str) -> None:
        """One chat answer of one token: the chat template is there and sampling works. Raises FailedPrecondition."""
        body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1}
        try:
            async with self.session.post(f"{address}/v1/chat/completions", json=body, timeout=OWN_REQUEST) as response:
                if response.status != 200:
                    raise FailedPrecondition(
                        f"the engine refuses a chat with {model} (HTTP {response.status}): "
                        f"{(await response.text())[:500]}. A model needs a chat template "
                        "(chat_template.jinja beside its tokenizer)",
                        reason_override="SMOKE_TEST_FAILED",
                    )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable(f"the engine went away during its first chat, or did not end it: {error!r}") from None


async def run_both(first: Coroutine[Any, Any, _T], second: Coroutine[Any, Any, _U]) -> tuple[_T, _U]:
    """Run both; the first failure cancels the other one and is raised as it is."""
    one, two = asyncio.create_task(first), asyncio.create_task(second)
    try:
        return await asyncio.gather(one, two)
    finally:
        for task in (one, two):
            task.cancel()
        await asyncio.gather(one, two, return_exceptions=True)
