"""Checkpoints: kept elsewhere while training goes on, chosen from when it ends, gone on from when it was cut off.

The plugin names a checkpoint only after every rank has written all of it, so a half one is never seen here. Training
deletes old checkpoints at any moment; hard links keep the files that are being uploaded.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.common.errors import DataLoss, FabrictuneError, InvalidData
from services.common.reporter import Reporter

_BEST = "best"
"""Folder in a kept checkpoint with the adapter of the best one so far, where that is another."""
_MEAN = "mean"
"""Folder in a checkpoint with the mean of the weights so far (swift_mean.py)."""
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
"""Beside model*.safetensors, where every weight is trained."""
_RESUMABLE = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
METRICS = "metrics.jsonl"
"""In a kept checkpoint: the metrics of all steps up to it, so that a resumed run has the whole curve."""


class CheckpointKeeper:
    """Hands complete checkpoints to reporter.checkpoint in a thread of its own. Close it.

    Only the newest one waits: when the store is slower than training, those in between are passed over.
    """

    def __init__(self, run: Path, held: Path, reporter: Reporter) -> None:
        self._run, self._held, self._reporter = run, held, reporter
        self._waiting: tuple[int, Path] | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    def keep(self, step: int, best_step: int | None, records: Sequence[Mapping[str, Any]] = ()) -> None:
        """checkpoint-{step} is complete: link its files aside and hand it over soon. records: metrics so far."""
        folder = self._held / f"step-{step:08d}"
        try:
            _link_tree(checkpoint_folder(self._run, step), folder)
            if best_step and best_step != step:
                _link_weights(checkpoint_folder(self._run, best_step), folder / _BEST)
            write_metrics(folder / METRICS, records)
        except FileNotFoundError:  # training has deleted it meanwhile; a newer one is on its way
            shutil.rmtree(folder, ignore_errors=True)
            return
        with self._changed:
            passed_over, self._waiting = self._waiting, (step, folder)
            self._changed.notify()
        if passed_over:
            shutil.rmtree(passed_over[1], ignore_errors=True)

    def close(self) -> None:
        """Wait until the last checkpoint has been handed over."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._waiting is None:
                    return
                (step, folder), self._waiting = self._waiting, None
            try:
                self._reporter.checkpoint(step, folder)
            except FabrictuneError as error:
                self._reporter.log(
                    f"the checkpoint of step {step} could not be kept, training goes on: {error}", "WARNING"
                )
            shutil.rmtree(folder, ignore_errors=True)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the trainer puts the checkpoint of a step."""
    return run / f"checkpoint-{step}"


def check_resumable(checkpoint: Path) -> int:
    """The step that a kept checkpoint goes on from. Raises InvalidData when files are missing, DataLoss when broken."""
    missing = [name for name in _RESUMABLE if not (checkpoint / name).exists()]
    if not weight_files(checkpoint):
        missing += _ADAPTER_FILES
    if missing:
        raise InvalidData(
            f"{checkpoint} is no complete checkpoint: {', '.join(missing)} is missing; start a new job instead"
        )
    return int(read_state(checkpoint)["global_step"])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """trainer_state.json of a checkpoint. Raises DataLoss."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text())
    except ValueError as error:
        raise DataLoss(f"{checkpoint}/trainer_state.json cannot be read: {error}") from None
    return state


def restore_best(checkpoint: Path, run: Path) -> None:
    """Put the best adapter that a kept checkpoint carries where the trainer looks for it."""
    best_step = read_state(checkpoint).get("best_global_step")
    if best_step and (checkpoint / _BEST).is_dir():
        shutil.copytree(checkpoint / _BEST, checkpoint_folder(run, best_step))


def choose(run: Path, resumed_from: Path | None, wanted: str, newest_step: int | None) -> tuple[int, Path]:
    """(step, folder) of the adapter that is the job's output: the best by validation loss, the last, or the mean.

    newest_step: the last complete checkpoint of this run; None when a resumed run had nothing left to do. Without a
    validation set, where the best step was not saved, or where a resumed job's checkpoint has no mean, the last one is
    taken.
    """
    if newest_step is not None:
        last = checkpoint_folder(run, newest_step)
    elif resumed_from is not None:
        last = resumed_from
    else:
        raise FabrictuneError("ms-swift ended well but left no checkpoint; the job's log has the end of its output")
    state = read_state(last)
    step, best_step = int(state["global_step"]), state.get("best_global_step")
    if wanted == "best" and best_step and best_step != step:
        best = checkpoint_folder(run, best_step)
        if weight_files(best):
            return int(best_step), best
    if wanted == "mean" and weight_files(last / _MEAN):
        return step, last / _MEAN
    return step, last


def weight_files(folder: Path) -> list[str]:
    """Names of the files that are the adapter, or the model where every weight is trained; [] when some are missing."""
    if all((folder / name).exists() for name in _ADAPTER_FILES):
        return list(_ADAPTER_FILES)
    weights = sorted(file.name for file in folder.glob("model*.safetensors"))
    if not weights or not (folder / "config.json").exists():
        return []
    return [*(name for name in _MODEL_FILES if (folder / name).exists()), *weights]


def read_metrics_until(checkpoint: Path | None, step: int) -> list[dict[str, Any]]:
    """The metrics that a kept checkpoint carries, up to a step; [] without a checkpoint."""
    file = checkpoint / METRICS if checkpoint else None
    if file is None or not file.exists():
        return []
    records: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    return [record for record in records if record["step"] <= step]


def write_metrics(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """metrics.jsonl."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def _link_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=os.link)


def _link_weights(source: Path, target: Path) -> None:
    target.mkdir()
    for name in weight_files(source):
        os.link(source / name, target / name)
