"""Everything on one machine: the `up` command's servers, stages on plain folders, base models, hubs and buckets.

The only module of this package that reaches for `services/`, and only when it is called: the client alone does not need
them. A clone has them; an installed wheel does not, and says so.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from google.protobuf import json_format

from fabrictune.errors import ApiError
from fabrictune.v1 import conversion_pb2, job_pb2, training_pb2

if TYPE_CHECKING:
    from fabrictune.download import Trust

EMBEDDED_MODELS: Mapping[str, str] = {"models/smollm2-135m-instruct": "smollm2-135m-instruct"}
"""Base models that come with the set-up: artifact name → what `fabrictune models import` takes."""


def serve(announce: bool) -> None:
    """Run all services until told to stop; `announce` prints where they are."""
    _services("services.up").serve(announce)


def end_leftovers(data_dir: Path) -> int:
    """End processes that a killed `fabrictune up` of this folder has left; returns how many."""
    return int(_services("services.up").end_leftovers(data_dir))


class Listener(Protocol):
    """What a stage on folders tells: the same messages as a watched job's."""

    def progress(self, progress: job_pb2.Progress) -> None:
        """How far it is."""

    def log(self, line: job_pb2.LogLine) -> None:
        """A line for people."""


def run_stage(
    kind: str, spec: Mapping[str, Any], inputs: Mapping[str, Path], output: Path, listener: Listener
) -> Mapping[str, Any]:
    """Run a stage on folders, in this process; returns its metadata. The output folder appears whole or not at all.

    Ctrl-C and SIGTERM arrive in the stage as in a worker: it ends what it has started, then raises Cancelled.
    """
    stage, parsed = _check_stage(kind, spec, inputs, output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise _cannot_be_made(output, str(error)) from None
    try:
        with _cancelled_by_signals():
            metadata = stage.run(parsed, inputs, draft, _Reporter(listener))
        if output.exists():
            output.rmdir()
        draft.chmod(0o755)
        draft.rename(output)
        if stage.verdict is not None:
            stage.verdict(metadata, str(output))
        return dict(metadata)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def plan_stage(kind: str, spec: Mapping[str, Any], inputs: Mapping[str, Path], output: Path) -> job_pb2.Plan:
    """What run_stage would do: the processes that the stage would start. Nothing is written.

    Spec, inputs and output are checked, this machine (its GPUs, its memory) is not: the plan may be for another one.
    """
    stage, parsed = _check_stage(kind, spec, inputs, output)
    if stage.check is not None:
        stage.check(parsed, inputs)
    children = stage.children(parsed) if stage.children else ()
    return job_pb2.Plan(commands=[job_pb2.Command(argv=c.argv, env=dict(c.env)) for c in children])


def estimate_training(
    spec: Mapping[str, Any], dataset: Path, model: Path, gpu: str, price: float
) -> training_pb2.EstimateTrainingResponse:
    """Memory, time and cost of training on folders; only heads of files are read."""
    names = {"dataset": "datasets/local", "base_model": "models/local"}
    parsed = _parse_spec("training", _services("services.training.spec").Spec, {**spec, **names})
    plain = _services("services.training.admission").estimate_folders(parsed, dataset, model, gpu, price)
    return json_format.ParseDict(plain, training_pb2.EstimateTrainingResponse())


def preview_rows(spec: Mapping[str, Any], path: Path, rows: int) -> conversion_pb2.PreviewConversionResponse:
    """The first rows of a file or folder before and after, as the spec's first source."""
    parsed = _parse_spec("conversion", _services("services.conversion.spec").Spec, spec)
    preview = _services("services.conversion.preview")
    shown = [preview.to_plain(row) for row in preview.preview_path(path, parsed, rows)]
    return json_format.ParseDict({"rows": shown}, conversion_pb2.PreviewConversionResponse())


def _check_stage(kind: str, spec: Mapping[str, Any], inputs: Mapping[str, Path], output: Path) -> tuple[Any, Any]:
    """(stage, spec as it reads it). Raises ApiError for whatever is wrong before the stage begins."""
    stage = _services(f"services.{kind}.worker").STAGE
    parsed = _parse_spec(kind, stage.spec, spec)
    for role, path in inputs.items():
        if not path.exists():
            raise ApiError(f"{role}: there is nothing at {path}", "NOT_FOUND")
    _check_output(output)
    return stage, parsed


def _check_output(output: Path) -> None:
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ApiError(f"{output} exists and is not empty; choose another folder", "ALREADY_EXISTS")
        place = output.absolute().parent
        while not place.exists():
            place = place.parent
    except OSError as error:  # a folder on the way may not be entered
        raise _cannot_be_made(output, str(error)) from None
    if not place.is_dir():
        raise _cannot_be_made(output, f"{place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise _cannot_be_made(output, f"{place} may not be written")


def _cannot_be_made(output: Path, why: str) -> ApiError:
    return ApiError(f"{output} cannot be made: {why}; choose another folder", "FAILED_PRECONDITION")


def _parse_spec(kind: str, model: Any, spec: Mapping[str, Any]) -> Any:
    from pydantic import ValidationError

    try:
        return model.model_validate(spec)
    except ValidationError as error:
        from services.common.validation import violations_of

        found = [(v.field, v.description) for v in violations_of(error, "spec")]
        raise ApiError(f"the {kind} cannot be done", "INVALID_ARGUMENT", violations=found) from None


class _Reporter:
    """A stage's reporter in front of a Listener."""

    def __init__(self, listener: Listener) -> None:
        self._listener, self._message = listener, _services("services.common.job_state").progress_message

    def progress(self, progress: Any) -> None:
        """Pass it on as a message."""
        self._listener.progress(self._message({k: v for k, v in vars(progress).items() if v is not None}))

    def log(self, text: str, severity: str = "INFO") -> None:
        """Pass it on as a message."""
        self._listener.log(job_pb2.LogLine(severity=severity, text=text))

    def checkpoint(self, step: int, folder: Path) -> None:
        """Nothing outlives this process but the output folder."""


@contextmanager
def _cancelled_by_signals() -> Iterator[None]:
    cancelled = _services("services.common.errors").Cancelled

    def cancel(_number: int, _frame: object) -> None:
        raise cancelled("interrupted")

    before = {number: signal.signal(number, cancel) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def deploy_folder(model: Path, port: int, name: str, spec: Mapping[str, Any], dry_run: bool) -> None:
    """Serve a model folder in the foreground until Ctrl-C."""
    _services("services.inference.foreground").serve_folder(model, port, name, spec, dry_run)


@contextmanager
def prepared_model(source: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """A base model as a folder ready to push, and its metadata. source: see `fabrictune models import --help`."""
    importer = _services("services.common.base_models")
    with tempfile.TemporaryDirectory(prefix="fabrictune-model-") as scratch:
        yield importer.prepare(source, Path(scratch))


def sign_bucket_rows(uri: str, names_rows: Callable[[str], bool]) -> tuple[Trust, Sequence[Any]]:
    """Whom to trust, and the rows files of s3://bucket/prefix: (path, address, size) each."""
    from fabrictune.download import Trust

    signed = _services("services.common.buckets").sign_rows(uri, names_rows)
    return Trust(signed.plain_host, signed.ca_file), signed.files


def fetch_hub_rows(
    hub: str, name: str, subset: str, revision: str, folder: Path, names_rows: Callable[[str], bool], max_bytes: int
) -> Any:
    """The rows files of a hub's data set, fetched: (folder, paths, revision, size)."""
    return _services("services.common.hub_rows").fetch_rows(hub, name, subset, revision, folder, names_rows, max_bytes)


def rows_from_traffic(files: Sequence[Path], since: datetime | None, rows: Path, left_out: Path) -> dict[str, Any]:
    """Recorded traffic as rows: {records, rows, left_out: {reason: {count, meaning}}}."""
    traffic = _services("services.conversion.traffic")
    found = traffic.write_rows(files, since, rows, left_out)
    reasons = {code: {"count": n, "meaning": traffic.REASONS.get(code, "")} for code, n in found.left_out.items()}
    return {"records": found.records, "rows": found.rows, "left_out": reasons}


def check_publishing(hub: str) -> None:
    """Raises when what a hub needs is missing here, before anything is fetched for it."""
    _services("services.common.hub_publishing").read_token(hub)


def publish_folder(hub: str, name: str, kind: str, folder: Path, **options: Any) -> Any:
    """Upload a folder to a model hub: (address, private). options: see services.common.hub_publishing."""
    return _services("services.common.hub_publishing").publish(hub, name, kind, folder, **options)


def _services(module: str) -> Any:
    clone = Path(__file__).resolve().parent.parent
    if (clone / "services").is_dir() and str(clone) not in sys.path:
        sys.path.insert(0, str(clone))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == "services":
            text = (
                "this needs the services, which the client package does not contain: run it from a clone of the project"
            )
        else:
            text = f"{module} needs the package {error.name}, which is not installed here: run `make setup`"
        raise ApiError(text, "FAILED_PRECONDITION") from None
