"""What is checked before ms-swift starts (it takes half a minute to import): all that is wrong is said in one error."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from services.common.errors import FabrictuneError, FailedPrecondition, InvalidData, Violation, enumerated
from services.common.machine import cpu_flags, free_port, multiplies_bfloat16
from services.common.model_code import files_naming_code
from services.common.reporter import Progress, Reporter, Silent
from services.training.dataset_size import SAMPLE_BYTES, DatasetSize, measure_dataset
from services.training.estimate import advise, certainly_too_large, estimate_training, explain, to_plain
from services.training.memory import Memory
from services.training.presets import load_preset, needed_packages
from services.training.rows import Row, certainly_too_long, longest_length, read_rows
from services.training.shapes import read_shape
from services.training.spec import Spec
from services.training.swift import Family, Hardware, infer_family, plan_arguments

T = TypeVar("T")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "qwen.tiktoken")
"""A model has one of these."""


@dataclass(frozen=True)
class Admitted:
    """What a run that may begin has to go on with."""

    hardware: Hardware
    family: Family | None
    train: Sequence[Row]
    validation: Sequence[Row]
    max_length: int | None


def admit(spec: Spec, dataset: Path, model: Path, reporter: Reporter) -> Admitted:
    """Check everything, warn of rows that will be left out. Raises one error that names all that is wrong."""
    preset, found = load_preset(spec.preset), list[FabrictuneError]()
    hardware = _collect(found, lambda: hardware_here(spec)) or Hardware()
    _collect(found, lambda: check_packages({**preset.arguments, **spec.arguments}))
    reporter.progress(Progress(unit="rows", step=0, phase="checking the rows"))
    inputs = _check_inputs(found, spec, dataset, model, reporter)
    if not found:
        arguments = plan_arguments(spec, preset, hardware)
        _collect(found, lambda: check_memory(spec, inputs.train, model, arguments, reporter))
    raise_all(found)
    return replace(inputs, hardware=hardware)


def check_inputs(spec: Spec, dataset: Path, model: Path) -> None:
    """What admit says of the folders, whatever this machine has. Raises one error that names all that is wrong."""
    found = list[FabrictuneError]()
    _check_inputs(found, spec, dataset, model, Silent())
    raise_all(found)


def _check_inputs(found: list[FabrictuneError], spec: Spec, dataset: Path, model: Path, reporter: Reporter) -> Admitted:
    trusted = bool(spec.arguments.get("trust_remote_code", False))
    family = _collect(found, lambda: check_model(model, trusted))
    train = _collect(found, lambda: read_rows(dataset / "train.jsonl"))
    validation = _collect(found, lambda: read_rows(dataset / "validation.jsonl"))
    max_length = {**load_preset(spec.preset).arguments, **spec.arguments}.get("max_length")
    if train is not None:
        _collect(found, lambda: check_rows(train, model, max_length, reporter))
    return Admitted(Hardware(), family, train or [], validation or [], max_length)


def raise_all(found: Sequence[FabrictuneError]) -> None:
    """Raise the only error as it is, or one of the first's class that names them all; nothing when there is none."""
    if len(found) == 1:
        raise found[0]
    if found:
        listed = "\n".join(f"  - {error.message}" for error in found)
        violations: list[Violation] = [violation for error in found for violation in error.violations]
        raise type(found[0])(f"{len(found)} things keep the training from starting:\n{listed}", violations=violations)


def hardware_here(spec: Spec) -> Hardware:
    """What the spec asks for, and this process's place in it (an Indexed Job's environment, or torchrun's names).

    Raises FailedPrecondition when fewer GPUs are here than asked for.
    """
    gpus, nodes = spec.resources.gpus, spec.resources.nodes
    seen = count_gpus()
    if gpus > seen:
        raise FailedPrecondition(f"spec.resources.gpus asks for {gpus} GPUs on a node, and {seen} can be seen here")
    rank = int(os.environ.get("NODE_RANK", os.environ.get("JOB_COMPLETION_INDEX", "0")))
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", "29500" if nodes > 1 else str(free_port())))
    threads = max(len(os.sched_getaffinity(0)) // max(gpus, 1), 1)
    return Hardware(gpus, nodes, rank if nodes > 1 else 0, address, port, threads, multiplies_bfloat16(cpu_flags()))


def count_gpus() -> int:
    """NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves, without loading CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = Path("/proc/driver/nvidia/gpus")
    present = len(list(devices.iterdir())) if devices.is_dir() else 0
    if visible is None:
        return present
    return min(len([device for device in visible.split(",") if device.strip() not in ("", "-1")]), present)


def check_model(model: Path, trusted: bool) -> Family | None:
    """What ms-swift has to be told about a model. Raises InvalidData for a folder that cannot be trained."""
    try:
        config = json.loads((model / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidData(
            f"the base model {model} has no config.json; import it with `fabrictune models import`"
        ) from None
    except ValueError as error:
        raise InvalidData(f"the base model's config.json cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise InvalidData("the base model's config.json must hold an object")
    if not any(model.glob("*.safetensors")):
        raise InvalidData(
            "the base model has no .safetensors file; other formats are not read, for pickles can run code"
        )
    if not any((model / name).exists() for name in _TOKENIZERS):
        raise InvalidData(f"the base model has no tokenizer, none of {', '.join(_TOKENIZERS)}")
    if not trusted and (naming := files_naming_code(model)):
        raise FailedPrecondition(
            f"the base model comes with Python code of its own (auto_map in {', '.join(naming)}), which training would run; "
            "set spec.arguments.trust_remote_code: true if you trust it"
        )
    return infer_family(config, _chat_template(model))


def check_packages(arguments: dict[str, Any]) -> None:
    """Refuse arguments whose package is not in this image. Raises FailedPrecondition naming them."""
    missing = {
        package: argument
        for package, argument in needed_packages(arguments).items()
        if importlib.util.find_spec(package) is None
    }
    if missing:
        said = ", ".join(f"{package} (for {argument})" for package, argument in missing.items())
        raise FailedPrecondition(f"the training image lacks {said}; add it to the image, or leave the argument out")


def check_rows(train: Sequence[Row], model: Path, max_length: int | None, reporter: Reporter) -> None:
    """Refuse a dataset with nothing to train on; warn of rows that will be left out."""
    if not train:
        raise InvalidData("train.jsonl has no row; conversion's rejects.jsonl and report.json say where they went")
    if max_length is None:
        return
    long = certainly_too_long(train, model, max_length)
    if len(long) == len(train):
        raise all_too_long(train, max_length)
    if long:
        most = "most rows will" if 2 * len(long) > len(train) else "they will"
        reporter.log(
            f"at least {len(long)} of {len(train)} rows are longer than max_length {max_length} "
            f"({enumerated([row.id for row in long], 3)}): {most} be left out; "
            "set spec.arguments.max_length higher to keep them",
            "WARNING",
        )


def all_too_long(rows: Sequence[Row], max_length: int | None) -> InvalidData:
    """The error for a dataset of which nothing is left."""
    return InvalidData(
        f"all {len(rows)} rows are longer than max_length {max_length}; set spec.arguments.max_length higher"
    )


def check_memory(
    spec: Spec, train: Sequence[Row], model: Path, arguments: dict[str, Any], reporter: Reporter
) -> Memory | None:
    """Refuse what certainly does not fit, with the numbers; warn of what may not. Raises FailedPrecondition.

    None: the model's shape, or this machine's memory, is not known.
    """
    available = memory_here(spec.resources.gpus)
    try:
        shape = read_shape(model)
    except InvalidData:  # an architecture that names its sizes otherwise; ms-swift may know it
        return None
    longest = longest_length(train, model, arguments.get("max_length"))
    memory = estimate_training(spec, shape, DatasetSize({longest: float(len(train))}, exact=True)).memory
    if available is None:
        return None
    numbers = explain(memory, available)
    if certainly_too_large(memory, available):
        raise FailedPrecondition(f"the training cannot fit: {numbers}; {advise(memory, available, arguments)}")
    if memory.total > available:
        reporter.log(f"it may run out of memory: {numbers}; {advise(memory, available, arguments)}", "WARNING")
    else:
        reporter.log(numbers)
    return memory


def memory_here(gpus: int) -> int | None:
    """Bytes that each process can use at most: of the smallest GPU, or this machine's (a container's) memory."""
    if not gpus:
        import psutil

        limit = Path("/sys/fs/cgroup/memory.max")
        told = limit.read_text().strip() if limit.exists() else "max"
        whole = int(psutil.virtual_memory().total)
        return min(whole, int(told)) if told.isdigit() else whole
    ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True).stdout
        return min(int(line) for line in said.splitlines()) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None  # no nvidia-smi in the image: the GPU says it itself when it is full


def estimate_folders(spec: Spec, dataset: Path, model: Path, gpu: str, price_per_hour: float) -> dict[str, Any]:
    """The JSON form of fabrictune.v1.EstimateTrainingResponse for folders."""
    report, train = dataset / "report.json", dataset / "train.jsonl"
    if not train.is_file():
        raise InvalidData(f"{dataset} has no train.jsonl")
    with train.open("rb") as file:
        sample = file.read(SAMPLE_BYTES)
    size = measure_dataset(report.read_bytes() if report.exists() else None, sample, train.stat().st_size)
    check_model(model, trusted=True)  # nothing of it is run
    cores = 0 if spec.resources.gpus or gpu else len(os.sched_getaffinity(0))
    return to_plain(estimate_training(spec, read_shape(model), size, gpu, price_per_hour, cores), size)


def _collect(found: list[FabrictuneError], check: Callable[[], T]) -> T | None:
    try:
        return check()
    except FabrictuneError as error:
        found.append(error)
        return None


def _chat_template(model: Path) -> str:
    if (model / "chat_template.jinja").exists():
        return (model / "chat_template.jinja").read_text(errors="replace")
    try:
        config = json.loads((model / "tokenizer_config.json").read_text())
    except (FileNotFoundError, ValueError):
        return ""
    template = config.get("chat_template") or "" if isinstance(config, dict) else ""
    return template if isinstance(template, str) else json.dumps(template, ensure_ascii=False)
