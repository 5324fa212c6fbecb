"""`fabrictune agentfabric`: point ModelScope's AgentFabric at a deployment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fabrictune.cli.context import print_json, say, settings
from fabrictune.cli.serving import DeploymentName, address_here, only_deployment
from fabrictune.errors import ApiError
from fabrictune.v1 import inference_pb2

app = typer.Typer(name="agentfabric", help="Point ModelScope's AgentFabric at a deployment.", no_args_is_help=True)


@app.command("config")
def print_model_config(
    name: DeploymentName = "",
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
