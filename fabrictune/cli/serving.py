"""`fabrictune deploy`, `undeploy`, `deployments`, `chat`, `agentfabric`: using what was made."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fabrictune.cli.context import console, print_json, print_message, print_rows, say, settings, to_dict
from fabrictune.cli.specs import read_spec
from fabrictune.connection import read_connection
from fabrictune.errors import ApiError
from fabrictune.v1 import inference_pb2

if TYPE_CHECKING:
    from fabrictune.client import Client

State = inference_pb2.Revision
agentfabric = typer.Typer(
    name="agentfabric", help="Point ModelScope's AgentFabric at a deployment.", no_args_is_help=True
)
START_STEPS = ("fetch", "place", "load", "reference", "probe", "first_token", "adapters")
"""Steps of Revision.start_seconds, in their order."""
POLL_SECONDS = 0.5
Name = Annotated[str, typer.Argument(help="Such as deployments/quickstart; the only one there is when absent.")]


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


def undeploy(name: Name) -> None:
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


def chat(
    name: Name = "",
    message: Annotated[str, typer.Option("--message", "-m", help="One message instead of a conversation.")] = "",
    system: Annotated[str, typer.Option(help="The system prompt.")] = "",
    max_tokens: Annotated[int, typer.Option(help="At most so many tokens an answer.")] = 300,
    tools: Annotated[
        Path | None, typer.Option(help="A JSON list of OpenAI tools; you are asked for the result of each call.")
    ] = None,
) -> None:
    """Talk to a deployment. Ctrl-D ends the conversation."""
    listed = read_tools(tools) if tools else []
    with settings().connect() as client:
        deployment = name or only_deployment(client)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        if message:
            messages.append({"role": "user", "content": message})
            answer = _answer(client, deployment, messages, max_tokens, listed)
            if settings().json:
                calls = [call["function"] for call in answer.get("tool_calls", [])]
                print_json({"answer": answer["content"], **({"tool_calls": calls} if calls else {})})
            return
        console.print(f"[dim]{deployment}; Ctrl-D ends[/]")
        while True:
            try:
                said = console.input("[bold cyan]you[/] ")
            except EOFError:
                return
            messages.append({"role": "user", "content": said})
            messages.append(answer := _answer(client, deployment, messages, max_tokens, listed))
            while answer.get("tool_calls"):
                for call in answer["tool_calls"]:
                    result = console.input(f"[bold magenta]result of {escape(call['function']['name'])}[/] ")
                    messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
                messages.append(answer := _answer(client, deployment, messages, max_tokens, listed))


@agentfabric.command("config")
def print_model_config(
    name: Name = "",
    write: Annotated[
        Path | None, typer.Option("--write", help="Put it into this file, AgentFabric's config/model_config.json.")
    ] = None,
) -> None:
    """Print the entry for AgentFabric's config/model_config.json, or write it there."""
    with settings().connect() as client:
        deployment = client.inference.get(name or only_deployment(client))
    entry = model_config(deployment)
    if write is None:
        print_json(entry)
        return
    changed = write_model_config(write, entry)
    done = f"{write} {'has' if changed else 'already has'} the model {deployment.served_model!r}"
    say({"file": str(write), "changed": changed, "entry": entry}, done)


def address_here(deployment: inference_pb2.Deployment) -> str:
    """The OpenAI base address for this machine: while `fabrictune connect` runs, its own, since the cluster's is none here."""
    gateway = "" if settings().endpoint else read_connection().get("gateway")
    return f"{gateway}/v1" if gateway else deployment.address


def model_config(deployment: inference_pb2.Deployment) -> dict[str, Any]:
    """AgentFabric's entry for a deployment. Source: modelscope-agent 0.7.1, apps/agentfabric/config/model_config.json."""
    return {
        deployment.served_model: {
            "type": "openai",
            "model": deployment.served_model,
            "api_base": address_here(deployment),
            "is_chat": True,
            "is_function_call": False,
            "support_stream": True,
        }
    }


def write_model_config(file: Path, entry: Mapping[str, Any]) -> bool:
    """Put an entry into a model_config.json, which is made when it is not there; False when all of it is there already.

    Other models stay, and so does what a user has added to this one (`api_key`, `generate_cfg`). Raises ApiError.
    """
    target = file.resolve()  # a link stays one
    try:
        text = target.read_text(encoding="utf-8") if target.exists() else "{}"
        there = json.loads(text)
    except (OSError, ValueError) as error:
        raise ApiError(f"{file} cannot be read as JSON, and was left as it is: {error}", "INVALID_ARGUMENT") from None
    if not isinstance(there, dict) or not all(isinstance(there.get(name, {}), dict) for name in entry):
        raise ApiError(f"{file} must hold a JSON object of models, as AgentFabric's own does", "INVALID_ARGUMENT")
    merged = there | {name: there.get(name, {}) | told for name, told in entry.items()}
    if merged == there:
        return False
    draft = target.with_name(f".{target.name}.part")
    try:
        draft.write_text(json.dumps(merged, ensure_ascii=False, indent=4) + "\n", encoding="utf-8")
        if target.exists():
            draft.chmod(target.stat().st_mode & 0o777)
        draft.replace(target)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ApiError(f"{file} cannot be written: {error.strerror}", "NOT_FOUND") from None
    return True


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


def read_tools(file: Path) -> list[dict[str, Any]]:
    """A file's OpenAI tools; the server checks what they say. Raises ApiError."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ApiError(f"{file} cannot be read: {error.strerror}", "NOT_FOUND") from None
    except ValueError as error:
        raise ApiError(f"{file} is not JSON: {error}", "INVALID_ARGUMENT") from None
    listed = read if isinstance(read, list) else [None]
    functions = [tool.get("function", tool) if isinstance(tool, dict) else None for tool in listed]
    if not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in functions):
        raise ApiError(
            f"{file} must hold a list of tools: {{type: function, function: {{name, description, parameters}}}}",
            "INVALID_ARGUMENT",
        )
    return [{"type": "function", "function": each} for each in functions]


def _answer(
    client: Client, deployment: str, messages: list[dict[str, Any]], max_tokens: int, tools: list[dict[str, Any]]
) -> dict[str, Any]:
    """The assistant's message, printed as it comes."""
    text, calls = "", list[dict[str, Any]]()
    for piece in client.inference.generate(deployment, messages, tools, max_tokens=max_tokens, temperature=0.0):
        text += piece.text
        for made in piece.tool_calls:
            function = {"name": made.name, "arguments": made.arguments}
            calls.append({"id": made.id, "type": "function", "function": function})
        if not settings().json:
            console.print(piece.text, end="", markup=False, highlight=False, soft_wrap=True)
    if not settings().json:
        console.print()
        for call in calls:
            console.print(f"→ {call['function']['name']} {call['function']['arguments']}", markup=False, soft_wrap=True)
    return {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}


def only_deployment(client: Client) -> str:
    """The name of the one deployment that there is. Raises ApiError when there are none, or several."""
    found = [d.name for d in client.inference.list()]
    if len(found) != 1:
        what = "nothing is deployed" if not found else f"there are {', '.join(found)}; name one"
        raise ApiError(what, "INVALID_ARGUMENT")
    return found[0]
