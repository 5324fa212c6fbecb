"""The shape of a base model, read from config.json and the headers of its safetensors files: no weight is touched."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import InvalidData

HEADER_BYTES = 8 << 20
"""At most of a header: 100 kB is what a shard of a large model has."""
_DTYPES: Mapping[str, str] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_OUTSIDE = re.compile(r"(^|\.)(embed_tokens|wte|lm_head|embed_out|score)$")
"""Modules that `all-linear` leaves alone."""


@dataclass(frozen=True)
class ModelShape:
    """What memory and time depend on. Sizes are numbers of elements."""

    hidden: int
    layers: int
    heads: int
    """Query heads."""
    query: int
    """Width of all query heads together."""
    key: int
    """Width of all key heads together."""
    intermediate: int
    vocabulary: int
    parameters: int
    linears: Mapping[str, tuple[int, int]]
    """Module name → (out, in) of the matrices inside the layers."""
    dtype: str

    @property
    def matrix_parameters(self) -> int:
        """Parameters that each token is multiplied with: the layers' matrices and the output's."""
        return sum(math.prod(shape) for shape in self.linears.values()) + self.hidden * self.vocabulary


def read_shape(model: Path) -> ModelShape:
    """The shape of a model folder. Raises InvalidData."""
    heads = [_read_head(file) for file in sorted(model.glob("*.safetensors"))]
    return make_shape((model / "config.json").read_bytes(), heads)


def make_shape(config_json: bytes, heads: Iterable[bytes]) -> ModelShape:
    """The shape from config.json and the first bytes of each safetensors file. Raises InvalidData."""
    try:
        config = json.loads(config_json)
    except ValueError as error:
        raise InvalidData(f"the base model's config.json cannot be read: {error}") from None
    config = config.get("text_config") or config
    tensors = {name: entry for head in heads for name, entry in parse_header(head).items()}
    try:
        hidden, heads_count = int(config["hidden_size"]), int(config["num_attention_heads"])
        layers, vocabulary = int(config["num_hidden_layers"]), int(config["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidData(f"the base model's config.json has no usable {error}") from None
    per_head = int(config.get("head_dim") or hidden // heads_count)
    linears = {
        name.removesuffix(".weight"): (int(shape[0]), int(shape[1]))
        for name, (_, shape) in tensors.items()
        if name.endswith(".weight") and len(shape) == 2 and not _OUTSIDE.search(name.removesuffix(".weight"))
    }
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads_count,
        query=per_head * heads_count,
        key=per_head * int(config.get("num_key_value_heads") or heads_count),
        intermediate=int(config.get("intermediate_size") or 4 * hidden),
        vocabulary=vocabulary,
        parameters=sum(math.prod(shape) for _, shape in tensors.values()),
        linears=linears,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or _most_common(tensors)),
    )


def parse_header(head: bytes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name → (dtype, shape) from the first bytes of a safetensors file. Raises InvalidData."""
    size = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
    if not 0 < size <= len(head) - 8:
        raise InvalidData("the base model's safetensors header is truncated")
    try:
        entries = json.loads(head[8 : 8 + size])
        return {
            name: (str(entry["dtype"]), tuple(entry["shape"]))
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidData(f"the base model's safetensors header cannot be read: {error}") from None


def _read_head(file: Path) -> bytes:
    with file.open("rb") as opened:
        head = opened.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        return head + opened.read(min(size, HEADER_BYTES))


def _most_common(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    sizes: dict[str, int] = {}
    for dtype, shape in tensors.values():
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
    return _DTYPES.get(max(sizes, key=lambda dtype: sizes[dtype], default=""), "float32")
