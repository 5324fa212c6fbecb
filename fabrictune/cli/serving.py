"""`fabrictune deploy`, `undeploy`, `deployments`: models that are served."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fabrictune.cli.context import console, print_json, print_message, print_rows, settings, to_dict
from fabrictune.cli.specs import read_spec
from fabrictune.connection import read_connection
from fabrictune.errors import ApiError
from fabrictune.v1 import inference_pb2

if TYPE_CHECKING:
    from fabrictune.client import Client

State = inference_pb2.Revision
START_STEPS = ("fetch", "place", "load", "reference", "probe", "first_token", "adapters")
"""Steps of Revision.start_seconds, in their order."""
POLL_SECONDS = 0.5
DeploymentName = Annotated[
    str, typer.Argument(help="Such as deployments/quickstart; the only one there is when absent.")
]


def deploy(
    model: Annotated[str, typer.Argument(help="models/ID, or a model's folder (served here, in the foreground).")],
    deployment: Annotated[str, typer.Option("--as", help="The deployment's id; the model's when absent.")] = "",
    port: Annotated[int, typer.Option(help="For a folder: the HTTP port; 0 takes a free one.")] = 8000,
    spec_file: Annotated[Path | None, typer.Option("--spec", help="YAML: dtype, max_model_len, engine_args, …")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything; start nothing.")] = False,
) -> None:
    """Serve a model behind an OpenAI-compatible address, once it has passed the parity probe.

    An earlier revision answers until then. A model deployed again while it is warm takes the traffic at once.
    """
    if Path(model).is_dir():
        from fabrictune import local

        local.deploy_folder(Path(model), port, deployment, read_spec(spec_file), dry_run)
        return
    spec = {**read_spec(spec_file), "model": model}
    with settings().connect() as client:
        name = deployment or model.rpartition("/")[2]
        planned = client.inference.deploy(name, spec, validate_only=True)  # names the one revision that this makes
        if dry_run:
            print_message(planned)
            return
        client.inference.deploy(name, spec)
        ready = wait_ready(client, planned.name, planned.revisions[0].name)
    if settings().json:
        print_json(to_dict(ready))
    else:
        console.print(
            f"[green]✓[/] {ready.name} answers at {address_here(ready)} as model {ready.served_model!r}",
            highlight=False,
        )
        for revision in ready.revisions:
            if revision.name.rpartition("/")[2] in ready.traffic and revision.start_seconds:
                console.print(f"  {describe_start(revision.start_seconds)}", highlight=False)


def describe_start(seconds: Mapping[str, float]) -> str:
    """How long a revision took to its first token, step by step."""
    steps = [f"{step.replace('_', ' ')} {seconds[step]:.1f} s" for step in START_STEPS if step in seconds]
    total = f"first token after {seconds['total']:.1f} s: " if "total" in seconds else ""
    return total + ", ".join(steps)


def undeploy(name: Annotated[str, typer.Argument(help="Such as deployments/quickstart.")]) -> None:
    """Stop a deployment and forget it. Its models stay."""
    with settings().connect() as client:
        client.inference.delete(name)


def deployments() -> None:
    """What is served, and by which revision."""
    with settings().connect() as client:
        found = client.inference.list()
    if settings().json:
        print_json([to_dict(d) for d in found])
        return
    rows = [
        {
            "name": d.name,
            "revision": r.name.rpartition("/")[2],
            "state": State.State.Name(r.state),
            "traffic": f"{d.traffic[r.name.rpartition('/')[2]]} %" if r.name.rpartition("/")[2] in d.traffic else "",
            "model": r.spec.model,
            "address": address_here(d),
        }
        for d in found
        for r in d.revisions
    ]
    columns = {
        "name": "NAME",
        "revision": "REVISION",
        "state": "STATE",
        "traffic": "TRAFFIC",
        "model": "MODEL",
        "address": "ADDRESS",
    }
    print_rows(rows, columns, "nothing is deployed")


def address_here(deployment: inference_pb2.Deployment) -> str:
    """The OpenAI base address for this machine: while `fabrictune connect` runs, its own, since the cluster's is none here."""
    gateway = "" if settings().endpoint else read_connection().get("gateway")
    return f"{gateway}/v1" if gateway else deployment.address


def wait_ready(client: Client, name: str, revision_name: str) -> inference_pb2.Deployment:
    """The deployment once this revision of it takes traffic. Raises ApiError when it fails, stops, or another one has it."""
    with console.status(f"{name}: starting") as status:
        while True:
            deployment = client.inference.get(name)
            revision = next((r for r in deployment.revisions if r.name == revision_name), None)
            if revision is None:
                raise ApiError(f"{revision_name} was deleted while it started", "NOT_FOUND")
            if revision.state == State.FAILED:
                from fabrictune.channel import from_status

                raise from_status(revision.error)
            if revision.state in (State.DRAINING, State.STOPPED):
                raise ApiError(f"{revision_name} was stopped while it started", "FAILED_PRECONDITION")
            if revision.state == State.READY:
                _check_takes_traffic(deployment, revision_name)
                return deployment
            status.update(f"{name}: {State.State.Name(revision.state).lower()}  {revision.message}")
            time.sleep(POLL_SECONDS)


def _check_takes_traffic(deployment: inference_pb2.Deployment, revision_name: str) -> None:
    """A revision has become READY and taken the traffic in one step: without any, somebody wanted it otherwise."""
    revision_id = revision_name.rpartition("/")[2]
    if not deployment.traffic.get(revision_id):
        others = ", ".join(f"{r} {part} %" for r, part in sorted(deployment.traffic.items())) or "nobody"
        raise ApiError(
            f"{revision_name} is ready, but the traffic was given to others while it started ({others}); "
            f"`fabrictune traffic {deployment.name} {revision_id}=100` moves it",
            "FAILED_PRECONDITION",
        )


def only_deployment(client: Client) -> str:
    """The name of the one deployment that there is. Raises ApiError when there are none, or several."""
    found = [d.name for d in client.inference.list()]
    if len(found) != 1:
        what = "nothing is deployed" if not found else f"there are {', '.join(found)}; name one"
        raise ApiError(what, "INVALID_ARGUMENT")
    return found[0]
