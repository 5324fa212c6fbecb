"""`traffic` and `adapters`: which revision answers, by how much, and which LoRA adapters it serves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from fabrictune.cli.context import console, print_json, settings, to_dict
from fabrictune.cli.specs import read_spec
from fabrictune.errors import ApiError
from fabrictune.v1 import inference_pb2

State = inference_pb2.CanaryRun.State


def traffic(
    deployment: Annotated[str, typer.Argument(help="deployments/ID.")],
    weights: Annotated[
        list[str] | None, typer.Argument(help="REVISION=PERCENT, adding up to 100. Without any, the traffic as it is.")
    ] = None,
    canary: Annotated[
        bool, typer.Option("--canary", help="By steps to the one revision that is named, and back when it does worse.")
    ] = False,
    spec_file: Annotated[
        Path | None, typer.Option("--spec", help="YAML of a canary: steps, observe, max_error_rate, max_p95_ratio, …")
    ] = None,
) -> None:
    """Move traffic between the ready revisions of a deployment, in one step or as a canary.

    Naming an earlier revision is a rollback: for five minutes it is still warm.
    """
    wanted = _read_weights(weights or [])
    with settings().connect() as client:
        if not wanted:
            found = client.inference.get(deployment)
        else:
            policy = read_spec(spec_file) if canary or spec_file else None
            found = client.inference.update_traffic(deployment, wanted, policy)
    if settings().json:
        print_json(to_dict(found))
        return
    for revision, percent in sorted(found.traffic.items()):
        console.print(f"{revision} {percent} %", highlight=False)
    if found.HasField("canary"):
        told = found.canary
        console.print(
            f"canary {told.candidate}: {State.Name(told.state)}. {told.reason}", markup=False, highlight=False
        )


def adapters(
    revision: Annotated[str, typer.Argument(help="deployments/ID/revisions/ID.")],
    names: Annotated[
        list[str] | None, typer.Argument(help="adapters/ID …: all that it shall serve from now on.")
    ] = None,
) -> None:
    """Load and unload LoRA adapters in a running revision; clients ask for MODEL:ADAPTER."""
    with settings().connect() as client:
        found = client.inference.update_adapters(revision, names or [])
    if settings().json:
        print_json(to_dict(found))
        return
    console.print("\n".join(found.spec.adapters) or "no adapters", highlight=False)


def _read_weights(told: list[str]) -> dict[str, int]:
    wrong = [each for each in told if not re.fullmatch(r"[^=]+=\d{1,3}", each)]
    if wrong:
        raise ApiError(f"{', '.join(wrong)}: must be REVISION=PERCENT, such as r2=100", "INVALID_ARGUMENT")
    return {revision: int(percent) for revision, _, percent in (each.rpartition("=") for each in told)}
