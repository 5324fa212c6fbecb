"""One adapter, or several with weights as one: what peft's add_weighted_adapter makes of them, "linear" or "cat".

Source: peft 0.20, tuners/lora/model.py, add_weighted_adapter. Two of its results are not what anybody means, so they are
refused: rsLoRA's scale would be applied a second time, and modules_to_save would be forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from services.common.errors import InvalidData, Violation
from services.merging.adapter import Adapter, orient
from services.merging.blas import Array
from services.merging.low_rank import LowRank

ALONE = ("use_rslora", "use_dora", "modules_to_save")
"""Settings of adapters that are merged by themselves only."""


@dataclass(frozen=True)
class Mixture:
    """What is merged. weights: one for each adapter; None: a single adapter as it is."""

    adapters: Sequence[Adapter]
    weights: Sequence[float] | None = None
    combination: str = "linear"

    def __post_init__(self) -> None:
        if self.weights is not None:
            wrong = [violation for adapter in self.adapters for violation in _refuse(adapter)]
            if wrong or (wrong := self._compare()):
                raise InvalidData("these adapters cannot be merged together", violations=wrong)

    @property
    def modules(self) -> Mapping[str, Adapter]:
        """LoRA module → the first adapter that has it."""
        return {m: adapter for adapter in reversed(self.adapters) for m in adapter.pairs}

    def low_rank(self, module: str, is_transposed: bool, dtype: np.dtype[Any]) -> LowRank:
        """What is done to the module's weight, of this dtype, and (in, out) when it is transposed."""
        if self.weights is None:
            return self.adapters[0].low_rank(module, is_transposed)
        parts = [(a, w) for a, w in zip(self.adapters, self.weights, strict=True) if module in a.pairs]
        # One adapter is always combined linearly, whatever was asked for.
        combination = self.combination if len(self.adapters) > 1 else "linear"
        a, b = _COMBINATIONS[combination](module, parts)
        is_rounded = parts[0][0].pairs[module].is_embedding
        if combination == "cat" and dtype.itemsize < 4:  # peft copies them into an adapter of the base's dtype
            a, b, is_rounded = a.astype(dtype).astype(np.float32), b.astype(dtype).astype(np.float32), True
        return orient(a, b, 1.0, is_transposed, is_rounded)

    def _compare(self) -> list[Violation]:
        wrong = []
        for module, first in self.modules.items():
            having = [a for a in self.adapters if module in a.pairs]
            shapes, ranks = {a.shape_of(module) for a in having}, {a.rank_of(module) for a in having}
            if len(shapes) > 1:
                wrong.append(Violation(module, f"was made for different weights: {sorted(shapes)}"))
            elif len(ranks) > 1 and self.combination == "linear":
                wrong.append(Violation(module, f'has ranks {sorted(ranks)}: use the combination "cat"'))
            elif len({a.pairs[module].is_embedding for a in having}) > 1:
                wrong.append(Violation(module, f"is an embedding in {first.folder.name} and none in another"))
        return wrong[:5]


Part = tuple[Adapter, float]


def _combine_linearly(module: str, parts: Sequence[Part]) -> tuple[Array, Array]:
    """Σ ±√|w·s| A and Σ √|w·s| B."""
    scaled = [weight * adapter.scale_of(module) for adapter, weight in parts]
    roots = [math.sqrt(abs(s)) for s in scaled]
    signed = [root if s >= 0 else -root for root, s in zip(roots, scaled, strict=True)]
    pairs = [adapter.matrices(module) for adapter, _ in parts]
    a = [matrix * np.float32(root) for (matrix, _), root in zip(pairs, signed, strict=True)]
    b = [matrix * np.float32(root) for (_, matrix), root in zip(pairs, roots, strict=True)]
    return reduce(np.add, a), reduce(np.add, b)


def _concatenate(module: str, parts: Sequence[Part]) -> tuple[Array, Array]:
    """[w·s A …] and [B …]."""
    pairs = [adapter.matrices(module) for adapter, _ in parts]
    a = [
        matrix * np.float32(weight) * np.float32(adapter.scale_of(module))
        for (matrix, _), (adapter, weight) in zip(pairs, parts, strict=True)
    ]
    return np.concatenate(a, axis=0), np.concatenate([matrix for _, matrix in pairs], axis=1)


_COMBINATIONS: Mapping[str, Callable[[str, Sequence[Part]], tuple[Array, Array]]] = {
    "linear": _combine_linearly,
    "cat": _concatenate,
}


def _refuse(adapter: Adapter) -> list[Violation]:
    text = f"of {adapter.folder.name}: such an adapter is merged by itself only, without a weight"
    return [Violation(f"adapter_config.json {key}", text) for key in ALONE if adapter.config.get(key)]
