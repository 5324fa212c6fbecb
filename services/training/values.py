"""What the value of an argument must be: of those that are computed with before ms-swift starts, and that people set most.

ms-swift would refuse a wrong one itself, half a minute after the start, and some (no checkpoint) only at the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Kind = tuple[str, Callable[[Any], bool]]
"""In words, and whether a value is one."""

_WHOLE: Kind = "a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)
_COUNT: Kind = "a whole number above 0", lambda value: _WHOLE[1](value) and value > 0
_ABOVE_0: Kind = "a number above 0", lambda value: 0 < _number(value) < math.inf
_FROM_0: Kind = "a number, 0 or more", lambda value: 0 <= _number(value) < math.inf
_SHARE: Kind = "a number from 0 to 1", lambda value: 0 <= _number(value) <= 1
_REGEX: Kind = "a regular expression", lambda value: _is_regex(value)
_WORD: Kind = 'steps, epoch or "no" (in quotes, for YAML reads it as false)', lambda value: isinstance(value, str)
_SAVING: Kind = (
    "steps, epoch or best: without a checkpoint there is nothing to make an adapter of",
    lambda value: value in ("steps", "epoch", "best"),
)

VALUES: Mapping[str, Kind] = {
    **dict.fromkeys(("effective_batch_size", "per_device_train_batch_size", "per_device_eval_batch_size"), _COUNT),
    **dict.fromkeys(("max_length", "packing_length", "lora_rank", "quant_bits"), _COUNT),
    **dict.fromkeys(("max_steps", "save_total_limit"), _WHOLE),  # -1: none
    **dict.fromkeys(("num_train_epochs", "learning_rate", "lora_alpha"), _ABOVE_0),
    **dict.fromkeys(("save_steps", "eval_steps", "logging_steps"), _ABOVE_0),  # below 1: a share of all steps
    **dict.fromkeys(("weight_decay", "max_grad_norm"), _FROM_0),
    **dict.fromkeys(("lora_dropout", "warmup_ratio"), _SHARE),
    **dict.fromkeys(("eval_strategy", "logging_strategy"), _WORD),
    "save_strategy": _SAVING,
    "target_regex": _REGEX,
}


def describe_wrong(argument: str, value: Any) -> str:
    """What is wrong with a value; "" for one that may do."""
    kind, is_one = VALUES.get(argument, ("", lambda _: True))
    return "" if is_one(value) else f"{value!r} is not {kind}"


def _number(value: Any) -> float:
    """Also of what YAML takes for a word (1e-4); NaN where it is none, so that no comparison holds."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _is_regex(value: Any) -> bool:
    try:
        re.compile(str(value))
    except re.error:
        return False
    return True
