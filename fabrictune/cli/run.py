"""`fabrictune run`: the whole way, from rows to an answering deployment, from one YAML file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from fabrictune.cli import results
from fabrictune.cli.artifacts import import_with_bar, push_with_bar
from fabrictune.cli.context import console, print_json, print_message, settings, to_dict
from fabrictune.cli.jobs import raise_failure
from fabrictune.cli.progress import find_with_bar, new_progress, print_log, show_progress
from fabrictune.cli.specs import read_sources, read_spec
from fabrictune.errors import ApiError
from fabrictune.names import ENDED, SUCCEEDED
from fabrictune.rows import push_rows
from fabrictune.sources import resolve_alias
from fabrictune.v1 import job_pb2

if TYPE_CHECKING:
    from fabrictune.client import Client

POLL_SECONDS = 0.5


def run(
    file: Annotated[Path, typer.Argument(help="YAML: conversion, training, merging, evaluation, deployment.")],
    start: Annotated[
        bool, typer.Option("--up", help="Start `fabrictune up` in the background when none runs here.")
    ] = False,
    run_id: Annotated[str, typer.Option("--id", help="The run's id; made up when absent.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every stage and print the plan; start nothing.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Start the run and return.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Deploy also when the gate is not met; the deployment's lineage tells it.")
    ] = False,
) -> None:
    """Carry rows through conversion, training, merging and evaluation to a deployment.

    A stage whose output exists, made from the same inputs and spec, is not done again.
    """
    spec = read_spec(file)
    if force:
        spec["force"] = True
    with ExitStack() as stack:
        if start:
            from fabrictune.cli.up import ensure_up

            stack.enter_context(ensure_up())
        client = stack.enter_context(settings().connect())
        _bring_inputs(client, spec, file.parent)
        if dry_run:
            print_message(client.pipelines.create(spec, run_id, validate_only=True))
            return
        name = client.pipelines.create(spec, run_id).name
        if detach:
            print_message(client.pipelines.get(name))
            return
        begin = time.monotonic()
        try:
            _follow(client, name)
        except KeyboardInterrupt:
            client.pipelines.cancel(name)
            raise
        ended = client.pipelines.get(name)
        raise_failure(name, ended.execution)
        if settings().json:
            print_json(to_dict(ended))
            return
        console.print(f"[green]✓[/] {name} in {time.monotonic() - begin:.0f} s\n", highlight=False)
        results.show(client, ended)


def _bring_inputs(client: Client, spec: Mapping[str, Any], folder: Path) -> None:
    """Fetch and push the rows, and import the base model when it is the embedded one and not there yet."""
    for section in ("conversion", "training"):
        if not isinstance(spec.get(section), dict):
            raise ApiError(f"the run needs a section `{section}:`", "INVALID_ARGUMENT")
    sources = read_sources(spec["conversion"])
    sources[:] = [resolve_alias(source) for source in sources]
    for source in sources:
        source["uri"] = push_rows(client, source["uri"], push_with_bar, folder, find_with_bar)
    base = str(spec["training"].get("base_model", ""))
    from fabrictune import local

    if base in local.EMBEDDED_MODELS:
        try:
            client.artifacts.get(base)
        except ApiError as error:
            if error.code != "NOT_FOUND":
                raise
            import_with_bar(client, local.EMBEDDED_MODELS[base])


def _follow(client: Client, name: str) -> None:
    """One bar for each stage; the job behind the stage that runs is watched at its own service."""
    if settings().json:
        client.pipelines.wait(name)
        return
    with new_progress() as display:
        tasks: dict[str, Any] = {}
        while True:
            run_now = client.pipelines.get(name)
            for stage in run_now.stages:
                if stage.stage not in tasks:
                    tasks[stage.stage] = display.add_task(stage.stage, total=None, figures="")
                _show_stage(client, display, tasks[stage.stage], stage)
            if run_now.execution.state in ENDED:
                return
            time.sleep(POLL_SECONDS)


def _show_stage(client: Client, display: Progress, task: Any, stage: Any) -> None:
    if display.tasks[task].finished:
        return
    if stage.execution.state == SUCCEEDED:
        said = f"{'reused' if stage.reused else 'made'} {stage.output}"
        said += f" ({stage.execution.message})" if stage.execution.message else ""
        total = display.tasks[task].total or 1
        display.update(task, total=total, completed=total, figures=said)
        display.stop_task(task)
        return
    if stage.execution.state in ENDED:
        display.update(task, figures=job_pb2.Execution.State.Name(stage.execution.state).lower())
        display.stop_task(task)
        return
    if stage.job.startswith("deployments/"):
        display.update(task, figures=_revision_message(client, stage.job))
    elif stage.job:
        _watch_job(client, display, task, stage.job)
    elif stage.stage.startswith("evaluation"):
        display.update(task, figures="starting a revision without traffic")


def _watch_job(client: Client, display: Progress, task: Any, job: str) -> None:
    for event in client.jobs_of(job).watch(job):
        kind = event.WhichOneof("event")
        if kind == "progress":
            show_progress(display, task, event.progress)
        elif kind == "log" and event.log.severity >= job_pb2.LogLine.WARNING:
            print_log(display, event.log)
        elif kind == "state" and event.state.state == job_pb2.Execution.QUEUED:
            display.update(task, figures=f"queued  {event.state.message}")


def _revision_message(client: Client, name: str) -> str:
    deployment = client.inference.get(name.partition("/revisions/")[0])
    return next((r.message for r in deployment.revisions if r.name == name), "")
