"""Which stage of a run comes next, for every state it can be in."""

from __future__ import annotations

import pytest

from fabrictune.v1 import job_pb2
from services.pipeline.graph import is_done, next_stages, plan_stages
from services.pipeline.spec import Spec

E = job_pb2.Execution
FULL = {
    "conversion": {}, "training": {}, "evaluation": {}, "deployment": {"deployment": "deployments/d"},
}  # fmt: skip
ORDER = ["conversion", "training", "merging", "evaluation-before", "evaluation-after", "deployment"]


def names(**spec: object) -> list[str]:
    return [n.name for n in plan_stages(Spec.model_validate(spec))]


def test_stages() -> None:
    assert names(**FULL) == ORDER
    assert names(conversion={}, training={}) == ORDER[:3]
    assert names(conversion={}, training={}, deployment={"deployment": "deployments/d"}) == [*ORDER[:3], "deployment"]


@pytest.mark.parametrize("done", range(7))
def test_one_after_the_other(done: int) -> None:
    nodes = plan_stages(Spec.model_validate(FULL))
    states = dict.fromkeys(ORDER[:done], E.SUCCEEDED)
    assert next_stages(nodes, states) == ORDER[done : done + 1]
    assert is_done(nodes, states) == (done == 6)


@pytest.mark.parametrize("state", [E.RUNNING, E.FAILED, E.CANCELLED, E.QUEUED])
def test_nothing_starts_after_a_stage_that_has_not_succeeded(state: E.State) -> None:
    nodes = plan_stages(Spec.model_validate(FULL))
    states = {"conversion": E.SUCCEEDED, "training": state}
    assert next_stages(nodes, states) == []
    assert not is_done(nodes, states)
