"""Whether a run can be accepted: each stage's service says so of its part, before anything begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.rpc import code_pb2

from services.common.errors import InvalidSpec, Violation
from services.pipeline.clients import JobClient, RemoteError
from services.pipeline.spec import Spec

FILLED_IN: Mapping[str, tuple[str, ...]] = {
    "conversion": (),
    "training": ("dataset",),
    "merging": ("base_model", "adapter"),
    "evaluation": ("dataset", "target", "baseline"),
}
"""Fields that a run fills in, by stage: what is said of them before the run begins does not count."""


async def check_stages(clients: Mapping[str, JobClient], spec: Spec) -> None:
    """Ask every service whether it would accept its stage. Raises InvalidSpec naming all that is wrong."""
    found: list[Violation] = []
    for stage, plain in _drafts(spec).items():
        try:
            await clients[stage].plan(plain)
        except InvalidSpec as error:
            found.append(Violation(f"spec.{stage}", error.message))
        except RemoteError as error:
            if error.status.code not in (code_pb2.INVALID_ARGUMENT, code_pb2.NOT_FOUND):
                raise
            named = [v for v in error.violations if not is_filled_in(stage, v.field)]
            found += [Violation(v.field.replace("spec", f"spec.{stage}", 1), v.description) for v in named]
            if not error.violations:
                found.append(Violation(f"spec.{stage}", error.message))
    if found:
        raise InvalidSpec("the run cannot be accepted", violations=found)


def is_filled_in(stage: str, field: str) -> bool:
    """Whether a run fills in this field of a stage's spec. field: its path, such as "spec.target.address"."""
    return any(field == f"spec.{f}" or field.startswith((f"spec.{f}.", f"spec.{f}[")) for f in FILLED_IN[stage])


def _drafts(spec: Spec) -> dict[str, dict[str, Any]]:
    """Each stage's spec with stand-ins for what the run fills in."""
    drafts = {
        "conversion": spec.conversion,
        "training": {**spec.training, "dataset": "datasets/filled-in"},
        "merging": {**spec.merging, "base_model": "models/filled-in", "adapter": "adapters/filled-in"},
    }
    if spec.evaluation is not None:
        target = {"revision": "deployments/filled-in/revisions/filled-in"}
        drafts["evaluation"] = {**spec.evaluation, "dataset": "datasets/filled-in", "target": target}
    return drafts
