"""`fabrictune artifacts`, `models`, `datasets`, `lineage`: what the object store holds, and how it came to be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from google.protobuf import json_format
from rich.tree import Tree

from fabrictune.cli.context import console, print_json, print_message, print_rows, say, settings, to_dict
from fabrictune.cli.progress import new_progress
from fabrictune.errors import ApiError
from fabrictune.names import COLLECTIONS
from fabrictune.v1 import artifact_pb2

if TYPE_CHECKING:
    from fabrictune.client import Client
    from fabrictune.transfer import Source

KINDS = {"datasets": "dataset", "models": "model", "adapters": "adapter", "reports": "report"}
app = typer.Typer(
    name="artifacts", help="Datasets, models, adapters and reports in the object store.", no_args_is_help=True
)
models = typer.Typer(name="models", help="Base models and merged models.", no_args_is_help=True)
datasets = typer.Typer(name="datasets", help="Raw rows and converted datasets.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Such as models/smollm2-135m-instruct.")]


@app.command("ls")
def list_artifacts(
    collection: Annotated[str, typer.Argument(help="datasets, models, adapters, reports; all when absent.")] = "",
) -> None:
    """What there is."""
    if collection and collection not in COLLECTIONS:
        raise ApiError(f"{collection!r} is no collection; there are {', '.join(COLLECTIONS)}", "INVALID_ARGUMENT")
    _list([collection] if collection else list(COLLECTIONS))


@app.command("get")
def get_artifact(name: Name) -> None:
    """One artifact: files with their hashes, who made it, out of what."""
    with settings().connect() as client:
        print_message(client.artifacts.get(name))


@app.command("pull")
def pull_artifact(name: Name, folder: Annotated[Path, typer.Argument(help="A new folder.")]) -> None:
    """Download an artifact; an interrupted download goes on where it stopped."""
    from fabrictune import transfer

    with settings().connect() as client:
        size = client.artifacts.get(name).size_bytes
        with new_progress() as display:
            task = display.add_task(f"pull {name}", total=size, figures="bytes")
            transfer.pull(client, name, folder, lambda n: display.advance(task, n))
    say({"folder": str(folder)}, f"{name} is in {folder}")


@app.command("push")
def push_artifact(
    source: Annotated[str, typer.Argument(help="A folder, or one file; for a hub an artifact, such as datasets/d1.")],
    target: Annotated[
        str, typer.Argument(help="Such as datasets/my-rows; or a hub: hf://ORG/NAME, modelscope://ORG/NAME.")
    ],
    kind: Annotated[str, typer.Option(help="dataset, rows, model, adapter or report; from the name when absent.")] = "",
    public: Annotated[bool, typer.Option("--public", help="Hub: everyone may see it; else you alone.")] = False,
    license_id: Annotated[str, typer.Option("--license", help="Hub: the licence, such as apache-2.0.")] = "",
    report: Annotated[
        list[str] | None,
        typer.Option("--report", help="Hub: reports/ID whose figures the card shows; else those known."),
    ] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option("--leave-out", help="Hub: a glob of files that are not published.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Hub: print the card and the files; send nothing.")
    ] = False,
) -> None:
    """Upload a folder as an artifact, or publish an artifact on a model hub with a card that tells its lineage.

    Sending the same files again changes nothing. A hub's token comes from HF_TOKEN or MODELSCOPE_API_TOKEN.
    """
    from fabrictune import publishing

    address = publishing.parse_address(target)
    if address is not None:
        from fabrictune.cli.publish import publish_artifact

        publish_artifact(source, address, public, license_id, report or [], leave_out or [], dry_run)
        return
    if public or license_id or report or leave_out or dry_run:
        raise ApiError(f"{target} is no hub's address, which --public, --license, … are for", "INVALID_ARGUMENT")
    collection = target.partition("/")[0]
    if collection not in KINDS:
        raise ApiError(
            f"{target!r} must begin with one of {', '.join(COLLECTIONS)}, or be hf://ORG/NAME or modelscope://ORG/NAME",
            "INVALID_ARGUMENT",
        )
    folder = Path(source)
    if not folder.exists():
        raise ApiError(f"there is nothing at {folder}", "NOT_FOUND")
    with settings().connect() as client:
        sealed = push_with_bar(client, folder, target, kind or KINDS[collection])
    say(to_dict(sealed), f"{sealed.name}  sha256:{sealed.digest[:12]}  {sealed.size_bytes / 1e6:.1f} MB")


@app.command("rm")
def delete_artifact(name: Name) -> None:
    """Delete an artifact for good."""
    with settings().connect() as client:
        client.artifacts.delete(name)


@models.command("list")
def list_models() -> None:
    """Base models and merged models."""
    _list(["models"])


@models.command("import")
def import_model(
    source: Annotated[
        str, typer.Argument(help="smollm2-135m-instruct (comes with the set-up), a folder, hf:ORG/NAME or ms:ORG/NAME.")
    ],
    model_id: Annotated[str, typer.Option("--id", help="Its id in models/; from the source when absent.")] = "",
) -> None:
    """Bring a base model into the object store. Only safetensors weights are taken."""
    with settings().connect() as client:
        sealed = import_with_bar(client, source, model_id)
    say(to_dict(sealed), f"{sealed.name}  sha256:{sealed.digest[:12]}  {sealed.size_bytes / 1e6:.1f} MB")


@datasets.command("list")
def list_datasets() -> None:
    """Raw rows and converted datasets."""
    _list(["datasets"])


def lineage(name: Annotated[str, typer.Argument(help="Such as deployments/quickstart or models/m1.")]) -> None:
    """What an artifact was made from, back to the data set's digest."""
    with settings().connect() as client:
        found = {a.name: a for a in client.artifacts.lineage(name)}
    if settings().json:
        print_json([to_dict(a) for a in found.values()])
        return
    tree = Tree(_label(found.get(name), name, ""))
    _grow(tree, found, name, {name})
    console.print(tree)


def import_with_bar(client: Client, source: str, model_id: str = "") -> artifact_pb2.Artifact:
    """Prepare a base model on this machine and push it."""
    from fabrictune import local

    target = f"models/{model_id or id_from(source)}"
    with local.prepared_model(source) as (folder, metadata):
        return push_with_bar(client, folder, target, "model", metadata)


def push_with_bar(
    client: Client, source: Source, name: str, kind: str, metadata: Mapping[str, str] | None = None
) -> artifact_pb2.Artifact:
    """Push with a progress bar."""
    from fabrictune import transfer

    if settings().json:
        return transfer.push(client, source, name, kind, metadata)
    with new_progress() as display:
        task = display.add_task(f"push {name}", total=transfer.source_size(source), figures="bytes")
        sealed = transfer.push(client, source, name, kind, metadata, lambda n: display.advance(task, n))
        display.update(task, completed=sealed.size_bytes, total=sealed.size_bytes)
    return sealed


def id_from(source: str) -> str:
    """An id made from a path or a hub name: "hf:Qwen/Qwen3-0.6B" → "qwen3-0-6b"."""
    tail = source.rstrip("/").rpartition("/")[2].rpartition(":")[2].lower()
    made = re.sub(r"[^a-z0-9]+", "-", tail).strip("-")[:40].strip("-")
    if not made:
        raise ApiError(f"no id can be made from {source!r}; give one with --id", "INVALID_ARGUMENT")
    return made if made[0].isalpha() else f"m-{made}"[:40].strip("-")


def _list(collections: list[str]) -> None:
    with settings().connect() as client:
        found = [a for c in collections for a in client.artifacts.list(c)]
    rows = [
        {
            "name": a.name,
            "kind": a.kind,
            "size": f"{a.size_bytes / 1e6:.1f} MB",
            "digest": a.digest[:12],
            "by": a.created_by.job or "imported",
            "created": a.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M"),
        }
        for a in found
    ]
    columns = {
        "name": "NAME",
        "kind": "KIND",
        "size": "SIZE",
        "digest": "SHA256",
        "by": "MADE BY",
        "created": "CREATED",
    }
    print_rows(rows, columns, "nothing here yet")


def _label(artifact: artifact_pb2.Artifact | None, name: str, digest: str) -> str:
    if artifact is None:
        return f"{name}  [dim]sha256:{digest[:12]}  (deleted since)[/]"
    metadata = json_format.MessageToDict(artifact.metadata)
    if artifact.kind == "deployment":
        return f"[bold]{name}[/]" + (f"  [yellow]{metadata['description']}[/]" if metadata.get("forced") else "")
    by = artifact.created_by.job or "imported"
    extra = f"  {metadata['description']}" if metadata.get("description") else ""
    return f"[bold]{name}[/]  sha256:{artifact.digest[:12]}  [dim]{artifact.kind} by {by}{extra}[/]"


def _grow(tree: Tree, found: dict[str, artifact_pb2.Artifact], name: str, seen: set[str]) -> None:
    artifact = found.get(name)
    for source in artifact.created_by.inputs if artifact else ():
        branch = tree.add(_label(found.get(source.name), source.name, source.digest))
        if source.name not in seen:
            _grow(branch, found, source.name, seen | {source.name})
