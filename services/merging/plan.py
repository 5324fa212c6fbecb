"""What a merge will do to which tensor of which file, and everything that can be wrong with it: all before a byte is written.

Tied weights: a model whose head is its embedding stores one tensor for both. LoRA on either of them changes that tensor, as
peft's does; a module of modules_to_save is a copy, so there the two come apart, the head gets a tensor of its own behind
the embedding's file, and config.json says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from services.common.errors import InvalidData, Violation
from services.merging.adapter import Adapter
from services.merging.mixture import Mixture
from services.merging.tensors import DTYPES, FLOATS, Entry, Header

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
INDEX = "model.safetensors.index.json"
NAMED = 5


@dataclass(frozen=True)
class Step:
    """One change of a tensor. module: a LoRA module; or saved: the adapter's tensor that replaces it."""

    adapter: Adapter
    module: str = ""
    saved: str = ""
    is_transposed: bool = False
    """The module's weight is (in, out): an embedding's or a Conv1D's."""


@dataclass(frozen=True)
class Plan:
    """A merge that can be done."""

    headers: Sequence[Header]
    """Of the base's files, in order."""
    steps: Mapping[str, Sequence[Step]]
    """Base tensor → what is done to it, one after the other, as peft does it module after module."""
    added: Mapping[str, Mapping[str, Entry]]
    """File → tensors that it gets in addition (begin and end from the first tensor's start), by name."""
    copied: Mapping[str, str]
    """Added tensor → the base tensor that it begins as."""
    config: Mapping[str, Any]
    """What changes in config.json."""

    @property
    def tensors(self) -> int:
        """Of the merged model."""
        return sum(len(h.entries) for h in self.headers) + sum(map(len, self.added.values()))

    @property
    def size(self) -> int:
        """Bytes of the merged weights, without what headers grow by."""
        return sum(h.size for h in self.headers) + sum(e.end - e.begin for e in self._added())

    def _added(self) -> Iterable[Entry]:
        return (entry for entries in self.added.values() for entry in entries.values())


def plan_merge(headers: Sequence[Header], mixture: Mixture, base: str) -> Plan:
    """Raises InvalidData naming the tensors that do not fit, with both shapes. base: its name, for messages."""
    entries = _gather(headers)
    names = _Names(entries)
    steps: dict[str, list[Step]] = {}
    wrong: list[Violation] = []
    untied = _find_untied(mixture, names)
    transposed = _find_transposed(mixture, {m: entries.get(names.find(f"{m}.weight")) for m in mixture.modules})
    for adapter in mixture.adapters:
        for weight, saved in adapter.bases.items():
            steps.setdefault(names.find(weight, untied), []).append(Step(adapter, saved=saved))
    # peft walks through the modules in their order: the embedding comes before the head that shares its tensor.
    for module, adapter in sorted(mixture.modules.items(), key=lambda m: f"{m[0]}.weight" in HEADS):
        step = Step(adapter, module=module, is_transposed=module in transposed)
        steps.setdefault(names.find(f"{module}.weight", untied), []).append(step)
    for adapter in mixture.adapters:
        for weight, saved in adapter.saved.items():
            steps.setdefault(names.find(weight, untied), []).append(Step(adapter, saved=saved))
    for weight, changes in steps.items():
        there = entries.get(names.embedding if weight == untied else weight)
        wrong += [v for step in changes if (v := _compare(weight, there, step))]
    if wrong:
        raise InvalidData(f"the adapter was made for another base model than {base}", violations=wrong[:NAMED])
    added = _add_head(headers, entries[names.embedding], untied) if untied else {}
    copied = {untied: names.embedding} if untied else {}
    return Plan(headers, steps, added, copied, {"tie_word_embeddings": False} if untied else {})


class _Names:
    """Where the base keeps the weight that an adapter names."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        self.embedding = next((n for n in entries if n.endswith(EMBEDDINGS)), "")
        self.has_head = any(n.endswith(HEADS) for n in entries)

    def find(self, weight: str, untied: str = "") -> str:
        """The base's name; the adapter's own when there is none."""
        if weight in self._entries or weight == untied:
            return weight
        # Some checkpoints were saved without the head's class: "h.0.attn…" for "transformer.h.0.attn…".
        short = weight.partition(".")[2]
        if short in self._entries:
            return short
        return self.embedding if weight in HEADS and self.embedding else weight


def _find_untied(mixture: Mixture, names: _Names) -> str:
    """The head's name when modules_to_save gives a tied model two tensors; "" otherwise."""
    saved = {weight for adapter in mixture.adapters for weight in adapter.saved}
    if names.has_head or not names.embedding:
        return ""
    heads = [weight for weight in saved if weight in HEADS]
    if heads:
        return heads[0]
    return HEADS[0] if any(weight.endswith(EMBEDDINGS) for weight in saved) else ""


def _find_transposed(mixture: Mixture, there: Mapping[str, Entry | None]) -> set[str]:
    """Modules whose weight is (in, out). fan_in_fan_out says it of all layers, and a model may have both kinds.

    peft corrects it layer by layer; here shapes decide, and where they are square, what holds for the model's other layers.
    """
    found = {module for module, adapter in mixture.modules.items() if adapter.pairs[module].is_embedding}
    layers = [m for m in mixture.modules if m not in found and f"{m}.weight" not in HEADS]
    fits = {m: _is_turned(mixture.modules[m].shape_of(m), there[m]) for m in layers}
    is_conv1d = any(a.fan_in_fan_out for a in mixture.adapters) or any(fit is True for fit in fits.values())
    return found | {m for m in layers if fits[m] or (fits[m] is None and is_conv1d)}


def _is_turned(made: tuple[int, int], there: Entry | None) -> bool | None:
    """Whether (out, in) fits a weight only when it is transposed; None when that cannot be told."""
    if there is None or made[0] == made[1] or there.shape not in (made, made[::-1]):
        return None
    return there.shape != made


def _compare(weight: str, there: Entry | None, step: Step) -> Violation | None:
    if step.module:
        made: tuple[int, ...] = step.adapter.shape_of(step.module, step.is_transposed)
    else:
        made = step.adapter.entries[step.saved].shape
    if there is None:
        return Violation(weight, f"is not there in the base model, {made} in the adapter")
    if there.dtype not in FLOATS:
        return Violation(weight, f"is {there.dtype}; only {', '.join(FLOATS)} can be merged (is the base quantized?)")
    if there.shape != made:
        return Violation(weight, f"is {there.shape} in the base model, {made} in the adapter")
    if there.dtype == "F64" and step.module and step.adapter.config.get("use_dora"):
        return Violation(weight, "is F64, which DoRA (use_dora) cannot be merged into")
    return None


def _gather(headers: Sequence[Header]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    where: dict[str, str] = {}
    for header in headers:
        for name, entry in header.entries.items():
            if name in entries:
                raise InvalidData(f"the tensor {name} is in {where[name]} and in {header.file}")
            entries[name], where[name] = entry, header.file
    return entries


def _add_head(headers: Sequence[Header], embedding: Entry, head: str) -> dict[str, dict[str, Entry]]:
    header = next(h for h in headers if embedding.name in h.entries)
    begin = header.size - header.data
    width = DTYPES[embedding.dtype].itemsize
    if begin % width:  # cannot happen where all tensors of a file are floats
        raise InvalidData(f"{header.file} leaves no aligned place for {head}; use engine: peft")
    added = replace(embedding, name=head, begin=begin, end=begin + embedding.end - embedding.begin)
    return {header.file: {head: added}}


def update_index(raw: bytes, plan: Plan) -> bytes:
    """model.safetensors.index.json with the tensors that were added."""
    if not plan.added:
        return raw
    index = json.loads(raw)
    for file, entries in plan.added.items():
        for name, entry in entries.items():
            index["weight_map"][name] = file
            if "total_size" in index.get("metadata", {}):
                index["metadata"]["total_size"] += entry.end - entry.begin
    return _to_json(index)


def update_config(raw: bytes, plan: Plan) -> bytes:
    """config.json with what a merge changes in it."""
    return _to_json({**json.loads(raw), **plan.config}) if plan.config else raw


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
