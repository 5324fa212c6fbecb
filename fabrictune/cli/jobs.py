"""`fabrictune jobs`: what runs, what ran, and how it went."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fabrictune.cli.context import print_message, print_rows, settings
from fabrictune.cli.progress import follow
from fabrictune.errors import ApiError
from fabrictune.names import CANCELLED, ENDED, FAILED
from fabrictune.v1 import job_pb2

app = typer.Typer(
    name="jobs", help="Conversion, training, merge and evaluation jobs, and pipeline runs.", no_args_is_help=True
)
STORED_LINES_SECONDS = 2.0
Name = Annotated[str, typer.Argument(help="Such as trainingJobs/t1 or pipelineRuns/r1.")]


@app.command("list")
def list_jobs() -> None:
    """All jobs and runs, the newest last."""
    with settings().connect() as client:
        found = [
            job
            for api in (client.conversion, client.training, client.merging, client.evaluation, client.pipelines)
            for job in api.list()
        ]
    found.sort(key=lambda job: job.execution.create_time.ToNanoseconds())
    rows = [_row(job) for job in found]
    columns = {
        "name": "NAME",
        "state": "STATE",
        "progress": "PROGRESS",
        "created": "CREATED",
        "message": "",
    }
    if not any(row["message"] for row in rows):
        del columns["message"]
    print_rows(rows, columns, "no jobs yet; `fabrictune run examples/quickstart.yaml` starts a whole run")


@app.command("get")
def get_job(name: Name) -> None:
    """One job: spec, state, error, output."""
    with settings().connect() as client:
        print_message(client.jobs_of(name).get(name))


@app.command("watch")
def watch_job(name: Name) -> None:
    """Follow a job live: step, loss, tokens/s, ETA. Exits non-zero when it fails."""
    with settings().connect() as client:
        execution = follow(name, client.jobs_of(name).watch(name))
    raise_failure(name, execution)


@app.command("logs")
def print_logs(
    name: Name,
    do_follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
) -> None:
    """What a job's workers wrote, also when their processes, pods and nodes are gone."""
    with settings().connect() as client:
        api = client.jobs_of(name)
        ended = api.get(name).execution.state in ENDED
        # Without --follow a live job's stream is read for as long as its stored lines take to come.
        events = api.watch(name) if do_follow or ended else api.watch(name, seconds=STORED_LINES_SECONDS)
        for event in events:
            if event.WhichOneof("event") == "log":
                stamp = event.time.ToDatetime().strftime("%H:%M:%S")
                typer.echo(f"{stamp} {job_pb2.LogLine.Severity.Name(event.log.severity):7} {event.log.text}")


@app.command("cancel")
def cancel_job(name: Name) -> None:
    """Ask a job to stop; it saves what it has."""
    with settings().connect() as client:
        print_message(client.jobs_of(name).cancel(name))


@app.command("resume")
def resume_job(name: Name) -> None:
    """Begin a failed or cancelled training or evaluation again, from its newest checkpoint or with its answers."""
    with settings().connect() as client:
        print_message(client.jobs_of(name).resume(name))


@app.command("delete")
def delete_job(name: Name) -> None:
    """Forget an ended job and its logs. What it made stays."""
    with settings().connect() as client:
        client.jobs_of(name).delete(name)


def raise_failure(name: str, execution: job_pb2.Execution) -> None:
    """Raise the ApiError that a job ended with, if it did not succeed."""
    if execution.state == FAILED:
        from fabrictune.channel import from_status

        error = from_status(execution.error)
        raise ApiError(f"{name} failed: {error.message}", error.code, error.reason, error.violations)
    if execution.state == CANCELLED:
        raise ApiError(f"{name} was cancelled", "CANCELLED")


def _row(job: Any) -> dict[str, str]:
    execution = job.execution
    progress = execution.progress
    total = f"/{progress.total_steps}" if progress.total_steps else ""
    return {
        "name": job.name,
        "state": job_pb2.Execution.State.Name(execution.state),
        "progress": f"{progress.step}{total} {progress.unit}" if progress.step else "",
        "created": execution.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M"),
        "output": getattr(job, "output", ""),
        "message": execution.error.message.partition("\n")[0] or execution.message,
    }
