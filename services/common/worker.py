"""The process that does one job: fetch inputs, run the stage, seal the output, write the outcome.

Exit codes: 0 done, 64/65/78 never retry, 75 try again, 143 told to stop. A failure's google.rpc.Status is also left where
the pod's termination message goes. A SIGTERM without a request to cancel (a drain, a spot machine taken back, `fabrictune
up` stopped) writes no outcome: whoever starts the next attempt goes on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.rpc import status_pb2

from services.common.artifacts import Artifacts
from services.common.attempts import claim_attempt, outcome_of
from services.common.checkpoints import CheckpointWriter
from services.common.config import load_server, load_store
from services.common.errors import Cancelled, FabrictuneError
from services.common.events import EventWriter
from services.common.records import accept_record, find_output, read_record, read_spec_file
from services.common.stage import Stage
from services.common.stage_run import follow_stage, node_index, run_stage
from services.common.store import open_store


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
    if node_index():
        follow_stage(stage, record, artifacts, data_dir)
        return 0, status_pb2.Status()
    attempt = claim_attempt(store, name)
    begin = time.time()
    events = CheckpointWriter(store, artifacts, record, attempt)
    error: FabrictuneError | None = None
    try:
        manifest = find_output(artifacts, record) or run_stage(stage, record, artifacts, events, data_dir)
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
    outcome = outcome_of(store, name, error, attempt, begin)
    if outcome is not None:
        store.put_json(f"{name}/outcome.json", outcome, only_if_absent=True)
    return (0, status_pb2.Status()) if error is None else (error.exit_code, error.to_status())


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
