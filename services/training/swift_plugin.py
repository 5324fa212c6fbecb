"""Loaded into ms-swift by `--external_plugins`: it makes the trainer say what fabrictune has to know.

It runs inside the child, in every rank, and imports nothing of fabrictune. Its files in the child's working directory:
`dataset.json` (rows that are trained), `refused.jsonl` (rows that are too long), `checkpoints.jsonl` (complete
checkpoints, as they come); and it stops the training, with a checkpoint, once a file named `stop` is there. A file,
not a signal: torchrun answers a SIGTERM by killing its workers after 30 s, and the ranks must agree on the step.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from swift.callbacks import callbacks_map
from swift.callbacks.base import TrainerCallback
from swift.dataset import AddLengthPreprocessor
from swift.template import MaxLengthError

_PR_SET_PDEATHSIG = 1
_WORK = Path.cwd()


def _append(name: str, value: dict[str, Any]) -> None:
    with (_WORK / name).open("a") as file:
        file.write(json.dumps(value) + "\n")


def fingerprint(messages: list[dict[str, Any]]) -> str:
    """Names a row by its messages: ms-swift drops the row's id before it encodes. Same as rows.fingerprint."""
    text = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Fabrictune(TrainerCallback):  # type: ignore[misc]  # ms-swift has no types
    """Adds time, tokens and memory to logging.jsonl, tells of checkpoints, and stops when it is asked."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        args.include_num_input_tokens_seen = "non_padding"  # 4.6.0's command line takes true and false only
        self._computing, self._step_begin = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say how many rows and steps there are."""
        if state.is_world_process_zero:
            evaluated = self.trainer.eval_dataset
            rows = {"train": len(self.trainer.train_dataset), "validation": 0 if evaluated is None else len(evaluated)}
            steps = {"max_steps": state.max_steps, "step": state.global_step}
            (_WORK / "dataset.json").write_text(json.dumps({**rows, **steps}))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock of a step."""
        self._step_begin = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock, and the training when that was asked for."""
        self._computing += time.monotonic() - self._step_begin
        if self._asked_to_stop(args):
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Add what ms-swift does not log."""
        if logs is None:
            return
        cuda = torch.cuda.is_available()
        logs["memory_bytes"] = torch.cuda.max_memory_reserved() if cuda else _resident_bytes()
        logs["tokens"] = int(state.num_input_tokens_seen)
        logs["computing_seconds"] = self._computing

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell of a checkpoint."""
        # After Trainer._save_checkpoint and ms-swift's barrier: every rank has written all of its files.
        if state.is_world_process_zero:
            _append("checkpoints.jsonl", {"step": state.global_step, "best_step": state.best_global_step})

    def _asked_to_stop(self, args: Any) -> bool:
        asked = (_WORK / "stop").exists()
        if not (dist.is_available() and dist.is_initialized()):
            return asked
        agreed = torch.tensor([int(asked)], device=args.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        return bool(agreed.item())


def _name_long_rows(preprocess: Any) -> Any:
    # ms-swift 4.6.0 drops a row that is too long in silence, or with --strict true ends with a trace.
    def preprocess_and_name(self: Any, row: dict[str, Any]) -> dict[str, Any] | None:
        name = fingerprint(row["messages"])
        try:
            encoded: dict[str, Any] = preprocess(self, row)
        except MaxLengthError as error:
            _append("refused.jsonl", {"row": name, "reason": str(error)})
            return None
        return encoded

    return preprocess_and_name


ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # torchrun's workers, too, die with their parent
AddLengthPreprocessor.preprocess = _name_long_rows(AddLengthPreprocessor.preprocess)
callbacks_map["fabrictune"] = Fabrictune
