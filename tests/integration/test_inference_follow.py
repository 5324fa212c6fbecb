"""Adapters of engines in pods: the list in a real store, followed beside small servers that stand where vLLM stands."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from services.common.artifacts import Artifacts as StoredArtifacts
from services.common.clusters import Phase, Workload, WorkloadStatus
from services.common.errors import AlreadyExists, DataLoss, DeadlineExceeded, FailedPrecondition
from services.common.store import Store
from services.inference.engine import Hardware
from services.inference.follow import Follower, adapters_key, read_list
from services.inference.launch import Limits
from services.inference.reference import PROMPTS_VERSION, ForcedText, Reference
from services.inference.revisions import State, from_json, to_json
from services.inference.rollout import Rollout
from services.inference.routes import RouteTable
from services.inference.spec import parse_spec
from services.inference.stored import stored_artifacts

TEXT = ForcedText((5, 6, 7), (6, 7), (1, 1), (3.0, 3.0), (-0.1, -0.2))


@dataclass
class Pod:
    """One engine and its follower."""

    store: Store
    folder: Path
    loaded: dict[str, str] = field(default_factory=dict)
    """Adapters by their names in the engine → their folders."""
    away: bool = False
    follows: bool = True

    async def start(self) -> None:
        app = web.Application()
        app.add_routes([web.get("/v1/models", self._models), web.post("/v1/load_lora_adapter", self._load),
                        web.post("/v1/unload_lora_adapter", self._unload), web.post("/v1/completions", self._complete),
                        web.post("/v1/chat/completions", self._chat)])  # fmt: skip
        self.server = TestServer(app)
        await self.server.start_server()
        self.follower = Follower(self.store, "x", "r1", self.folder, self.address, self.folder / "ready")
        if not self.follows:
            (self.folder / "ready").touch()
        self.task = asyncio.create_task(self.follower.follow() if self.follows else asyncio.sleep(0))

    async def close(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, FailedPrecondition):
            await self.task
        await self.server.close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def ready(self) -> bool:
        return (self.folder / "ready").exists()

    async def _models(self, _: web.Request) -> web.Response:
        if self.away:
            raise web.HTTPServiceUnavailable
        return web.json_response({"data": [{"id": name} for name in ("x", *self.loaded)]})

    async def _load(self, request: web.Request) -> web.Response:
        told = await request.json()
        if "bad" in told["lora_name"]:
            return web.Response(status=400, text="its rank is too large")
        assert (Path(told["lora_path"]) / "adapter_config.json").exists(), "it is fetched before the engine is told"
        self.loaded[told["lora_name"]] = told["lora_path"]
        return web.Response()

    async def _unload(self, request: web.Request) -> web.Response:
        del self.loaded[(await request.json())["lora_name"]]
        return web.Response()

    async def _complete(self, _: web.Request) -> web.Response:
        said = [None, {"6": {"logprob": -0.1, "rank": 1}}, {"7": {"logprob": -0.2, "rank": 1}}]
        return web.json_response({"choices": [{"prompt_logprobs": said}]})

    async def _chat(self, request: web.Request) -> web.Response:
        there = (await request.json())["model"] in {"x", *self.loaded}
        return web.json_response({"choices": []}, status=200 if there else 404)


@dataclass
class Pods:
    """A cluster whose only engine has these pods behind its address, as Kubernetes tells of a Deployment."""

    pods: list[Pod]
    digest: str = ""

    async def create(self, workload: Workload) -> WorkloadStatus:
        self.digest = workload.digest
        for pod in self.pods:
            await pod.start()
        status = await self.get(workload.name)
        assert status is not None
        return status

    async def get(self, name: str) -> WorkloadStatus | None:
        if not self.digest:
            return None
        each = tuple(pod.address for pod in self.pods if pod.ready)
        address = each[0] if each else ""
        return WorkloadStatus(name, "engine", self.digest, Phase.RUNNING, address=address, each=each)

    async def read_log(self, name: str) -> str:
        return ""

    async def list(self, kind: str = "") -> list[WorkloadStatus]:
        return []

    async def stop(self, name: str) -> None:
        self.digest = ""

    async def delete(self, name: str) -> None:
        self.digest = ""

    def watch(self) -> AsyncIterator[WorkloadStatus]:
        raise NotImplementedError

    def render(self, workload: Workload) -> str:
        raise NotImplementedError


@dataclass
class House:
    pods: list[Pod]
    rollout: Rollout
    routes: RouteTable
    names: dict[str, str]
    """Adapters by id → their names in the engine."""

    def loaded(self) -> list[set[str]]:
        return [set(pod.loaded) for pod in self.pods]


@pytest.fixture
async def house(store: Store, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    """Of two pods; with the parameter "local", of one engine that follows nothing."""
    local = getattr(request, "param", "") == "local"
    artifacts, names = StoredArtifacts(store, tmp_path / "cache"), {}
    (model := tmp_path / "model").mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    digest = artifacts.publish(model, "models/m", "model", created_by={}, metadata={}).digest
    for name in ("one", "two", "bad"):
        (folder := tmp_path / name).mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "of": name}))
        (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
        adapter = artifacts.publish(folder, f"adapters/{name}", "adapter", created_by={}, metadata={})
        names[name] = f"x:{name}:{adapter.digest[:12]}"
    stored = stored_artifacts(store, artifacts, remote=not local)
    await stored.store_reference(Reference(digest, "float32", PROMPTS_VERSION, {}, (TEXT,)))
    pods = [Pod(store, tmp_path / f"pod-{n}", follows=not local) for n in ((1,) if local else (1, 2))]
    routes = RouteTable()
    for pod in pods:
        pod.folder.mkdir()
    limits = Limits(start=20, drain=1, restarts=2, first_pause=0.05, poll=0.05, adapters=6)
    rollout = Rollout(Pods(pods), routes, stored, Hardware(0, 2, 8 * 1024**3), limits)
    spec = parse_spec({"model": "models/m", "adapters": ["adapters/one"], "lora": {"max_adapters": 2}})
    await rollout.create_revision("x", "r1", spec, take_traffic=True)
    made = await rollout.wait("x", "r1")
    assert made.state is State.READY, made.message
    yield House(pods, rollout, routes, names)
    await rollout.close()
    for pod in pods:
        await pod.close()


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.05)


async def test_adapters_change_in_every_pod_while_it_runs(house: House) -> None:
    assert house.loaded() == [{house.names["one"]}] * 2
    await house.rollout.change_adapters("x", "r1", ("adapters/one", "adapters/two"))
    assert house.loaded() == [{house.names["one"], house.names["two"]}] * 2, "before a request may ask for it"
    target = house.routes.choose("x:two")
    assert target is not None and target.served_name == house.names["two"]
    await house.rollout.change_adapters("x", "r1", ("adapters/two",))
    assert house.rollout.get_revision("x", "r1").spec.adapters == ("adapters/two",)
    await until(lambda: house.loaded() == [{house.names["two"]}] * 2)


async def test_who_asks_for_the_revision_again_gets_the_adapters_that_it_was_asked_for_with(house: House) -> None:
    asked = house.rollout.get_revision("x", "r1").spec
    await house.rollout.change_adapters("x", "r1", ("adapters/two", "adapters/one"))
    changed = house.rollout.get("x")
    assert from_json(to_json(changed)) == changed and changed.revisions["r1"].created_spec == asked
    again = await house.rollout.create_revision("x", "r1", asked, take_traffic=True)
    assert again.state is State.READY and again.spec.adapters == ("adapters/one",)
    await until(lambda: house.loaded() == [{house.names["one"]}] * 2)
    with pytest.raises(AlreadyExists):
        await house.rollout.create_revision("x", "r1", asked.model_copy(update={"max_concurrency": 2}))


async def test_a_pod_whose_engine_began_anew_is_ready_again_only_with_what_was_loaded_meanwhile(house: House) -> None:
    await house.rollout.change_adapters("x", "r1", ("adapters/one", "adapters/two"))
    pod = house.pods[1]
    pod.away, pod.loaded = True, {}
    await until(lambda: not pod.ready)
    pod.away = False
    await until(lambda: pod.ready)
    assert set(pod.loaded) == {house.names["one"], house.names["two"]}


async def test_an_adapter_that_engines_refuse_leaves_all_as_it_was(house: House, store: Store) -> None:
    with pytest.raises(DeadlineExceeded, match=r"has no x:bad:.*; the log of the container `adapters`"):
        await house.rollout.change_adapters("x", "r1", ("adapters/one", "adapters/bad"))
    assert house.rollout.get_revision("x", "r1").spec.adapters == ("adapters/one",)
    assert set(read_list(store, "x", "r1")) == {"adapters/one"}
    assert house.loaded() == [{house.names["one"]}] * 2 and all(pod.ready for pod in house.pods)


async def test_an_adapter_that_is_refused_at_the_start_ends_the_follower_with_the_engines_words(
    house: House, store: Store
) -> None:
    pod = house.pods[0]
    await pod.close()
    (pod.folder / "ready").unlink()
    (listed,) = [d for n, d in read_list(store, "x", "r1").items() if n == "adapters/one"]
    bad = StoredArtifacts(store, pod.folder / "other").get("adapters/bad").digest
    store.put_json(adapters_key("x", "r1"), {"adapters": {"adapters/bad": bad, "adapters/one": listed}})
    await pod.start()
    with pytest.raises(FailedPrecondition, match=r"refuses adapters/bad .*: its rank is too large"):
        await asyncio.wait_for(asyncio.shield(pod.task), 10)
    assert not pod.ready


async def test_the_list_goes_with_its_deployment_and_nonsense_is_no_list(house: House, store: Store) -> None:
    key = adapters_key("x", "r1")
    await house.rollout.delete("x")
    assert store.get_json(key) is None and read_list(store, "x", "r1") == {}
    store.put_json(key, {"adapters": ["adapters/one"]})
    with pytest.raises(DataLoss, match=r"deployments/x/adapters/r1\.json is no list of adapters"):
        read_list(store, "x", "r1")


@pytest.mark.parametrize("house", ["local"], indirect=True)
async def test_an_engine_of_this_machine_is_as_it_was_too_when_it_refuses_an_adapter(house: House) -> None:
    with pytest.raises(FailedPrecondition, match="refuses adapters/bad"):
        await house.rollout.change_adapters("x", "r1", ("adapters/two", "adapters/bad"))
    assert house.rollout.get_revision("x", "r1").spec.adapters == ("adapters/one",)
    assert house.loaded() == [{house.names["one"]}], "what was loaded before the refused one has gone again"
    await house.rollout.change_adapters("x", "r1", ("adapters/two",))
    assert house.loaded() == [{house.names["two"]}]
