"""adapter_config.json: what of it changes the meaning of the weights, and with which values we merge.

Everything else is refused by its name: a setting that a later peft invents must not be passed over in silence.
Source: peft 0.20, tuners/lora/config.py and config.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.common.errors import InvalidData, Violation

WEIGHTS = "adapter_model.safetensors"
NOTHING: tuple[Any, ...] = (False, None, [], {}, "")
# Settings that change what the weights mean, and the values with which we merge; the first one is named to the user.
MERGED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", *NOTHING),
    # The others change the base when an adapter is made, so that it fits another base than the one that is stored.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
# Settings that say how it was trained or where it comes from, or that are read below.
KNOWN = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
        *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
        *("fan_in_fan_out", "modules_to_save", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "qalora_group_size", "runtime_config"),
        *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),  # ms-swift's, of training only
    }
)


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter. Raises InvalidData naming all that cannot be merged."""
    config = load_config(folder)
    if wrong := [*_refuse_settings(config), *_refuse_numbers(config)]:
        raise InvalidData(f"the adapter {folder.name} cannot be merged", violations=wrong)
    return config


def load_config(folder: Path) -> dict[str, Any]:
    """The same whatever it holds. Raises InvalidData when there is none, or no weights but pickled ones."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidData(f"{folder.name} is no adapter: there is no adapter_config.json") from None
    except ValueError as error:
        raise InvalidData(f"adapter_config.json of {folder.name} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidData(f"adapter_config.json of {folder.name} must hold an object")
    if not (folder / WEIGHTS).is_file():
        pickled = ", ".join(p.name for p in folder.glob("*.bin"))
        text = f"is missing{f'; {pickled} is pickled and never read' if pickled else ''}"
        raise InvalidData(f"the adapter {folder.name} cannot be merged", violations=[Violation(WEIGHTS, text)])
    return config


def pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Peft's lookup: a key is the end of a module's name, or a regular expression for it (utils/other.py)."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _refuse_settings(config: Mapping[str, Any]) -> list[Violation]:
    wrong = []
    for key, value in config.items():
        merged = MERGED.get(key, () if key in KNOWN else NOTHING)
        if merged and value not in merged:
            text = f"{value!r} cannot be merged" + (f"; only {merged[0]!r} can" if key in MERGED else "")
            wrong.append(Violation(f"adapter_config.json {key}", text))
    return wrong


def _refuse_numbers(config: Mapping[str, Any]) -> list[Violation]:
    wrong = []
    if not _is_number(config.get("lora_alpha")):
        wrong.append(Violation("adapter_config.json lora_alpha", "must be a number"))
    if "r" in config and not (_is_number(config["r"]) and config["r"] > 0):
        wrong.append(Violation("adapter_config.json r", f"the rank must be above 0, not {config['r']!r}"))
    for key in ("rank_pattern", "alpha_pattern"):
        for module, value in (config.get(key) or {}).items():
            if not _is_number(value) or (key == "rank_pattern" and value <= 0):
                wrong.append(Violation(f"adapter_config.json {key}", f"{module}: {value!r} must be a number above 0"))
            try:
                re.compile(module)
            except re.error as error:
                wrong.append(Violation(f"adapter_config.json {key}", f"{module!r} is no regular expression: {error}"))
    return wrong


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
