"""`fabrictune deploy` against the real service, with the small server in vLLM's place (see test_inference_rollout)."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fabrictune.v1 import inference_pb2_grpc
from services.common.config import ServerConfig
from services.common.server import Server, service
from services.inference.revisions import Revision, State
from services.inference.rollout import Rollout
from services.inference.service import InferenceService
from services.inference.spec import parse_spec
from tests.integration.test_inference_rollout import open_house, spec


class AnyModel:
    """All models are there, and each has its name's digest, or another one if it was made again."""

    made_again = ""

    def get(self, name: str) -> Any:
        return SimpleNamespace(name=name, digest=f"{'second ' * (name == self.made_again)}digest of {name}")


@dataclass
class Served:
    folder: Path
    rollout: Rollout
    endpoint: str

    async def deploy(self, model: str, *engine_args: str, status: int = 0) -> str:
        """Ends with its stdout, or with stderr when it is to fail."""
        (self.folder / "spec.json").write_text(json.dumps({"engine_args": engine_args}))
        argv = (sys.executable, "-m", "fabrictune", "deploy", model, "--as", "x", "--spec", "spec.json")
        env = {k: v for k, v in os.environ.items() if not k.startswith("FABRICTUNE_")}
        env |= {"FABRICTUNE_ENDPOINT": self.endpoint, "COLUMNS": "200"}
        done = await asyncio.to_thread(
            subprocess.run, argv, cwd=self.folder, env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == status, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stderr if status else done.stdout

    def serves(self) -> str:
        """The model that has all traffic."""
        [(revision, part)] = self.rollout.get("x").traffic.items()
        assert part == 100
        return self.rollout.get_revision("x", revision).spec.model


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    house = await open_house(tmp_path)
    models: Any = AnyModel()
    servicer = InferenceService(house.open(), house.routes, models, "http://gateway/v1")
    add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    server = Server([service(servicer, add)], ServerConfig(port=0, metrics_port=0, drain_seconds=0), None)
    await server.start()
    yield Served(tmp_path, house.rollouts[0], f"127.0.0.1:{server.port}")
    await server.close()
    await house.rollouts[0].close()
    await house.cluster.close()


async def test_deploy_ends_when_the_revision_that_it_made_answers_and_not_while_an_earlier_one_does(
    served: Served,
) -> None:
    for model in ("models/a", "models/b", "models/a"):
        assert "✓ deployments/x answers" in await served.deploy(model)
        assert served.serves() == model
    assert len(served.rollout.get("x").revisions) == 2


async def test_an_adapter_made_again_under_its_name_is_another_revision() -> None:
    nothing: Any = None
    models = AnyModel()
    servicer = InferenceService(nothing, nothing, cast("Any", models), "")
    plain, adapted = (parse_spec({"model": "models/m", "adapters": a}) for a in ([], ["adapters/a"]))
    ids = [await servicer._revision_id(plain), await servicer._revision_id(adapted)]
    models.made_again = "adapters/a"
    assert await servicer._revision_id(plain) == ids[0]
    assert await servicer._revision_id(adapted) not in ids


async def test_deploy_says_why_its_own_revision_failed_and_not_why_an_earlier_one_did(served: Served) -> None:
    await served.deploy("models/a")
    assert "1.0000 nats" in await served.deploy("models/b", "--wrong", status=78)
    assert served.serves() == "models/a"
    await served.deploy("models/c")
    assert served.serves() == "models/c"


async def loading(served: Served) -> Revision:
    """The one revision, once its engine loads."""
    async with asyncio.timeout(20):
        while True:
            await asyncio.sleep(0.05)
            for deployment in served.rollout.list():
                for revision in deployment.revisions.values():
                    if revision.state is State.LOADING and "place" in revision.seconds:
                        return revision


@pytest.mark.parametrize(("forgotten", "status"), [(False, 78), (True, 66)], ids=["stopped", "deleted"])
async def test_deploy_says_that_its_revision_was_ended_meanwhile(served: Served, forgotten: bool, status: int) -> None:
    call = asyncio.create_task(served.deploy("models/a", "--loading", status=status))
    made = await loading(served)
    await (served.rollout.delete_revision if forgotten else served.rollout.stop_revision)("x", made.revision)
    assert f"was {'deleted' if forgotten else 'stopped'} while it started" in await call


async def test_deploy_says_who_got_the_traffic_meanwhile(served: Served) -> None:
    await served.rollout.create_revision("x", "other", spec())
    assert (await served.rollout.wait("x", "other")).state is State.READY
    call = asyncio.create_task(served.deploy("models/a", status=78))
    made = await loading(served)
    await served.rollout.set_traffic("x", {"other": 100})
    said = await call
    assert "the traffic was given to others while it started (other 100 %)" in said
    assert f"`fabrictune traffic deployments/x {made.revision}=100` moves it" in " ".join(said.split())
