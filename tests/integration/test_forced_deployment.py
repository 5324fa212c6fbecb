"""A run past a gate that is not met, and what a deployment's lineage tells of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from fabrictune.v1 import artifact_pb2
from services.common.artifacts import Artifacts
from services.common.errors import GateNotMet, NotFound, Unavailable
from services.common.store import Store
from services.pipeline.admission import is_filled_in
from services.pipeline.artifacts import ArtifactService
from services.pipeline.clients import RemoteError
from services.pipeline.lineage import lineage_key
from services.pipeline.spec import Spec
from tests.conftest import Recorder
from tests.pipeline_stages import RUN, Stages, serve_stages

REVISION = "deployments/d/revisions/r-1"


@pytest.fixture
def served(store: Store, artifacts: Artifacts, tmp_path: Path) -> ArtifactService:
    """A deployment that serves models/m."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files/x.safetensors").write_text("x")
    for name in ("models/m", "reports/r"):
        artifacts.publish(tmp_path / "files", name, name.partition("s/")[0])
    store.put_json(
        "deployments/d/deployment.json",
        {"traffic": {"r-1": 100}, "revisions": {"r-1": {"spec": {"model": "models/m"}}}},
    )
    return ArtifactService(store, artifacts)


async def root(service: ArtifactService) -> artifact_pb2.Artifact:
    lineage = await service.GetLineage(artifact_pb2.GetLineageRequest(name="deployments/d"), None)
    return lineage.artifacts[0]


async def test_a_deployment_by_hand_tells_its_model_only(served: ArtifactService) -> None:
    told = await root(served)
    assert [i.name for i in told.created_by.inputs] == ["models/m"]
    assert (told.created_by.job, len(told.metadata)) == ("", 0)


async def test_a_run_is_named_and_a_force_with_the_numbers(served: ArtifactService, store: Store) -> None:
    run: dict[str, Any] = {"run": "pipelineRuns/p"}
    store.put_json(lineage_key(REVISION), run)
    told = await root(served)
    assert (told.created_by.job, len(told.metadata)) == ("pipelineRuns/p", 0)
    report = {"name": "reports/r", "digest": "d" * 64}
    store.put_json(lineage_key(REVISION), {**run, "forced": True, "report": report, "error": {"message": "calls: 1 %"}})
    told = await root(served)
    assert [i.name for i in told.created_by.inputs] == ["models/m", "reports/r"]
    assert told.metadata["forced"] is True
    assert told.metadata["description"] == "deployed by force: the gate of reports/r is not met"
    assert json_format.MessageToDict(told.metadata)["error"] == {"message": "calls: 1 %"}


async def test_what_lies_beside_a_revision_without_traffic_is_not_told(served: ArtifactService, store: Store) -> None:
    store.put_json(lineage_key("deployments/d/revisions/r-2"), {"run": "pipelineRuns/q"})
    assert (await root(served)).created_by.job == ""


def test_only_a_missed_gate_can_be_forced() -> None:
    assert RemoteError(GateNotMet("calls").to_status()).reason_of_status == "GATE_NOT_MET"
    assert RemoteError(NotFound("gone").to_status()).reason_of_status == "NOT_FOUND"


def test_what_a_run_fills_in_is_not_complained_of_but_what_is_named_alike_is() -> None:
    assert is_filled_in("evaluation", "spec.target")
    assert is_filled_in("evaluation", "spec.target.address")
    assert not is_filled_in("evaluation", "spec.targets[0].address")
    assert not is_filled_in("conversion", "spec.sources")


@pytest.fixture
async def stages(store: Store, artifacts: Artifacts, tmp_path: Path) -> AsyncIterator[Stages]:
    async with serve_stages(store, artifacts, tmp_path) as stages:
        yield stages


async def test_a_missed_gate_stops_a_run_with_its_numbers_and_its_report(stages: Stages, reporter: Recorder) -> None:
    with pytest.raises(RemoteError) as refused:
        await stages.reconciler.drive("pipelineRuns/p", Spec.model_validate(RUN), reporter)
    assert refused.value.reason_of_status == "GATE_NOT_MET"
    assert [(v.field, v.description) for v in refused.value.violations] == [("calls", "1 % of 10 rows")]
    assert stages.revisions.traffic == {}


async def test_only_the_tuned_model_meets_the_gate_and_the_others(stages: Stages, reporter: Recorder) -> None:
    with pytest.raises(RemoteError):
        await stages.reconciler.drive("pipelineRuns/p", Spec.model_validate(RUN), reporter)
    before, after = (job.spec for job in stages.jobs["evaluation"].jobs.values())
    assert (before.target.label, len(before.gate), len(before.targets), before.constrained) == ("before", 0, 0, False)
    assert (after.target.label, len(after.gate), len(after.targets), after.constrained) == ("after", 1, 1, True)
    assert after.baseline == "reports/r"


async def test_a_force_deploys_and_leaves_the_error_on_record(
    stages: Stages, reporter: Recorder, store: Store, artifacts: Artifacts
) -> None:
    made = await stages.reconciler.drive("pipelineRuns/p", Spec.model_validate({**RUN, "force": True}), reporter)
    assert made["deployment"] == "deployments/d"
    (revision,) = stages.revisions.traffic
    stored = store.get_json("pipelineRuns/p/stages.json")
    assert stored is not None
    judged = next(stage for stage in stored["stages"] if stage["stage"] == "evaluation-after")
    assert judged["execution"]["state"] == "SUCCEEDED"
    assert judged["execution"]["error"]["details"][0]["reason"] == "GATE_NOT_MET"
    told = store.get_json(lineage_key(f"deployments/d/revisions/{revision}"))
    assert told is not None
    assert (told["run"], told["forced"], told["report"]["name"]) == ("pipelineRuns/p", True, "reports/r")
    assert told["report"]["digest"] == artifacts.get("reports/r").digest
    assert any(severity == "WARNING" and "deployed by force" in text for severity, text in reporter.lines)


async def test_a_forced_model_never_serves_without_its_lineage(
    stages: Stages, reporter: Recorder, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(key: str, *_: Any, **__: Any) -> bool:
        raise Unavailable(f"no room for {key}")

    spec = Spec.model_validate({**RUN, "force": True})
    with monkeypatch.context() as patch:
        real = store.put_json
        patch.setattr(store, "put_json", lambda key, *a, **k: (broken if "/lineage/" in key else real)(key, *a, **k))
        with pytest.raises(Unavailable, match="no room for deployments/d/lineage/"):
            await stages.reconciler.drive("pipelineRuns/p", spec, reporter)
    assert stages.revisions.traffic == {}
    stages.revisions.full = True
    with pytest.raises(RemoteError, match="not now"):
        await stages.reconciler.drive("pipelineRuns/p", spec, reporter)
    (key,) = store.list_keys("deployments/d/lineage/")
    assert (store.get_json(key) or {})["forced"] is True


async def test_a_gate_that_is_met_leaves_no_trace_of_the_force(
    stages: Stages, reporter: Recorder, store: Store
) -> None:
    spec = {**RUN, "evaluation": {}, "force": True}
    await stages.reconciler.drive("pipelineRuns/p", Spec.model_validate(spec), reporter)
    (revision,) = stages.revisions.traffic
    assert store.get_json(lineage_key(f"deployments/d/revisions/{revision}")) == {"run": "pipelineRuns/p"}
