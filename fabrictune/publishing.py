"""An artifact becomes a repository on a model hub: its files, and a card that tells its lineage."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from google.protobuf import json_format

from fabrictune import transfer
from fabrictune.card import TEXTS, render_card
from fabrictune.errors import ApiError
from fabrictune.names import COLLECTIONS
from fabrictune.v1 import artifact_pb2

if TYPE_CHECKING:
    from fabrictune.client import Client

HUBS = {"hf": "hf", "modelscope": "ms"}
"""Scheme of an address → the hub, as sources and base models spell it."""
CARD, FORMER_CARD = "README.md", "README.source.md"
_ADDRESS = re.compile(rf"({'|'.join(HUBS)})://([\w.-]+/[\w.-]+)")
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


class HubAddress(NamedTuple):
    """Where to publish."""

    hub: str
    name: str


class Publication(NamedTuple):
    """What would be published."""

    artifact: artifact_pb2.Artifact
    card: str
    files: tuple[str, ...]
    """Paths in the repository, the card first."""


def parse_address(text: str) -> HubAddress | None:
    """hf://ORG/NAME or modelscope://ORG/NAME; None for what is no address of a hub. Raises ApiError for a wrong one."""
    if "://" not in text:
        return None
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise ApiError(f"{text!r} must look like hf://ORG/NAME or modelscope://ORG/NAME", "INVALID_ARGUMENT")
    return HubAddress(HUBS[match[1]], match[2])


def plan(
    client: Client,
    name: str,
    address: HubAddress,
    license_id: str = "",
    reports: Sequence[str] = (),
    leave_out: Sequence[str] = (),
) -> Publication:
    """What publishing would send; nothing is sent. leave_out: globs of files that stay here. Raises ApiError."""
    if license_id and not _LICENSE.fullmatch(license_id):
        raise ApiError(f"{license_id!r} is no licence's id; it looks like apache-2.0 or cc-by-4.0", "INVALID_ARGUMENT")
    if name.partition("/")[0] not in COLLECTIONS:
        raise ApiError(
            f"{name!r} is no artifact: its lineage is what the card tells, so push the folder to datasets/ID first",
            "INVALID_ARGUMENT",
        )
    lineage = client.artifacts.lineage(name)
    artifact = lineage[0]
    if artifact.kind not in TEXTS:
        raise ApiError(f"{name} is a {artifact.kind}; published are {', '.join(TEXTS)}", "INVALID_ARGUMENT")
    kept = [f.path for f in artifact.files if not any(fnmatch(f.path, pattern) for pattern in leave_out)]
    if not kept:
        raise ApiError(f"nothing of {name} is left to publish", "INVALID_ARGUMENT")
    told = [client.artifacts.get(r) for r in reports] if reports else find_reports(client, artifact)
    card = render_card(address.name.partition("/")[2], lineage, told, license_id, kept)
    return Publication(artifact, card, (CARD, *(FORMER_CARD if path == CARD else path for path in kept)))


def find_reports(client: Client, artifact: artifact_pb2.Artifact) -> list[artifact_pb2.Artifact]:
    """Evaluations of a model, of what was merged from an adapter, or on a data set, as far as deployments still tell."""
    models = {artifact.name}
    if artifact.kind == "adapter":
        models |= {
            m.name for m in client.artifacts.list("models") if any(i.name == artifact.name for i in m.created_by.inputs)
        }
    revisions = _revisions_of(client, models)
    found = []
    for report in client.artifacts.list("reports"):
        target = json_format.MessageToDict(report.created_by.spec).get("target") or {}
        if target.get("revision") in revisions or any(i.name == artifact.name for i in report.created_by.inputs):
            found.append(report)
    return sorted(found, key=lambda r: r.create_time.ToNanoseconds())


def _revisions_of(client: Client, models: set[str]) -> set[str]:
    """Names of the revisions that serve these models; none where nothing is served."""
    try:
        return {r.name for d in client.inference.list() for r in d.revisions if r.spec.model in models}
    except ApiError as error:
        if error.code not in ("UNIMPLEMENTED", "UNAVAILABLE"):
            raise
        return set()


def lay_out(client: Client, publication: Publication, on_bytes: transfer.OnBytes = lambda _: None) -> Path:
    """Bring the files and the card into a folder that is as the repository will be. A second call goes on."""
    folder, whole = _folders(publication)
    if not whole.exists():
        whole.parent.mkdir(parents=True, exist_ok=True)
        transfer.pull(client, publication.artifact.name, whole, on_bytes)
    shutil.rmtree(folder, ignore_errors=True)
    for path in publication.files[1:]:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.hardlink_to(whole / (CARD if path == FORMER_CARD else path))
    (folder / CARD).write_text(publication.card, encoding="utf-8")
    return folder


def clear(publication: Publication) -> None:
    """Forget the files of a publication that is done."""
    for folder in _folders(publication):
        shutil.rmtree(folder, ignore_errors=True)


def _folders(publication: Publication) -> tuple[Path, Path]:
    """(what the repository will hold, the artifact's files)."""
    data_dir = Path(os.environ.get("FABRICTUNE_DATA_DIR", ".fabrictune"))
    folder = data_dir / "publishing" / publication.artifact.digest[:16]
    return folder, folder.with_name(f"{folder.name}-files")
