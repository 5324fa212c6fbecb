"""A stage at work: its inputs fetched, its function run in a scratch folder or in the object store, its output sealed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from services.common.artifacts import Artifacts
from services.common.checkpoints import CheckpointWriter, checkpoints_of
from services.common.errors import InvalidSpec
from services.common.events import EventWriter
from services.common.job_state import JobRecord
from services.common.manifests import Manifest
from services.common.provenance import provenance
from services.common.remote import RemoteArtifact, RemoteDraft
from services.common.reporter import Aside, Progress, Reporter
from services.common.shares import Shares
from services.common.stage import Stage

if TYPE_CHECKING:
    from services.common.stage import Streamed


def run_stage(
    stage: Stage[Any], record: JobRecord, artifacts: Artifacts, events: CheckpointWriter, data_dir: Path
) -> Manifest:
    """Do the job and seal its output. Raises what the stage raises; InvalidSpec when the spec is of another version."""
    try:
        spec = stage.spec.model_validate(record.spec)
    except ValidationError as error:
        raise InvalidSpec(f"{record.name} was accepted by another version of fabrictune: {error}") from None
    if (streamed := stage.stream(spec)) is not None:
        return _stream_stage(stage, streamed, spec, record, artifacts, events)
    if stage.checkpoints_kept:
        events.kept = max(stage.checkpoints_kept(spec), 1)
    events.progress(Progress(unit="inputs", step=0, total_steps=len(record.inputs), phase="downloading"))
    folders = _fetch_inputs(record, artifacts)
    if "checkpoint" in folders:
        events.log(f"goes on from {checkpoints_of(artifacts, record.name)[-1]}")
    shares = _give_share(stage, spec, record, artifacts, data_dir, folders, events)
    if shares is not None:
        folders |= shares.wait(events)
    with _scratch(data_dir, record) as output:
        metadata = stage.run(spec, folders, output, events)
        events.progress(Progress(unit="files", step=0, phase="uploading"))
        sealed = artifacts.publish(
            output,
            record.output,
            stage.output_for(spec)[0],
            created_by=provenance(stage, record),
            metadata=dict(metadata),
        )
    if shares is not None:
        shares.forget()
    return sealed


def follow_stage(stage: Stage[Any], record: JobRecord, artifacts: Artifacts, data_dir: Path) -> None:
    """One of the further nodes of a job: it computes with the first one, which alone reports, keeps and publishes."""
    spec = stage.spec.model_validate(record.spec)
    folders = _fetch_inputs(record, artifacts)
    if _give_share(stage, spec, record, artifacts, data_dir, folders, Aside()) is None:
        with _scratch(data_dir, record) as output:
            stage.run(spec, folders, output, Aside())


def node_index() -> int:
    """The place of this process among the nodes of an Indexed Job."""
    return int(os.environ.get("JOB_COMPLETION_INDEX", "0"))


def _stream_stage(
    stage: Stage[Any],
    streamed: Streamed[Any],
    spec: Any,
    record: JobRecord,
    artifacts: Artifacts,
    events: EventWriter,
) -> Manifest:
    """Work in the object store: inputs are read there piece by piece, the output is written there."""
    store = artifacts.store
    inputs = {i["role"]: RemoteArtifact(store, artifacts, i["name"], i["digest"]) for i in record.inputs}
    with RemoteDraft(store, artifacts, record.output, stage.output_kind) as draft:
        metadata = streamed(spec, inputs, draft, events)
        return draft.seal(provenance(stage, record), dict(metadata))


def _give_share(
    stage: Stage[Any],
    spec: Any,
    record: JobRecord,
    artifacts: Artifacts,
    data_dir: Path,
    folders: Mapping[str, Path],
    reporter: Reporter,
) -> Shares | None:
    """Do this node's share; None where there is one node, or nodes compute together."""
    share = stage.share
    if share is None or spec.resources.nodes == 1:
        return None
    node, nodes = node_index(), spec.resources.nodes
    shares = Shares(artifacts, record.name, nodes)
    with _scratch(data_dir, record) as scratch:
        shares.give(node, scratch, lambda folder: share(spec, folders, folder, (node, nodes), reporter))
    return shares


def _fetch_inputs(record: JobRecord, artifacts: Artifacts) -> dict[str, Path]:
    folders = {i["role"]: artifacts.cached(i["name"], i["digest"]) for i in record.inputs}
    kept = checkpoints_of(artifacts, record.name)
    return {**folders, "checkpoint": artifacts.cached(kept[-1])} if kept else folders


@contextmanager
def _scratch(data_dir: Path, record: JobRecord) -> Iterator[Path]:
    work = data_dir / "work"
    work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{record.id}-", dir=work))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
