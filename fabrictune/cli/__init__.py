"""The `fabrictune` command. Every command takes --json, and ends with one clear error and a non-zero status when it fails.

A command imports what only it needs (HTTP, YAML, the services) when it runs: all others, and --help, start without.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from fabrictune.cli import (
    agentfabric,
    artifacts,
    chat,
    connect,
    doctor,
    jobs,
    rollout,
    run,
    serving,
    stages,
    traffic,
    up,
)
from fabrictune.cli.context import EXIT_INTERRUPTED, Settings, exit_code, report_error
from fabrictune.errors import ApiError

app = typer.Typer(
    name="fabrictune",
    help="Teach a small language model to call tools the way AgentFabric prompts for them, and serve it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up", rich_help_panel="On this machine")(up.up)
app.command("down", rich_help_panel="On this machine")(up.down)
app.command("doctor", rich_help_panel="On this machine")(doctor.doctor)
app.command("connect", rich_help_panel="In a cluster")(connect.connect)
app.command("run", rich_help_panel="The whole way")(run.run)
app.command("convert", rich_help_panel="Stages")(stages.convert)
app.command("train", rich_help_panel="Stages")(stages.train)
app.command("merge", rich_help_panel="Stages")(stages.merge)
app.command("evaluate", rich_help_panel="Stages")(stages.evaluate)
app.command("deploy", rich_help_panel="Stages")(serving.deploy)
app.command("undeploy", rich_help_panel="Serving")(serving.undeploy)
app.command("deployments", rich_help_panel="Serving")(serving.deployments)
app.command("traffic", rich_help_panel="Serving")(rollout.traffic)
app.command("adapters", rich_help_panel="Serving")(rollout.adapters)
app.command("chat", rich_help_panel="Serving")(chat.chat)
app.add_typer(agentfabric.app, rich_help_panel="Serving")
app.add_typer(jobs.app, rich_help_panel="Jobs and artifacts")
app.add_typer(artifacts.models, rich_help_panel="Jobs and artifacts")
app.add_typer(artifacts.datasets, rich_help_panel="Jobs and artifacts")
artifacts.datasets.command("from-traffic")(traffic.make_rows)
app.add_typer(artifacts.app, rich_help_panel="Jobs and artifacts")
app.command("lineage", rich_help_panel="Jobs and artifacts")(artifacts.lineage)
app.add_typer(up.tokens, rich_help_panel="On this machine")


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"fabrictune {version('fabrictune')}")
        except PackageNotFoundError:
            typer.echo("fabrictune (from a clone that is not installed)")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    endpoint: Annotated[
        str,
        typer.Option(
            envvar="FABRICTUNE_ENDPOINT",
            help="host:port of a server; the `fabrictune connect` or `up` of this folder when absent.",
        ),
    ] = "",
    ca_file: Annotated[
        Path | None, typer.Option(envvar="FABRICTUNE_CA_FILE", help="Certificate authority of the server.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")] = False,
    show_version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Options that come before the command. A token comes from FABRICTUNE_TOKEN, never from an argument."""
    context.obj = Settings(endpoint=endpoint, ca_file=ca_file, json=json)


def main() -> None:
    """Run the command and turn what went wrong into one message and an exit status."""
    arguments = sys.argv[1:]
    as_json = "--json" in arguments
    if as_json:
        # People put it anywhere; it belongs to the program, not to one command.
        arguments = ["--json", *(a for a in arguments if a != "--json")]
    try:
        # Without standalone_mode an Exit, and Ctrl-C in the middle of a command, come back as a status.
        status = app(args=arguments, standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("\ninterrupted\n")
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:  # the process's rim
        code = exit_code(error)
        if code is None:
            raise
        report_error(error, as_json)
        sys.exit(code)


__all__ = ["ApiError", "app", "main"]
