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
import re
import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from swift.callbacks import callbacks_map
from swift.callbacks.base import TrainerCallback
from swift.dataset import AddLengthPreprocessor
from swift.loss_scale import loss_scale_map
from swift.loss_scale.base import LossScale
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


def _peak_bytes() -> int:
    """Memory of this rank at most: what the GPU's allocator has taken, or resident memory on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Fabrictune(TrainerCallback):  # type: ignore[misc]  # ms-swift has no types
    """Adds time, tokens and memory to logging.jsonl, tells of checkpoints, and stops when it is asked."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        args.include_num_input_tokens_seen = "non_padding"  # 4.6.0's command line takes true and false only
        self._computing, self._step_begin = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say how many rows and steps there are, and adjust logits where the spec says so."""
        if less := float(os.environ.get("FABRICTUNE_LOGIT_ADJUSTMENT", 0)):
            adjust_logits(self.trainer, less)
        if state.is_world_process_zero:
            rows = {"train": _count_rows(self.trainer.train_dataset)}
            rows["validation"] = _count_rows(self.trainer.eval_dataset)
            steps = {"max_steps": state.max_steps, "step": state.global_step}
            (_WORK / "dataset.json").write_text(json.dumps({**rows, **steps, "peak_bytes": _peak_bytes()}))

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
        logs["memory_bytes"] = _peak_bytes()
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


def _count_rows(dataset: Any) -> int:
    """Rows of a dataset; of a packed one, those in its packs."""
    if dataset is None:
        return 0
    packs = getattr(dataset, "packed_idx", None)
    return len(dataset) if packs is None else sum(len(pack) for pack in packs)


_TURN = re.compile(
    r"^(?:(?P<call>Action: [^\n]*\nAction Input:)"
    r"|(?P<result>Observation: <result>.*?</result>|Observation:)"
    r"|(?P<answer>(?:Final )?Answer:|Thought:))",
    re.DOTALL | re.MULTILINE,
)
_NO_THOUGHT = "<think>\n\n</think>\n\n"
"""Qwen3's template puts it before a turn without a thought; in serving it is part of the prompt."""


def weigh_turn(text: str) -> tuple[list[str], list[float]]:
    """An assistant's text in pieces, and the weight of each: a tool call 2, what was called 0, all else 1.

    ms-swift's `react` splits at its words wherever they are, so that "Observation:" in an argument would end the call.
    """
    pieces, weights, start, weight = [], [], 0, 1.0
    if text.startswith(_NO_THOUGHT):
        pieces, weights, start = [_NO_THOUGHT], [0.0], len(_NO_THOUGHT)
    for match in _TURN.finditer(text, start):
        # A result follows a call, and an answer a result; elsewhere the words mean nothing.
        after = {"call": 2.0, "result": 0.0 if weight == 2.0 else weight, "answer": weight or 1.0}[
            match.lastgroup or ""
        ]
        if after != weight:
            if match.start() > start:
                pieces.append(text[start : match.start()])
                weights.append(weight)
            start, weight = match.start(), after
    return [*pieces, text[start:]], [*weights, weight]


class AgentFabricLossScale(LossScale):  # type: ignore[misc]
    """`--loss_scale agentfabric`."""

    is_binary = False

    def get_loss_scale(self, context: Any, **_: Any) -> tuple[list[Any], list[float]]:
        """Weights of one piece of a conversation that is trained."""
        return weigh_turn(context) if isinstance(context, str) else ([context], [1.0])


_WORD = re.compile(r"[A-Za-z]+")
FIRST_WORD, FIRST_WORD_OF_A_CALL = 3.0, 7.5
"""A turn has one word that decides and some thirty that follow from it. With equal weights the model refused too often
(docs/quickstart.md, "What was tried")."""


class FirstWordLossScale(LossScale):  # type: ignore[misc]
    """`--loss_scale first_word`: the word that decides between a call and an answer counts more than the others."""

    is_binary = False

    def get_loss_scale(self, context: Any, **_: Any) -> tuple[list[Any], list[float]]:
        """Weights of one piece of a conversation that is trained."""
        first = _WORD.match(context) if isinstance(context, str) else None
        if first is None:
            return [context], [1.0]
        weight = FIRST_WORD_OF_A_CALL if context.startswith("Action:") else FIRST_WORD
        return [first[0], context[first.end() :]], [weight, 1.0]


def adjust_logits(trainer: Any, less: float) -> None:
    """Take so much from the logit of a call's first word while training; the trained model then calls the more readily.

    Menon et al. 2021, arXiv:2007.07314. A loss weight moves that threshold no more once the rows are learned; this does.
    """
    head = trainer.accelerator.unwrap_model(trainer.model).get_output_embeddings()
    taken = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype, device=head.weight.device)
    taken[trainer.template.tokenizer("Action", add_special_tokens=False).input_ids[0]] = less
    head.register_forward_hook(lambda module, _, logits: logits - taken if module.training else logits)


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
loss_scale_map["agentfabric"] = AgentFabricLossScale
loss_scale_map["first_word"] = FirstWordLossScale
