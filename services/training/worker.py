"""The training stage: a dataset and a base model become a LoRA adapter.

Everything that can be wrong with the inputs is said before ms-swift starts (it takes half a minute to import); the
child's own files stay in a folder that is gone when the stage ends.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.common.errors import Cancelled, FabrictuneError, WorkerLost, enumerated
from services.common.reporter import Progress, Reporter
from services.common.stage import Stage
from services.training.admission import admit, all_too_long, check_inputs
from services.training.checkpoints import (
    check_resumable,
    choose,
    read_metrics_until,
    read_state,
    restore_best,
    weight_files,
    write_metrics,
)
from services.training.event_files import write_events
from services.training.plot import plot_loss
from services.training.presets import load_preset
from services.training.rows import Row
from services.training.spec import Spec
from services.training.supervise import Trained, run_child
from services.training.swift import PLUGINS, Command, Paths, plan_children, plan_sft, seed_of

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "tokenizer.model", "qwen.tiktoken"),
)
_NAMED = 1000
"""Refused rows that are named in the metadata; beyond it they are counted only."""
_LAST_LINES, _LAST_CHARACTERS = 200, 20_000
"""Of the output of a run that failed."""


def run(spec: Spec, inputs: Mapping[str, Path], output: Path, reporter: Reporter) -> dict[str, Any]:
    """Train and leave an adapter in `output`. inputs: dataset, base_model, and checkpoint to go on from.

    Raises InvalidSpec, InvalidData, FailedPrecondition before the start; ResourceExhausted and others after it; and
    Cancelled once a last checkpoint is kept.
    """
    dataset, model, checkpoint = inputs["dataset"], inputs["base_model"], inputs.get("checkpoint")
    admitted = admit(spec, dataset, model, reporter)
    hardware, train, validation = admitted.hardware, admitted.train, bool(admitted.validation)
    work = (output / ".work").absolute()
    work.mkdir()
    try:
        _lay_out(dataset, work, checkpoint, validation)
        before = read_metrics_until(checkpoint, read_state(checkpoint)["global_step"]) if checkpoint else []
        paths = Paths(model.absolute(), work, checkpoint.absolute() if checkpoint else None, validation)
        command = plan_sft(spec, load_preset(spec.preset), paths, hardware, admitted.family)
        reporter.progress(Progress(unit="steps", step=0, phase="loading"))
        trained = _train(command, work, train, admitted.max_length, reporter, before, hardware.nodes)
        if hardware.node_rank:
            return {}  # the first node has the adapter
        if hardware.nodes > 1 and (trained.newest_checkpoint or 0) < trained.rows["max_steps"]:
            # Nodes stop together: ms-swift ends well on this one when another one was told to stop.
            raise WorkerLost(
                f"another node was told to stop after step {trained.newest_checkpoint}; all go on from there"
            )
        refused = account_for_rows(train, trained.rows["train"], work, "train", reporter)
        metadata = _leave_adapter(spec, model, work, checkpoint, trained, output, command)
        shutil.copyfile(work / "train.log", output / "train.log")
        return {**metadata, "rows": len(train), "rows_trained": trained.rows["train"], "rows_refused": refused[:_NAMED]}
    except FabrictuneError as error:
        if not isinstance(error, Cancelled):
            tell_end_of_output(work, reporter)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def tell_end_of_output(work: Path, reporter: Reporter) -> None:
    """Say what ms-swift has said last: of a run that failed nothing else stays."""
    log = work / "train.log"
    lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:] if log.exists() else []
    if lines:
        text = "\n".join(lines)[-_LAST_CHARACTERS:]
        reporter.log(f"the end of ms-swift's output:\n{text}", "ERROR")


def check(spec: Spec, inputs: Mapping[str, Path]) -> None:
    """Raises what is wrong with dataset and base model."""
    check_inputs(spec, inputs["dataset"], inputs["base_model"])


def account_for_rows(rows: Sequence[Row], trained: int, work: Path, split: str, reporter: Reporter) -> list[str]:
    """Ids of the rows that ms-swift refused for their length. Raises FabrictuneError when others are missing."""
    refused = refused_ids(rows, work)
    if trained + len(refused) != len(rows):
        raise FabrictuneError(
            f"{len(rows)} rows of {split}.jsonl went in, ms-swift trains {trained} and refused {len(refused)}: "
            f"{len(rows) - trained - len(refused)} are unaccounted for; the job's log has the end of its output"
        )
    if refused:
        reporter.log(f"{len(refused)} rows longer than max_length were left out: {enumerated(refused)}", "WARNING")
    return refused


def refused_ids(rows: Sequence[Row], work: Path) -> list[str]:
    """Ids of the rows that the plugin named as too long, in the dataset's order; equal rows are refused together."""
    file = work / "refused.jsonl"
    if not file.exists():
        return []
    named = {json.loads(line)["row"] for line in file.read_text().splitlines()}
    return [row.id for row in rows if row.fingerprint in named]


def _train(
    command: Command,
    work: Path,
    rows: Sequence[Row],
    max_length: int | None,
    reporter: Reporter,
    records: Sequence[Mapping[str, Any]],
    nodes: int,
) -> Trained:
    try:
        return run_child(command, work, reporter, records)
    except Cancelled:
        raise
    except FabrictuneError as error:
        if len(refused_ids(rows, work)) == len(rows):
            raise all_too_long(rows, max_length) from None
        if nodes > 1 and type(error) is FabrictuneError:
            # A lost node shows on the others in many ways; a failure of another kind comes again, and is final then.
            raise WorkerLost(f"one of {nodes} nodes was lost, or failed: {error.message}") from None
        raise


def _lay_out(dataset: Path, work: Path, checkpoint: Path | None, validation: bool) -> None:
    (work / "run").mkdir()
    (work / "held").mkdir()
    for name in ("train.jsonl", *(["validation.jsonl"] if validation else [])):
        (work / name).symlink_to((dataset / name).absolute())
    if checkpoint is not None:
        check_resumable(checkpoint)
        restore_best(checkpoint, work / "run")


def _leave_adapter(
    spec: Spec, model: Path, work: Path, checkpoint: Path | None, trained: Trained, output: Path, command: Command
) -> dict[str, Any]:
    step, folder = choose(work / "run", checkpoint, spec.chosen_checkpoint, trained.newest_checkpoint)
    for name in weight_files(folder):
        shutil.copyfile(folder / name, output / name)
    if (output / "adapter_config.json").exists():
        config = json.loads((output / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = spec.base_model  # a path of this machine means nothing elsewhere
        (output / "adapter_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    for name in _TOKENIZER_FILES:
        if (model / name).exists():
            shutil.copyfile(model / name, output / name)
    write_metrics(output / "metrics.jsonl", trained.records)
    write_events(trained.records, output / "tensorboard")
    plot_loss(trained.records, output / "loss.png", f"{spec.base_model} on {spec.dataset}, {spec.preset}")
    local = {str(model.absolute()): spec.base_model, **{str(file): file.name for file in PLUGINS}}
    if checkpoint:
        local[str(checkpoint.absolute())] = "checkpoint"
    argv = ["python", *(local.get(word, word) for word in command.argv[1:])]
    (output / "training_args.json").write_text(json.dumps({"preset": spec.preset, "argv": argv}, indent=2) + "\n")
    return _metadata(spec, step, trained)


def _metadata(spec: Spec, step: int, trained: Trained) -> dict[str, Any]:
    figures: dict[str, Any] = {"loss": None, "eval_loss": None}
    for record in trained.records:
        figures.update({name: record[name] for name in figures if name in record})
    return {
        "base_model": spec.base_model,
        "preset": spec.preset,
        "seed": seed_of(spec),
        "step": step,
        "total_steps": trained.rows["max_steps"],
        "tokens": trained.tokens,
        "computing_seconds": round(trained.computing_seconds, 3),
        "peak_memory_bytes": trained.peak_bytes,
        **{name: value for name, value in figures.items() if value is not None},
    }


def _count_kept(spec: Spec) -> int:
    """As many as the trainer keeps in its folder; each carries the best adapter so far."""
    arguments = {**load_preset(spec.preset).arguments, **spec.arguments}
    return int(arguments.get("save_total_limit", 2))


STAGE = Stage(
    kind="training",
    collection="trainingJobs",
    output_kind="adapter",
    output_collection="adapters",
    spec=Spec,
    inputs=lambda spec: {"dataset": spec.dataset, "base_model": spec.base_model},
    run=run,
    check=check,
    versions=("ms-swift", "torch", "transformers", "peft"),
    output_of=lambda spec: spec.output,
    children=plan_children,
    checkpoints_kept=_count_kept,
)

if __name__ == "__main__":
    from services.common.worker import main

    main(STAGE)
