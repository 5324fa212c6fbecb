"""A job is accepted here: its spec checked, its inputs fixed by digest. The server does it, and a worker without a server."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from services.common.artifacts import Artifacts
from services.common.errors import AlreadyExists, InvalidSpec, NotFound, Violation
from services.common.job_state import JobRecord
from services.common.manifests import Manifest
from services.common.resources import ID_PATTERN
from services.common.stage import Stage
from services.common.store import Store
from services.common.validation import violations_of


def plan_record(
    stage: Stage[Any],
    artifacts: Artifacts,
    spec: Mapping[str, Any],
    job_id: str,
    *,
    output: str = "",
    request_id: str = "",
    labels: Mapping[str, str] | None = None,
) -> JobRecord:
    """The record of a job.

    Raises InvalidSpec naming all that is wrong, NotFound naming the inputs that do not exist, AlreadyExists (find_output).
    """
    found = []
    if not re.fullmatch(ID_PATTERN, job_id):
        found.append(Violation("id", f"{job_id!r} must match {ID_PATTERN}"))
    collection = stage.output_collection
    try:
        parsed = stage.spec.model_validate(spec)
        collection = stage.output_for(parsed)[1]
    except ValidationError as error:
        found += violations_of(error, "spec")
    output = output or f"{collection}/{job_id}"
    if not re.fullmatch(f"{collection}/{ID_PATTERN}", output):
        found.append(Violation("output", f"{output!r} must look like {collection}/an-id"))
    if found:
        raise InvalidSpec(f"the {stage.kind} job cannot be accepted", violations=found)
    plain = parsed.model_dump(mode="json", exclude_unset=True)
    inputs = _resolve_inputs(stage, artifacts, parsed)
    digest = digest_of({"kind": stage.kind, "spec": plain, "inputs": [i["digest"] for i in inputs]})
    name = f"{stage.collection}/{job_id}"
    asked = round(time.time(), 3)
    record = JobRecord(name, plain, output, digest, tuple(inputs), request_id, dict(labels or {}), asked)
    makes_artifact = collection != stage.collection  # a pipeline's run is its own output
    # Of a job that is there accept_record says whether it is the same.
    if makes_artifact and artifacts.store.get_json(f"{name}/job.json") is None:
        find_output(artifacts, record)
    return record


def find_output(artifacts: Artifacts, record: JobRecord) -> Manifest | None:
    """What this job has made before, maybe before it was deleted. Raises AlreadyExists when something else has the name.

    Asked before the work begins: the seal at its end would refuse it all the same.
    """
    try:
        manifest = artifacts.get(record.output)
    except NotFound:
        return None
    if manifest.created_by.get("digest") == record.digest:
        return manifest
    raise AlreadyExists(
        f"{record.output} exists, and this job did not make it; take another id, or delete it with "
        f"`fabrictune artifacts rm {record.output}`",
        {"name": record.output},
    )


def read_spec_file(stage: Stage[Any], artifacts: Artifacts) -> JobRecord:
    """A job that no server has accepted: FABRICTUNE_SPEC_FILE is a YAML file {name, output, spec}. Raises as plan_record."""
    file = Path(os.environ.get("FABRICTUNE_SPEC_FILE", ""))
    try:
        told = yaml.safe_load(file.read_text()) if file.name else None
    except (OSError, yaml.YAMLError) as error:
        raise InvalidSpec(f"FABRICTUNE_SPEC_FILE {file} cannot be read: {error}") from None
    if told is None:
        raise InvalidSpec(
            "nothing says what to do: set FABRICTUNE_JOB, or FABRICTUNE_SPEC_FILE to {name, output, spec}"
        )
    if not isinstance(told, dict) or not isinstance(told.get("spec"), dict) or set(told) - {"name", "output", "spec"}:
        raise InvalidSpec(f"{file} must hold name, spec and, if you like, output, and nothing else")
    collection, _, job_id = str(told.get("name", "")).rpartition("/")
    if collection not in ("", stage.collection):
        raise InvalidSpec(f"{file}: name must look like {stage.collection}/an-id")
    return plan_record(stage, artifacts, told["spec"], job_id, output=str(told.get("output") or ""))


def accept_record(store: Store, record: JobRecord) -> tuple[JobRecord, bool]:
    """Write it down, or find the one that is there with the same spec; and whether it is new. Raises AlreadyExists."""
    if store.put_json(f"{record.name}/job.json", record_to_json(record), only_if_absent=True):
        return record, True
    there = read_record(store, record.name)
    if (there.digest, there.output) != (record.digest, record.output):
        raise AlreadyExists(
            f"{record.name} exists with another spec; take another id, or delete it",
            {"name": record.name},
            reason_override="REQUEST_ID_REUSED",
        )
    return there, False


def read_record(store: Store, name: str) -> JobRecord:
    """The record of a job. Raises NotFound."""
    stored = store.get_json(f"{name}/job.json")
    if stored is None:
        raise NotFound(f"there is no {name}", {"name": name})
    return JobRecord(**{**stored, "inputs": tuple(stored["inputs"])})


def record_to_json(record: JobRecord) -> dict[str, Any]:
    """As stored in `{job}/job.json`."""
    return {**asdict(record), "inputs": [dict(i) for i in record.inputs]}


def digest_of(value: Any) -> str:
    """sha256 over the canonical JSON of a value, lower-case hex."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    ).hexdigest()


def _resolve_inputs(stage: Stage[Any], artifacts: Artifacts, spec: BaseModel) -> list[dict[str, str]]:
    inputs, found = [], []
    for role, name in stage.inputs(spec).items():
        try:
            inputs.append({"role": role, "name": name, "digest": artifacts.get(name).digest})
        except (NotFound, InvalidSpec) as error:
            found.append(Violation(f"spec.{role}", error.message))
    if found:
        raise NotFound(f"the {stage.kind} job's inputs do not exist", violations=found)
    return inputs
