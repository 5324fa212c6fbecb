"""What a model folder holds beside its weights and goes into the merged model: tokenizer, chat template, generation config."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from typing import Any

from services.common.errors import InvalidData
from services.merging.plan import INDEX, Plan, update_config, update_index
from services.merging.spec import TEMPLATES

CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "*.py")
NOT_CARRIED = frozenset({"adapter_config.json", "training_args.json", "manifest.json"})
# The adapter's copy wins where it has one.
FROM_ADAPTER = (
    *("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json"),
)
TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
ReadNamed = Callable[[str], bytes]
Files = tuple[Iterable[str], ReadNamed]
"""Names of a folder's files, and a way to read one."""


def carry(base: Files, adapter: Files, chat_template: str, plan: Plan | None = None) -> dict[str, bytes]:
    """File → content, for the merged model. chat_template: as in the spec. Raises InvalidData."""
    found: dict[str, bytes] = {}
    for (names, read), patterns in ((base, CARRIED), (adapter, FROM_ADAPTER)):
        for name in sorted(names):
            if "/" not in name and name not in NOT_CARRIED and any(fnmatch(name, pattern) for pattern in patterns):
                found[name] = read(name)
    if chat_template:
        text = _base_template(base) if chat_template == "base" else TEMPLATES.get(chat_template, chat_template)
        _put_template(found, text)
    if plan is not None:
        for name, update in (("config.json", update_config), (INDEX, update_index)):
            if name in found:
                found[name] = _update(name, found[name], plan, update)
    return found


def _update(name: str, raw: bytes, plan: Plan, update: Callable[[bytes, Plan], bytes]) -> bytes:
    try:
        return update(raw, plan)
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidData(f"the base model's {name} cannot be read: {error}") from None


def _base_template(base: Files) -> str:
    names, read = set(base[0]), base[1]
    if TEMPLATE in names:
        return read(TEMPLATE).decode()
    template = _read_json(read(TOKENIZER_CONFIG)).get("chat_template") if TOKENIZER_CONFIG in names else None
    if not isinstance(template, str):
        raise InvalidData("chat_template is base, but the base model has no chat template")
    return template


def _put_template(found: dict[str, bytes], template: str) -> None:
    found[TEMPLATE] = template.encode()
    if TOKENIZER_CONFIG in found:
        told = _read_json(found[TOKENIZER_CONFIG])
        if told.pop("chat_template", None) is not None:  # one place only, or readers differ in what they take
            found[TOKENIZER_CONFIG] = (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode()


def _read_json(raw: bytes) -> dict[str, Any]:
    try:
        told = json.loads(raw)
    except ValueError as error:
        raise InvalidData(f"{TOKENIZER_CONFIG} is not JSON: {error}") from None
    return told if isinstance(told, dict) else {}
