"""Rollouts with real processes and a small server that stands where vLLM stands (it repeats the reference)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from services.common.clusters import Phase, Workload, WorkloadStatus
from services.common.clusters.local import LocalCluster
from services.common.errors import AlreadyExists, FailedPrecondition, Unavailable
from services.inference import endings, launch, saver
from services.inference.engine import Hardware, Model, describe_model
from services.inference.gateway import Gateway
from services.inference.launch import Artifacts, Limits
from services.inference.reference import PROMPTS_VERSION, ForcedText, Reference
from services.inference.revisions import CanaryState, Deployment, Revision, State, from_json, to_json
from services.inference.rollout import Rollout
from services.inference.routes import RouteTable
from services.inference.spec import Canary, RevisionSpec, parse_spec

REFERENCE = Reference(
    "d", "float32", PROMPTS_VERSION, {}, (ForcedText((5, 6, 7), (6, 7), (1, 1), (3.0, 3.0), (-0.1, -0.2)),)
)
ENGINE = """
import asyncio, os, sys
from aiohttp import web
if "--broken" in sys.argv:
    sys.exit("error: unrecognized arguments: --broken")
shift = 1.0 if "--wrong" in sys.argv else 0.0
async def models(_): return web.Response(status=503 if "--loading" in sys.argv else 200)
asked = 0
async def chat(request):
    global asked
    asked += 1
    if "--hanging" in sys.argv:
        await asyncio.sleep(60)
    if "--failing" in sys.argv and asked > 1:
        return web.Response(status=500)
    if not (await request.json()).get("stream"):
        return web.json_response({"choices": []})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(10):
        await response.write(b'data: {"choices":[{"delta":{"content":"a"}}]}\\n\\n')
        await asyncio.sleep(0.1)
    await response.write(b"data: [DONE]\\n\\n")
    return response
async def completions(request):
    said = [None, {"6": {"logprob": -0.1 - shift, "rank": 1}}, {"7": {"logprob": -0.2 - shift, "rank": 1}}]
    return web.json_response({"choices": [{"prompt_logprobs": said}]})
app = web.Application()
app.add_routes([web.get("/v1/models", models), web.post("/v1/completions", completions)])
app.router.add_post("/v1/chat/completions", chat)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[sys.argv.index("--port") + 1]), print=None)
"""


class SmallEngines(LocalCluster):
    """The local cluster, running the small server with vLLM's arguments."""

    async def create(self, workload: Workload) -> WorkloadStatus:
        return await super().create(replace(workload, argv=(sys.executable, "-c", ENGINE, *workload.argv[3:])))


class LostPods(SmallEngines):
    """While `lost`, engines wait for a place again, as Kubernetes says of a Deployment whose pod is gone; while `asleep`, they
    are scaled to 0."""

    lost = asleep = False
    deleted = refusals = 0
    slow_seconds = 0.0

    async def get(self, name: str) -> WorkloadStatus | None:
        status = await super().get(name)
        if status and self.asleep:
            return replace(status, phase=Phase.PENDING, message="is asleep", asleep=True)
        return replace(status, phase=Phase.PENDING, message="waits for a node") if status and self.lost else status

    async def delete(self, name: str) -> None:
        """As a cluster does that is busy: `refusals` times not at all, and after `slow_seconds`."""
        if self.refusals:
            self.refusals -= 1
            raise Unavailable("the API server does not answer")
        await asyncio.sleep(self.slow_seconds)
        self.deleted += 1
        self.asleep = False
        await super().delete(name)


@dataclass
class House:
    folder: Path
    cluster: LostPods
    routes: RouteTable = field(default_factory=RouteTable)
    saved: dict[str, str] = field(default_factory=dict)
    rollouts: list[Rollout] = field(default_factory=list)
    store_is_away: bool = False
    model_digest: str = "d"

    def reach_store(self) -> None:
        if self.store_is_away:
            raise Unavailable("the object store does not answer")

    def open(self, keep_warm: float = 300, start: float = 20, place: float = 60) -> Rollout:
        async def fetch_model(_: str) -> Model:
            self.reach_store()
            return describe_model("models/m", self.model_digest, self.folder)

        async def fetch_reference(_digest: str, _dtype: str) -> Reference | None:
            return REFERENCE

        async def store_reference(_: Reference) -> None:
            raise AssertionError("it is there already")

        async def save(deployment: Deployment) -> None:
            self.reach_store()
            self.saved[deployment.id] = json.dumps(to_json(deployment))

        async def forget(deployment: str) -> None:
            self.reach_store()
            del self.saved[deployment]

        artifacts = Artifacts(fetch_model, fetch_reference, store_reference, save, forget)
        limits = Limits(place=place, start=start, drain=1, keep_warm=keep_warm, restarts=2, first_pause=0.05, poll=0.05)
        self.rollouts.append(Rollout(self.cluster, self.routes, artifacts, Hardware(0, 2, 8 * 1024**3), limits))
        return self.rollouts[-1]

    def restored(self) -> list[Deployment]:
        return [from_json(json.loads(plain)) for plain in self.saved.values()]

    def answers(self) -> str:
        """The revision that the gateway would ask now."""
        target = self.routes.choose("x")
        return target.revision if target else ""

    def engine_pid(self) -> int:
        [entry] = [json.loads(f.read_text()) for f in (self.folder / "cluster" / "journal").glob("*.json")]
        return int(entry["pid"])


async def open_house(folder: Path) -> House:
    """With a model in the folder, and a cluster that runs."""
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    cluster = LostPods(folder / "cluster")
    await cluster.start()
    return House(folder, cluster)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = await open_house(tmp_path)
    yield house
    for rollout in house.rollouts:
        await rollout.close()
    await house.cluster.close()


def spec(*engine_args: str, **fields: Any) -> RevisionSpec:
    return parse_spec({"model": "models/m", "engine_args": list(engine_args), **fields})


async def ready(rollout: Rollout, revision: str, **options: Any) -> None:
    await rollout.create_revision("x", revision, spec(**options.pop("fields", {})), **options)
    made = await rollout.wait("x", revision)
    assert made.state is State.READY, made.message


async def test_a_rollback_to_a_warm_revision_needs_no_loading(house: House) -> None:
    rollout = house.open()
    await ready(rollout, "a")
    await rollout.set_traffic("x", {"a": 100})
    await ready(rollout, "b", fields={"max_concurrency": 2})
    assert (target := house.routes.choose("x")) is not None and target.revision == "a"
    await rollout.set_traffic("x", {"b": 100})
    assert (target := house.routes.choose("x")) is not None and target.revision == "b"
    await rollout.set_traffic("x", {"a": 100})
    assert (target := house.routes.choose("x")) is not None and target.revision == "a"
    with pytest.raises(FailedPrecondition, match="takes 100 % of the traffic"):
        await rollout.delete_revision("x", "a")
    await rollout.delete("x")
    assert await house.cluster.list("engine") == [] and house.saved == {} and house.routes.models() == []


async def test_a_revision_that_lost_its_traffic_cools_down_and_stops(house: House) -> None:
    rollout = house.open(keep_warm=0.1)
    await ready(rollout, "a")
    await rollout.set_traffic("x", {"a": 100})
    await ready(rollout, "b")
    await rollout.set_traffic("x", {"b": 100})
    async for deployment in rollout.watch("x"):
        if deployment.revisions["a"].state is State.STOPPED:
            break
    assert len(await house.cluster.list("engine")) == 1
    with pytest.raises(AlreadyExists):
        await rollout.create_revision("x", "a", spec(max_concurrency=3))
    await ready(rollout, "a")


async def test_an_engine_that_computes_something_else_takes_no_traffic(house: House) -> None:
    rollout = house.open()
    await rollout.create_revision("x", "a", spec("--wrong"), take_traffic=True)
    made = await rollout.wait("x", "a")
    assert made.state is State.FAILED and "1.0000 nats" in made.message
    assert made.error["details"][0]["reason"] == "PARITY_FAILED" and made.parity["positions"] == 2
    assert rollout.get("x").traffic == {}


async def test_an_engine_that_does_not_start_fails_with_its_log_and_what_to_do(house: House) -> None:
    rollout = house.open()
    await rollout.create_revision("x", "a", spec("--broken"))
    made = await rollout.wait("x", "a")
    assert made.state is State.FAILED
    assert "does not know" in made.message and "unrecognized arguments: --broken" in made.message


async def test_an_engine_that_listens_but_names_no_model_is_not_ready_and_its_budget_for_loading_ends(
    house: House,
) -> None:
    rollout = house.open(start=2)
    await rollout.create_revision("x", "a", spec("--loading"), take_traffic=True)
    made = await rollout.wait("x", "a")
    assert made.state is State.FAILED and "did not answer within 2 s (FABRICTUNE_ENGINE_START_SECONDS" in made.message


async def test_a_crashed_engine_is_started_again_and_its_traffic_stays(house: House) -> None:
    rollout = house.open()
    await ready(rollout, "a", take_traffic=True)
    os.kill(house.engine_pid(), signal.SIGKILL)
    seen = []
    async for deployment in rollout.watch("x"):
        seen.append(deployment.revisions["a"].state)
        if len(seen) > 1 and seen[-1] is State.READY and seen[-2] is not State.READY:
            break
    assert rollout.get("x").traffic == {"a": 100} and rollout.get_revision("x", "a").restarts == 1
    async with asyncio.timeout(5):
        async with house.routes.hold("x", 5) as target:
            assert target.revision == "a"


async def test_an_engine_whose_pod_is_lost_is_not_ready_until_the_cluster_runs_it_again(house: House) -> None:
    rollout = house.open()
    await ready(rollout, "a", take_traffic=True)
    house.cluster.lost = True
    async with asyncio.timeout(20):
        async for deployment in rollout.watch("x"):
            revision = deployment.revisions["a"]
            if revision.state is State.READY and not house.cluster.lost:
                break
            if revision.state is State.LOADING and "waits for a node" in revision.message:
                house.cluster.lost = False
    assert revision.restarts == 1 and house.cluster.deleted == 0 and rollout.get("x").traffic == {"a": 100}


async def until(rollout: Rollout, state: State, said: str = "") -> Revision:
    async with asyncio.timeout(20):
        async for deployment in rollout.watch("x"):
            revision = deployment.revisions["a"]
            if revision.state is state and said in revision.message:
                break
    return revision


async def test_an_engine_scaled_to_zero_sleeps_as_long_as_it_likes_and_keeps_its_traffic(house: House) -> None:
    rollout = house.open(place=0.1)
    await ready(rollout, "a", take_traffic=True)
    for _ in range(4):  # more often than it may crash
        house.cluster.asleep = True
        await until(rollout, State.PENDING, "is asleep")
        assert house.routes.choose("x") is None, "a request waits; that is what wakes it"
        await asyncio.sleep(0.3)  # longer than a place may take to be found
        house.cluster.asleep = False
        revision = await until(rollout, State.READY)
    assert revision.restarts == 0 and house.cluster.deleted == 0 and rollout.get("x").traffic == {"a": 100}


async def test_a_revision_that_is_asked_for_again_does_not_sleep_on(house: House) -> None:
    rollout = house.open()
    await ready(rollout, "a", take_traffic=True)
    house.cluster.asleep = True
    await until(rollout, State.PENDING, "is asleep")
    await ready(rollout, "a")
    revision = rollout.get_revision("x", "a")
    assert revision.restarts == 0 and rollout.get("x").traffic == {"a": 100}


async def test_an_engine_scaled_to_zero_while_it_starts_sleeps_too_and_a_new_process_lets_it(house: House) -> None:
    first = house.open(place=0.1)
    await first.create_revision("x", "a", spec("--loading"))
    await until(first, State.LOADING)
    house.cluster.asleep = True
    assert (await until(first, State.PENDING, "is asleep")).restarts == 0
    await first.close()
    second = house.open(place=0.1)
    await second.restore([from_json(json.loads(house.saved["x"]))])
    await until(second, State.PENDING, "is asleep")
    await asyncio.sleep(0.3)
    assert house.cluster.deleted == 0
    house.cluster.asleep = False
    await until(second, State.LOADING)


async def test_a_new_process_adopts_the_engine_that_still_runs(house: House) -> None:
    first = house.open()
    await ready(first, "a")
    await first.set_traffic("x", {"a": 100})
    pid = house.engine_pid()
    await first.close()
    second = house.open()
    await second.restore([from_json(json.loads(house.saved["x"]))])
    assert (await second.wait("x", "a")).state is State.READY
    assert house.engine_pid() == pid and second.get("x").traffic == {"a": 100}


async def test_a_new_process_starts_an_engine_that_has_gone(house: House) -> None:
    first = house.open()
    await ready(first, "a")
    await first.close()
    [engine] = await house.cluster.list("engine")
    await house.cluster.delete(engine.name)
    second = house.open()
    await second.restore([from_json(json.loads(house.saved["x"]))])
    assert (await second.wait("x", "a")).state is State.READY
    assert [s.phase for s in await house.cluster.list("engine")] == [Phase.RUNNING]


async def test_a_new_process_lets_an_engine_drain_whose_answers_the_old_one_may_still_hand_on(house: House) -> None:
    first = house.open()
    await ready(first, "a")
    pid = house.engine_pid()
    async with house.routes.hold("x@a", 1):
        stop = asyncio.create_task(first.stop_revision("x", "a"))
        await eventually(lambda: house.restored()[0].revisions["a"].state is State.DRAINING)
        await first.stop_driving()
        second = house.open()
        await second.restore(house.restored())
        await asyncio.sleep(0.5)
        assert house.engine_pid() == pid and house.cluster.deleted == 0
    await asyncio.gather(stop, return_exceptions=True)
    await eventually(lambda: second.get_revision("x", "a").state is State.STOPPED)
    assert await house.cluster.list("engine") == []


async def test_a_new_process_waits_for_no_engine_that_has_gone_while_it_drained(house: House) -> None:
    first = house.open()
    await ready(first, "a")
    [left] = house.restored()
    left.revisions["a"].state = State.DRAINING
    await first.close()
    [engine] = await house.cluster.list("engine")
    await house.cluster.delete(engine.name)
    second = house.open()
    second._launcher.limits = replace(second.limits, drain=60)
    await second.restore([left])
    await eventually(lambda: second.get_revision("x", "a").state is State.STOPPED)


async def ask(url: str, session: aiohttp.ClientSession) -> tuple[int, bytes]:
    async with session.post(f"{url}/v1/chat/completions", json={"model": "x", "stream": True}) as response:
        return response.status, await response.read()


async def test_a_canary_that_fails_gives_the_traffic_back_and_one_that_is_well_takes_all(house: House) -> None:
    rollout, gateway = house.open(), Gateway(house.routes)
    url = f"http://127.0.0.1:{await gateway.start('127.0.0.1', 0)}"
    policy = Canary(steps=(50,), observe=0.1, min_answers=4, max_p95_ratio=1000)
    await ready(rollout, "a", take_traffic=True)
    await ready(rollout, "b", fields={"engine_args": ["--failing"]})
    await ready(rollout, "c", fields={"max_concurrency": 3})
    async with aiohttp.ClientSession() as session:
        await rollout.start_canary("x", {"b": 100}, policy)
        assert rollout.get("x").traffic == {"a": 50, "b": 50}
        for _ in range(8):
            await ask(url, session)
        async for deployment in rollout.watch("x"):
            if deployment.canary is not None and deployment.canary.state is CanaryState.ROLLED_BACK:
                break
        assert deployment.canary is not None and "answers failed" in deployment.canary.reason
        assert deployment.traffic == {"a": 100}
        back = from_json(json.loads(house.saved["x"])).canary
        assert back is not None and back.state is CanaryState.ROLLED_BACK

        await rollout.start_canary("x", {"c": 100}, policy)
        streams = await asyncio.gather(*(ask(url, session) for _ in range(20)))
        async for deployment in rollout.watch("x"):
            if deployment.traffic == {"c": 100}:
                break
        await rollout.stop_revision("x", "a")
    assert all(status == 200 and raw.endswith(b"[DONE]\n\n") for status, raw in streams)
    await gateway.close()


async def test_a_rollback_and_a_drain_under_open_streams_abort_none(house: House) -> None:
    rollout, gateway = house.open(), Gateway(house.routes)
    url = f"http://127.0.0.1:{await gateway.start('127.0.0.1', 0)}"
    await ready(rollout, "a", take_traffic=True)
    await ready(rollout, "b", fields={"max_concurrency": 3})
    async with aiohttp.ClientSession() as session:
        streams = []
        for revision in ("b", "a", "b"):
            streams += [asyncio.create_task(ask(url, session)) for _ in range(20)]
            await asyncio.sleep(0.2)
            await rollout.set_traffic("x", {revision: 100})
        assert all(status == 200 and raw.endswith(b"[DONE]\n\n") for status, raw in await asyncio.gather(*streams))
    await gateway.close()


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.02)


async def test_an_engine_that_crashes_while_the_store_is_away_is_started_again(house: House) -> None:
    rollout = house.open()
    await ready(rollout, "a", take_traffic=True)
    made, house.store_is_away = rollout.get_revision("x", "a"), True
    os.kill(house.engine_pid(), signal.SIGKILL)
    await eventually(lambda: made.restarts == 1 and house.routes.choose("x") is None)
    await eventually(lambda: "waits for the object store" in made.message)
    house.store_is_away = False
    await eventually(lambda: house.answers() == "a")
    assert made.state is State.READY and made.restarts == 1
    await eventually(lambda: house.restored()[0].revisions["a"].restarts == 1)


async def test_an_engine_that_fails_while_the_store_is_away_is_no_longer_asked_and_goes(house: House) -> None:
    rollout = house.open(start=0.5)
    await rollout.create_revision("x", "a", spec("--loading"), take_traffic=True)
    await eventually(lambda: rollout.get_revision("x", "a").state is State.LOADING)
    house.store_is_away = True
    assert (await rollout.wait("x", "a")).state is State.FAILED
    with pytest.raises(Unavailable, match=r"it has failed or was stopped|no revision takes traffic"):
        house.routes.choose("x")
    async with asyncio.timeout(20):
        while await house.cluster.list("engine"):
            await asyncio.sleep(0.05)


async def test_an_engine_becomes_ready_while_the_store_is_away_and_that_is_saved_later(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "RETRY_SECONDS", 0.1)
    rollout = house.open()
    await rollout.create_revision("x", "a", spec(), take_traffic=True)
    await eventually(lambda: rollout.get_revision("x", "a").state is State.LOADING)
    house.store_is_away = True
    await eventually(lambda: house.answers() == "a")
    assert house.restored()[0].traffic == {}
    house.store_is_away = False
    await eventually(lambda: house.restored()[0].traffic == {"a": 100})


async def test_a_new_process_adopts_a_running_engine_even_if_the_store_goes_away(house: House) -> None:
    first = house.open()
    await ready(first, "a", take_traffic=True)
    pid = house.engine_pid()
    await first.close()
    second, house.store_is_away = house.open(), True
    await second.restore(house.restored())
    assert (await second.wait("x", "a")).state is State.READY and house.answers() == "a"
    assert house.engine_pid() == pid and second.get_revision("x", "a").restarts == 0


async def test_a_new_process_waits_for_the_store_before_it_starts_an_engine_that_has_gone(house: House) -> None:
    left = await leave_behind(house)
    second, house.store_is_away = house.open(), True
    await second.restore(left)
    made = second.get_revision("x", "a")
    await eventually(lambda: "waits for the object store" in made.message)
    house.store_is_away = False
    await eventually(lambda: house.answers() == "a")
    assert made.restarts == 0


async def leave_behind(house: House) -> list[Deployment]:
    """What a process has saved whose engine has gone with it."""
    first = house.open()
    await ready(first, "a", take_traffic=True)
    await first.close()
    [engine] = await house.cluster.list("engine")
    await house.cluster.delete(engine.name)
    return house.restored()


async def test_a_model_that_was_replaced_under_its_name_ends_no_engine_and_never_takes_its_place(house: House) -> None:
    first = house.open()
    await ready(first, "a", take_traffic=True)
    pid = house.engine_pid()
    await first.close()
    second, house.model_digest = house.open(), "another"
    await second.restore(house.restored())
    made = await second.wait("x", "a")
    assert made.state is State.READY and house.engine_pid() == pid
    os.kill(pid, signal.SIGKILL)
    failed = await until(second, State.FAILED)
    assert "models/m is not the model any more" in failed.message
    await ready(second, "b", take_traffic=True)


async def test_a_revision_asked_for_again_right_after_it_failed_waits_for_its_engine_to_go(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = house.open()
    launcher = rollout._launcher
    smoke, refusals = launcher.smoke, [FailedPrecondition("this once")]

    async def refuse_once(address: str, model: str) -> None:
        if refusals:
            raise refusals.pop()
        await smoke(address, model)

    monkeypatch.setattr(launcher, "smoke", refuse_once)
    await rollout.create_revision("x", "a", spec())
    house.cluster.slow_seconds = 1
    failed = await rollout.wait("x", "a")
    assert failed.state is State.FAILED and "this once" in failed.message
    await ready(rollout, "a")
    assert [s.phase for s in await house.cluster.list("engine")] == [Phase.RUNNING]


async def test_an_engine_that_the_cluster_did_not_delete_at_once_is_deleted_later(house: House) -> None:
    rollout = house.open(keep_warm=0.2)
    await ready(rollout, "a", take_traffic=True)
    await ready(rollout, "b", fields={"max_concurrency": 2})
    house.cluster.refusals = 2
    await rollout.set_traffic("x", {"b": 100})
    await eventually(lambda: rollout.get_revision("x", "a").state is State.STOPPED)
    assert len(await house.cluster.list("engine")) == 1 and house.cluster.refusals == 0
    house.cluster.refusals = 1
    await rollout.create_revision("x", "c", spec("--wrong"))
    assert (await rollout.wait("x", "c")).state is State.FAILED
    await eventually(lambda: house.cluster.refusals == 0)
    async with asyncio.timeout(20):
        while len(await house.cluster.list("engine")) > 1:
            await asyncio.sleep(0.02)


async def test_an_engine_that_never_ends_its_first_answer_fails(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "OWN_REQUEST", aiohttp.ClientTimeout(total=0.3))
    rollout = house.open()
    await rollout.create_revision("x", "a", spec("--hanging"))
    made = await rollout.wait("x", "a")
    assert made.state is State.FAILED and "did not end it" in made.message


@pytest.mark.parametrize("crashes", [False, True])
async def test_a_canary_goes_on_after_a_restart_of_the_service_unless_its_engine_has_crashed(
    house: House, crashes: bool
) -> None:
    first = house.open()
    await ready(first, "a", take_traffic=True)
    await ready(first, "b", fields={"max_concurrency": 2})
    first.get_revision("x", "b").restarts = first.get_revision("x", "b").lost = 1  # before the canary
    await first.start_canary("x", {"b": 100}, Canary(steps=(50,), observe=60, min_answers=4))
    await first.close()
    second, house.store_is_away = house.open(), True
    [left] = house.restored()
    left.revisions["b"].engine_digest = ""  # it cannot be adopted, and its model cannot be had yet
    await second.restore([left])
    await asyncio.sleep(1)
    canary = second.get("x").canary
    assert canary is not None and canary.state is CanaryState.RUNNING
    house.store_is_away = False
    assert (await second.wait("x", "b")).state is State.READY
    if crashes:
        [engine] = [s for s in await house.cluster.list("engine") if "-b-" in s.name]
        await house.cluster.delete(engine.name)
        await eventually(lambda: canary.state is CanaryState.ROLLED_BACK)
        assert "its engine was lost" in canary.reason
    else:
        await asyncio.sleep(0.6)
        assert canary.state is CanaryState.RUNNING


async def test_an_engine_of_an_earlier_process_that_a_cluster_cannot_start_now_is_started_later(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = await leave_behind(house)
    create, refusals = house.cluster.create, [Unavailable("the API server does not answer")]

    async def refuse_once(workload: Workload) -> WorkloadStatus:
        if refusals:
            raise refusals.pop()
        return await create(workload)

    monkeypatch.setattr(house.cluster, "create", refuse_once)
    second = house.open()
    await second.restore(left)
    await eventually(lambda: house.answers() == "a")
    assert second.get_revision("x", "a").restarts == 1


async def test_a_store_that_hangs_holds_up_no_engine(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "WAIT_SECONDS", 0.05)
    rollout, free = house.open(), asyncio.Event()

    async def hang(deployment: Deployment) -> None:
        await free.wait()
        house.saved[deployment.id] = json.dumps(to_json(deployment))

    monkeypatch.setattr(rollout._saver, "_artifacts", replace(rollout.artifacts, save=hang))
    await ready(rollout, "a", take_traffic=True)
    await eventually(lambda: house.answers() == "a")
    free.set()
    await eventually(lambda: bool(house.saved) and house.restored()[0].traffic == {"a": 100})


async def test_a_deployment_that_the_store_could_not_forget_is_there_until_it_can(house: House) -> None:
    rollout = house.open()
    await ready(rollout, "a", take_traffic=True)
    house.store_is_away = True
    with pytest.raises(Unavailable):
        await rollout.delete("x")
    assert await house.cluster.list("engine") == [] and rollout.get("x").traffic == {}
    house.store_is_away = False
    await rollout.delete("x")
    assert house.saved == {} and rollout.list() == []


async def test_traffic_that_is_moved_while_the_store_is_away_is_moved_and_says_that_it_is_not_saved(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "RETRY_SECONDS", 0.1)
    rollout = house.open(keep_warm=0.5)
    await ready(rollout, "a", take_traffic=True)
    await ready(rollout, "b")
    house.store_is_away = True
    with pytest.raises(Unavailable, match="is changed, but the object store has not taken that yet"):
        await rollout.set_traffic("x", {"b": 100})
    assert rollout.get("x").traffic == {"b": 100} and house.answers() == "b"
    house.store_is_away = False
    await eventually(lambda: house.restored()[0].traffic == {"b": 100})
    await rollout.set_traffic("x", {"b": 100})
    await eventually(lambda: rollout.get_revision("x", "a").state is State.STOPPED)


async def test_a_canary_that_fails_while_the_store_is_away_loses_its_traffic_at_once(house: House) -> None:
    rollout = house.open()
    await ready(rollout, "a", take_traffic=True)
    await ready(rollout, "b", fields={"max_concurrency": 2})
    await rollout.start_canary("x", {"b": 100}, Canary(steps=(50,), observe=0.1, min_answers=2))
    house.store_is_away = True
    for _ in range(3):
        house.routes.outcomes.note("x", "b", 0.1, failed=True)
    await eventually(lambda: house.routes.choose("x@b") is not None and {house.answers() for _ in range(4)} == {"a"})
    assert rollout.get("x").traffic == {"a": 100}


async def test_a_canary_whose_caller_goes_away_is_watched(house: House) -> None:
    rollout = house.open()
    await ready(rollout, "a", take_traffic=True)
    await ready(rollout, "b", fields={"max_concurrency": 2})
    policy = Canary(steps=(50,), observe=0.1, min_answers=0)
    for _ in range(2):  # the second takes the place of the first
        call = asyncio.create_task(rollout.start_canary("x", {"b": 100}, policy))
        await asyncio.sleep(0)
        call.cancel()
    await eventually(lambda: rollout.get("x").traffic == {"b": 100})


async def test_a_revision_that_lost_its_traffic_stops_after_a_restart_of_the_service_too(house: House) -> None:
    first = house.open(keep_warm=1.5)
    await ready(first, "a", take_traffic=True)
    await ready(first, "b", fields={"max_concurrency": 2})
    await first.set_traffic("x", {"b": 100})
    await first.close()
    second = house.open(keep_warm=1.5)
    await second.restore(house.restored())
    await eventually(lambda: second.get_revision("x", "a").state is State.STOPPED)
    assert len(await house.cluster.list("engine")) == 1 and house.answers() == "b"


async def test_an_engine_whose_undeployment_is_cancelled_in_mid_drain_ends_all_the_same(house: House) -> None:
    rollout = house.open()
    await ready(rollout, "a", take_traffic=True)
    async with house.routes.hold("x", 1):
        call = asyncio.create_task(rollout.delete("x"))
        await eventually(lambda: rollout.get_revision("x", "a").state is State.DRAINING)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await eventually(lambda: rollout.list() == [])
    assert await house.cluster.list("engine") == [] and house.saved == {}


async def test_an_undeployment_that_is_asked_for_again_cuts_no_answer_off(house: House) -> None:
    rollout = house.open()
    await ready(rollout, "a", take_traffic=True)
    async with house.routes.hold("x", 1):
        calls = [asyncio.create_task(rollout.delete("x")) for _ in range(2)]
        await eventually(lambda: rollout.get_revision("x", "a").state is State.DRAINING)
        calls.append(asyncio.create_task(rollout.delete("x")))
        await asyncio.sleep(0.3)
        assert not any(call.done() for call in calls)
    await asyncio.gather(*calls)
    assert house.saved == {}


async def test_a_revision_whose_deletion_is_cancelled_in_mid_drain_stops(house: House) -> None:
    rollout = house.open()
    await ready(rollout, "a")
    async with house.routes.hold("x@a", 1):
        call = asyncio.create_task(rollout.delete_revision("x", "a"))
        await eventually(lambda: rollout.get_revision("x", "a").state is State.DRAINING)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await eventually(lambda: rollout.get_revision("x", "a").state is State.STOPPED)
    assert await house.cluster.list("engine") == []


async def test_traffic_that_is_moved_to_a_revision_in_the_moment_it_stops_is_refused(house: House) -> None:
    rollout = house.open()
    await ready(rollout, "a", take_traffic=True)
    await ready(rollout, "b", take_traffic=True)
    stop = asyncio.create_task(rollout.stop_revision("x", "a"))
    await asyncio.sleep(0)
    with pytest.raises(FailedPrecondition, match="is DRAINING, not READY"):
        await rollout.set_traffic("x", {"a": 100})
    await stop
    assert house.answers() == "b" and rollout.get_revision("x", "a").state is State.STOPPED


async def test_an_earlier_model_deployed_again_while_it_is_warm_takes_the_traffic_at_once(house: House) -> None:
    rollout, other = house.open(), spec(max_concurrency=2)
    await ready(rollout, "a", take_traffic=True)
    await rollout.create_revision("x", "b", other, take_traffic=True)
    assert (await rollout.wait("x", "b")).state is State.READY and rollout.get("x").traffic == {"b": 100}
    await rollout.create_revision("x", "a", spec(), take_traffic=True)
    assert rollout.get("x").traffic == {"a": 100} and house.answers() == "a"
    await rollout.create_revision("x", "b", other)
    assert rollout.get("x").traffic == {"a": 100}, "who starts a revision beside the others moves no traffic"


async def test_a_revision_deployed_again_while_it_loads_takes_the_traffic_when_it_is_ready(house: House) -> None:
    rollout = house.open()
    await rollout.create_revision("x", "a", spec())
    await rollout.create_revision("x", "a", spec(), take_traffic=True)
    await rollout.create_revision("x", "a", spec())
    assert (await rollout.wait("x", "a")).state is State.READY and rollout.get("x").traffic == {"a": 100}


@pytest.mark.parametrize("first", ["a", "b"])
async def test_of_two_revisions_that_load_the_one_deployed_last_has_the_traffic_in_the_end(
    house: House, first: str
) -> None:
    rollout = house.open()
    await rollout.create_revision("x", "a", spec(), take_traffic=True)
    await rollout.create_revision("x", "b", spec(max_concurrency=2), take_traffic=True)
    if first == "a":  # it is deployed before the other, and now once more
        await rollout.create_revision("x", "a", spec(), take_traffic=True)
    for revision in ("a", "b"):
        assert (await rollout.wait("x", revision)).state is State.READY
    assert rollout.get("x").traffic == {first: 100}


async def test_a_revision_deployed_again_while_it_drains_is_started_when_it_has_stopped(house: House) -> None:
    rollout = house.open()
    await ready(rollout, "a")
    async with house.routes.hold("x@a", 1):
        stop = asyncio.create_task(rollout.stop_revision("x", "a"))
        await eventually(lambda: rollout.get_revision("x", "a").state is State.DRAINING)
        again = asyncio.create_task(rollout.create_revision("x", "a", spec(), take_traffic=True))
        await asyncio.sleep(0.1)
        assert not again.done()
    await asyncio.gather(stop, again)
    assert (await rollout.wait("x", "a")).state is State.READY and rollout.get("x").traffic == {"a": 100}


async def test_what_is_asked_for_again_but_long_drains_is_refused_with_what_to_do(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "PATIENCE_SECONDS", 0.1)
    rollout = house.open()
    await ready(rollout, "a")
    async with house.routes.hold("x@a", 1):
        for end in (rollout.stop_revision("x", "a"), rollout.delete("x")):
            ending = asyncio.create_task(end)
            await eventually(lambda: rollout.get_revision("x", "a").state is State.DRAINING)
            with pytest.raises(FailedPrecondition, match=r"is about to stop .* ask again when it has stopped, in 1 s"):
                await rollout.create_revision("x", "a", spec())
    await ending


async def test_a_deployment_made_again_while_it_is_deleted_is_made_when_it_has_gone(house: House) -> None:
    rollout = house.open()
    await ready(rollout, "a", take_traffic=True)
    async with house.routes.hold("x", 1):
        gone = asyncio.create_task(rollout.delete("x"))
        await eventually(lambda: rollout.get_revision("x", "a").state is State.DRAINING)
        again = asyncio.create_task(rollout.create_revision("x", "b", spec(), take_traffic=True))
        await asyncio.sleep(0.1)
    await asyncio.gather(gone, again)
    assert (await rollout.wait("x", "b")).state is State.READY
    assert rollout.get("x").revisions.keys() == {"b"} and rollout.get("x").traffic == {"b": 100}


async def test_a_revision_that_failed_while_it_was_warm_is_not_stopped_once_it_is_started_again(house: House) -> None:
    rollout = house.open(keep_warm=2)
    await ready(rollout, "a", take_traffic=True)
    await ready(rollout, "b", fields={"max_concurrency": 2})
    await rollout.set_traffic("x", {"b": 100})
    made = rollout.get_revision("x", "a")
    rollout._lifecycle._drives[made.name].cancel()
    await rollout._driver._fail(rollout.get("x"), made, FailedPrecondition("it is too far off"))
    await ready(rollout, "a")
    await asyncio.sleep(2)
    assert made.state is State.READY
