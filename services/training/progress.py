"""What ms-swift writes → typed progress, lines for people, and one clear error.

ms-swift's logging.jsonl has a line for each log step and each evaluation; swift_plugin.py adds tokens, computing
seconds and memory to each. Everything else is in the child's output.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from services.common.errors import (
    FabrictuneError,
    FailedPrecondition,
    InvalidData,
    InvalidSpec,
    ResourceExhausted,
    WorkerLost,
)
from services.common.reporter import Progress

_STALE_EVALUATIONS = 3
_BEGIN = Progress(unit="steps", step=0, phase="training")


@dataclass
class LineReader:
    """Complete lines that were added to a file since the last read; the file may not be there yet."""

    path: Path
    _offset: int = 0

    def new_lines(self) -> Iterator[str]:
        """Lines without their end. A line that is not finished stays for the next read."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        yield from whole.decode("utf-8", "replace").splitlines()


@dataclass(frozen=True)
class Metrics:
    """What was known after the last line of logging.jsonl."""

    progress: Progress = _BEGIN
    tokens: int = 0
    computing_seconds: float = 0.0
    best_eval_loss: float | None = None
    evaluations_since_best: int = 0


def read_metrics(line: Mapping[str, Any], before: Metrics) -> tuple[Metrics, list[str]]:
    """The state after one line of logging.jsonl, and warnings. A line without a step (ms-swift's last) changes nothing.

    tokens_per_second counts tokens that are not padding, over the time in optimizer steps since the line before:
    evaluation and saving are no part of it. The ETA counts them, being steps left x wall time for a step so far.
    """
    if "global_step/max_steps" not in line:
        return before, []
    step, total = (int(n) for n in line["global_step/max_steps"].split("/"))
    progress = replace(
        before.progress,
        step=step,
        total_steps=total,
        epoch=_number(line.get("epoch")),
        memory_bytes=line.get("memory_bytes"),
        eta_seconds=_number((total - step) * float(line.get("train_speed(s/it)", math.nan))),
    )
    if "eval_loss" in line:
        return _after_evaluation(line, replace(before, progress=progress))
    if "loss" not in line:
        return replace(before, progress=progress), []  # the summary at the end of training
    tokens, seconds = int(line.get("tokens", 0)), float(line.get("computing_seconds", 0.0))
    fresh = seconds - before.computing_seconds
    progress = replace(
        progress,
        loss=_number(line["loss"]),
        eval_loss=None,
        token_accuracy=_number(line.get("token_acc")),
        learning_rate=_number(line.get("learning_rate")),
        grad_norm=_number(line.get("grad_norm")),
        # A resumed run starts with the tokens of the one before it: its first line says nothing of speed.
        tokens_per_second=(tokens - before.tokens) / fresh if fresh > 0 and (before.tokens or step == 1) else None,
    )
    warnings = [
        f"{name} is {line[name]} at step {step}: lower learning_rate, or use torch_dtype float32 or bfloat16"
        for name in ("loss", "grad_norm")
        if name in line and _number(line[name]) is None
    ]
    return replace(before, progress=progress, tokens=tokens, computing_seconds=seconds), warnings


def as_record(progress: Progress) -> dict[str, Any]:
    """A line of metrics.jsonl: what is known, by the names of fabrictune.v1.Progress."""
    return {name: value for name, value in asdict(progress).items() if value is not None and value != ""}


_NEWS: tuple[tuple[re.Pattern[str], str], ...] = (
    # what a line of the child's output must match for people to see it, and its severity; the first match counts
    (re.compile(r"trust_remote_code=True"), ""),  # ms-swift says so of every model; models with code are refused before
    (re.compile(r"Dataset Token Length|model_parameter_info|Dataset filtered|Saving model checkpoint"), "INFO"),
    (re.compile(r"^\[WARNING"), "WARNING"),
    (re.compile(r"^\[ERROR"), "ERROR"),
)


def news_of(line: str) -> tuple[str, str] | None:
    """(severity, text) of a line that people want to see while it trains, else None."""
    for pattern, severity in _NEWS:
        if pattern.search(line):
            return (severity, line.split("] ", 1)[-1].strip()) if severity else None
    return None


_MEMORY = (
    "set a smaller per_device_train_batch_size (the effective batch stays), a smaller max_length, "
    "gradient_checkpointing: true, or take a GPU with more memory"
)
_FAILURES: tuple[tuple[re.Pattern[str], type[FabrictuneError], str], ...] = (
    # what the child said → the error, and what to do
    (re.compile(r"CUDA out of memory|OutOfMemoryError"), ResourceExhausted, f"the GPU is out of memory; {_MEMORY}"),
    (
        re.compile(r"can't allocate memory|Cannot allocate memory|^MemoryError"),
        ResourceExhausted,
        f"this machine has too little memory; {_MEMORY}",
    ),
    (re.compile(r"No space left on device"), ResourceExhausted, "the disk is full; free some space and start again"),
    (
        re.compile(r"remaining_argv|invalid choice|argument --"),
        InvalidSpec,
        "ms-swift refuses an argument; correct spec.arguments",
    ),
    (
        re.compile(r"automatically match `model_type`|no suitable `model_type`|model_type: .* not in"),
        InvalidSpec,
        "ms-swift does not know this model; set spec.arguments.model_type and spec.arguments.template",
    ),
    (
        re.compile(r"Please explicitly pass the template|template_type: .* not in"),
        InvalidSpec,
        "ms-swift does not know the chat template; set spec.arguments.template",
    ),
    (
        re.compile(r"SafetensorError|HeaderTooLarge|MetadataIncompleteBuffer"),
        InvalidData,
        "the base model's weights cannot be read",
    ),
    (re.compile(r"No module named"), FailedPrecondition, "a package is missing from the training image"),
    (
        re.compile(r"CUDA driver version|No CUDA GPUs are available|invalid device ordinal"),
        FailedPrecondition,
        "the GPUs that were asked for cannot be used",
    ),
    (
        re.compile(
            r"Connection (closed|reset) by peer|DistNetworkError|DistBackendError|Rendezvous\w*Error|Broken pipe"
        ),
        WorkerLost,
        "another process of this training was lost",
    ),
)
_NOISE = re.compile(
    r"^\s*$|^\s*\[-|^usage:|^\[(INFO|WARNING)|^\s+(File \"|\^|~)|Traceback|^\{'|elastic|torch/distributed|^[=-]+$"
    # torchrun's report, the same after every failure
    r"|^\s*(time|host|rank|exitcode|error_file|traceback)\s*:|FAILED$|^Failures:|^Root Cause|NO_OTHER_FAILURES"
)


def explain_failure(code: int, output: Sequence[str]) -> FabrictuneError:
    """One error for a child that ended with `code`; negative: killed by that signal. output: its last lines."""
    said = [line.strip() for line in output if not _NOISE.search(line)][-4:]
    tail = "\n".join(f"  {line}" for line in said)
    if code == -9:
        return ResourceExhausted(f"the training process was killed, most likely for want of memory; {_MEMORY}")
    for pattern, error, advice in _FAILURES:
        if any(pattern.search(line) for line in said):
            return error(f"{advice}\n{tail}")
    return FabrictuneError(f"ms-swift ended with code {code}; the job's log has the end of its output\n{tail}")


def _after_evaluation(line: Mapping[str, Any], before: Metrics) -> tuple[Metrics, list[str]]:
    loss = _number(line["eval_loss"])
    progress = replace(before.progress, eval_loss=loss, token_accuracy=_number(line.get("eval_token_acc")))
    if loss is not None and (before.best_eval_loss is None or loss < before.best_eval_loss):
        return replace(before, progress=progress, best_eval_loss=loss, evaluations_since_best=0), []
    stale = before.evaluations_since_best + 1
    warnings = []
    if stale == _STALE_EVALUATIONS:
        warnings = [f"the validation loss has not improved for {stale} evaluations (best: {before.best_eval_loss})"]
    return replace(before, progress=progress, evaluations_since_best=stale), warnings


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
