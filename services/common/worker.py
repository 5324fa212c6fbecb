"""The process that does one job: fetch inputs, run the stage, seal the output, write the outcome.

Exit codes: 0 done, 64/65/78 never retry, 75 try again, 143 told to stop. A failure's google.rpc.Status is also left where
the pod's termination message goes. A SIGTERM without a request to cancel (a drain, a spot machine taken back, `fabrictune
up` stopped) writes no outcome: whoever starts the next attempt goes on.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format
from google.rpc import status_pb2
from pydantic import ValidationError

from services.common.artifacts import Artifacts, Manifest
from services.common.config import load_server, load_store
from services.common.errors import (
    Cancelled,
    FabrictuneError,
    FailedPrecondition,
    InvalidSpec,
)
from services.common.events import EventWriter
from services.common.job_state import JobRecord
from services.common.records import accept_record, find_output, read_record, read_spec_file
from services.common.remote import RemoteArtifact, RemoteDraft
from services.common.reporter import Aside, Progress, Reporter
from services.common.shares import Shares
from services.common.stage import Stage
from services.common.store import Store, open_store

if TYPE_CHECKING:
    from services.common.stage import Streamed

MAX_ATTEMPTS = 50
"""Of one job, whatever ended them."""


class _StoredReporter(EventWriter):
    """An EventWriter that also keeps checkpoints."""

    def __init__(self, store: Store, artifacts: Artifacts, record: JobRecord, attempt: int) -> None:
        super().__init__(store, record.name, attempt)
        self._artifacts, self._record = artifacts, record
        self.kept = 2

    def checkpoint(self, step: int, folder: Path) -> None:
        """Seal the folder as a checkpoint of this job; the newest `kept` of them stay."""
        name = f"checkpoints/{self._record.name.replace('/', '-')}/step-{step:08d}"
        self._artifacts.publish(
            folder, name, "checkpoint", created_by={"job": self._record.name}, metadata={"step": step}
        )
        self.log(f"checkpoint of step {step} is kept")
        for old in checkpoints_of(self._artifacts, self._record.name)[: -self.kept]:
            self._artifacts.delete(old)


def checkpoints_of(artifacts: Artifacts, job: str) -> list[str]:
    """Names of a job's complete checkpoints, oldest first."""
    return artifacts.names(f"checkpoints/{job.replace('/', '-')}/")


def main(stage: Stage[Any]) -> None:
    """Do the job that FABRICTUNE_JOB names, then exit."""
    signal.signal(signal.SIGTERM, _raise_cancelled)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on a terminal is for `fabrictune up`, which sends SIGTERM
    code, status = 70, status_pb2.Status()
    try:
        code, status = _do_job(stage, os.environ.get("FABRICTUNE_JOB", ""))
    except FabrictuneError as error:
        code, status = error.exit_code, error.to_status()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    _leave_word(code, status)
    sys.stderr.flush()
    os._exit(code)  # threads of libraries must not keep a finished job alive


def _do_job(stage: Stage[Any], name: str) -> tuple[int, status_pb2.Status]:
    store = open_store(load_store())
    data_dir = load_server().data_dir.absolute()
    artifacts = Artifacts(store, data_dir / "cache")
    record = read_record(store, name) if name else accept_record(store, read_spec_file(stage, artifacts))[0]
    name = record.name
    if store.get_json(f"{name}/outcome.json") is not None:
        return 0, status_pb2.Status()
    if _node():
        return _follow(stage, record, artifacts, data_dir)
    attempt = claim_attempt(store, name)
    begin = time.time()
    events = _StoredReporter(store, artifacts, record, attempt)
    error: FabrictuneError | None = None
    try:
        manifest = find_output(artifacts, record) or _run_stage(stage, record, artifacts, events, data_dir)
        events.artifact(manifest.name, manifest.digest)
        if stage.verdict is not None:
            stage.verdict(manifest.metadata, manifest.name)
    except FabrictuneError as raised:
        error = raised
    except Exception as unknown:  # noqa: BLE001 - the process's rim: what nobody knew of becomes INTERNAL
        events.log("".join(traceback.format_exception(unknown)), "ERROR")
        error = FabrictuneError(
            f"the {stage.kind} worker broke: {type(unknown).__name__}: {unknown}. Its log has the trace"
        )
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the last words are short; let them be said
    if error is not None:
        cancelled = isinstance(error, Cancelled)
        events.log(str(error) or type(error).__name__, "INFO" if cancelled else "ERROR")
    _close(events)
    outcome = _outcome(store, name, error, attempt, begin)
    if outcome is not None:
        store.put_json(f"{name}/outcome.json", outcome, only_if_absent=True)
    return (0, status_pb2.Status()) if error is None else (error.exit_code, error.to_status())


def _run_stage(
    stage: Stage[Any], record: JobRecord, artifacts: Artifacts, events: _StoredReporter, data_dir: Path
) -> Manifest:
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


def _follow(
    stage: Stage[Any], record: JobRecord, artifacts: Artifacts, data_dir: Path
) -> tuple[int, status_pb2.Status]:
    """One of the further nodes of a job: it computes with the first one, which alone reports, keeps and publishes."""
    spec = stage.spec.model_validate(record.spec)
    folders = _fetch_inputs(record, artifacts)
    if _give_share(stage, spec, record, artifacts, data_dir, folders, Aside()) is None:
        with _scratch(data_dir, record) as output:
            stage.run(spec, folders, output, Aside())
    return 0, status_pb2.Status()


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
    node, nodes = _node(), spec.resources.nodes
    shares = Shares(artifacts, record.name, nodes)
    with _scratch(data_dir, record) as scratch:
        shares.give(node, scratch, lambda folder: share(spec, folders, folder, (node, nodes), reporter))
    return shares


def _node() -> int:
    """The place of this process among the nodes of an Indexed Job."""
    return int(os.environ.get("JOB_COMPLETION_INDEX", "0"))


def _fetch_inputs(record: JobRecord, artifacts: Artifacts) -> dict[str, Path]:
    folders = {i["role"]: artifacts.cached(i["name"], i["digest"]) for i in record.inputs}
    kept = checkpoints_of(artifacts, record.name)
    return {**folders, "checkpoint": artifacts.cached(kept[-1])} if kept else folders


def provenance(stage: Stage[Any], record: JobRecord) -> dict[str, Any]:
    """What the manifest of a job's output says of its making."""
    return {
        "job": record.name,
        "spec": dict(record.spec),
        "digest": record.digest,
        "inputs": [{"name": i["name"], "digest": i["digest"]} for i in record.inputs],
        "versions": versions(("fabrictune", *stage.versions)),
    }


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of packages; those that are absent are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def claim_attempt(store: Store, name: str) -> int:
    """The number of the attempt that begins now, from 1; it is taken by writing it, so no two workers share one.

    Raises FailedPrecondition after MAX_ATTEMPTS: drains and lost nodes do not count against a Job's retries.
    """
    for number in range(1, MAX_ATTEMPTS + 1):
        if store.put_json(f"{name}/attempts/{number:04d}", {"time": time.time()}, only_if_absent=True):
            return number
    raise FailedPrecondition(f"{name} was begun {MAX_ATTEMPTS} times and never came to an end; see its log")


def _outcome(
    store: Store, name: str, error: FabrictuneError | None, attempt: int, begin: float
) -> Mapping[str, Any] | None:
    told = {"attempt": attempt, "start_time": begin, "end_time": time.time()}
    if error is None:
        return {"state": "SUCCEEDED", **told}
    if isinstance(error, Cancelled):
        asked = store.get_json(f"{name}/cancel.json") is not None
        return {"state": "CANCELLED", **told} if asked else None
    if error.exit_code == 75:
        return None  # another attempt may do better; the cluster counts them, the server writes the last word
    return {"state": "FAILED", "error": json_format.MessageToDict(error.to_status()), **told}


@contextmanager
def _scratch(data_dir: Path, record: JobRecord) -> Iterator[Path]:
    work = data_dir / "work"
    work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{record.id}-", dir=work))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _close(events: EventWriter) -> None:
    for wait in (0, 1, 2, 4, 8):
        time.sleep(wait)
        try:
            events.close()
        except FabrictuneError:
            continue
        return


def _leave_word(code: int, status: status_pb2.Status) -> None:
    file = os.environ.get("FABRICTUNE_TERMINATION_LOG", "/dev/termination-log")
    word = json.dumps({"exit_code": code, "status": json_format.MessageToDict(status)}, ensure_ascii=False)
    try:
        Path(file).write_text(word[:4096] if len(word) <= 4096 else json.dumps({"exit_code": code}))
    except OSError:
        return  # not in a pod and nobody asked for it


def _raise_cancelled(_number: int, _frame: object) -> None:
    raise Cancelled("told to stop")
