"""`fabrictune datasets from-traffic`: what people asked a deployment and what it did well, as rows to train on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fabrictune.cli.artifacts import push_with_bar
from fabrictune.cli.context import console, print_json, settings
from fabrictune.cli.serving import only_deployment
from fabrictune.errors import ApiError


def make_rows(
    output: Annotated[Path, typer.Option("--output", "-o", help="A new file, such as rows.jsonl.")],
    deployment: Annotated[str, typer.Option(help="deployments/ID; the only one there is when absent.")] = "",
    since: Annotated[str, typer.Option(help="36h, 7d, 2w, or a date; all that is kept when absent.")] = "",
    folder: Annotated[
        Path | None, typer.Option(help="Records in files (FABRICTUNE_RECORD_FOLDER) instead of a server's.")
    ] = None,
    push: Annotated[str, typer.Option("--push", help="Push the rows, too: datasets/ID.")] = "",
) -> None:
    """Make rows of recorded traffic: conversations whose calls parsed, named a listed tool, and got a result and an answer.

    `up --record` records; admins may read it. The rows have AgentFabric's form: `fabrictune convert --format agentfabric`.
    What was left out, and why, stands beside them in …left-out.jsonl. Look at the rows before you train on them.
    """
    from fabrictune import local
    from fabrictune.traffic import fetch_records, list_records, parse_since

    begin = parse_since(since)
    if not output.name.endswith(".jsonl"):
        raise ApiError(f"--output {output} must end in .jsonl, as rows files do", "INVALID_ARGUMENT")
    if push and not push.startswith("datasets/"):
        raise ApiError(f"--push {push!r} must look like datasets/my-traffic", "INVALID_ARGUMENT")
    left_out = output.with_name(output.name.removesuffix(".jsonl") + ".left-out.jsonl")
    for file in (output, left_out):
        if file.exists():
            raise ApiError(f"{file} exists; choose another name", "ALREADY_EXISTS")
    with tempfile.TemporaryDirectory(prefix="fabrictune-traffic-", dir=output.absolute().parent) as scratch:
        here = Path(scratch)
        if folder is not None:
            files = list_records(folder)
        else:
            with settings().connect() as client:
                files = fetch_records(client, deployment or only_deployment(client), begin, here)
        told = local.rows_from_traffic(files, begin, here / "rows", here / "left-out")
        if told["rows"]:
            (here / "rows").rename(output)
        if told["left_out"]:
            (here / "left-out").rename(left_out)
    if told["rows"] and push:
        with settings().connect() as client:
            description = f"conversations of {deployment or folder}" + (f" since {since}" if since else "")
            push_with_bar(client, output, push, "rows", {"description": description})
    names = {"output": str(output) * bool(told["rows"]), "left_out_file": str(left_out) * bool(told["left_out"])}
    _show({**names, "pushed": push, **told})
    if not told["rows"]:
        hint = "is anything recorded? `fabrictune up --record`" if not told["records"] else f"see {left_out}"
        raise ApiError(f"no record is a row to train on; {hint}", "DATA_LOSS", "INVALID_DATA")


def _show(told: Mapping[str, Any]) -> None:
    if settings().json:
        print_json(told)
        return
    console.print(f"{told['records']} records, {told['rows']} rows", highlight=False)
    for reason, found in told["left_out"].items():
        console.print(f"  {found['count']:>6}  {reason}: {found['meaning']}", highlight=False, markup=False)
    if told["output"]:
        where = f"{told['output']}" + (f" and {told['pushed']}" if told["pushed"] else "")
        console.print(f"[green]✓[/] wrote [bold]{where}[/]", highlight=False)
