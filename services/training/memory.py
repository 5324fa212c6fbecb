"""How much memory each training process needs at its peak, part by part, before anything is started.

The parts of activations are counted from what transformers' decoder layer and peft's LoRA keep for the backward pass
(docs/training.md has the measured peaks beside them). What differs between machines is in OVERHEAD and FRAGMENTATION alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.training.shapes import ModelShape
from services.training.swift import attends_in_blocks

_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_QUANTIZED: Mapping[int, float] = {
    # bits → bytes of a weight with its scales (blocks of 64, double quantization)
    4: 0.52,
    8: 1.0,
}
_OPTIMIZER: tuple[tuple[re.Pattern[str], float], ...] = (
    # optim → bytes of state for each byte of a trained parameter; the first match counts
    (re.compile(r"8bit"), 0.5),
    (re.compile(r"adafactor"), 0.1),
    (re.compile(r"^sgd"), 0.0),
    (re.compile(r""), 2.0),  # the two moments of Adam
)
_PLAIN_LOSSES = frozenset({"default", "last_round", "all"})
"""loss_scale whose tokens count once or not at all, so the model computes its loss itself."""
OVERHEAD: Mapping[str, int] = {
    # Python, torch, ms-swift, tokenizer and allocator: resident memory before the first step without the weights,
    # measured with ms-swift 4.6.0 and torch 2.13.0+cpu
    "cpu": 520 << 20,
    # the CUDA context, cuBLAS' workspace and what the caching allocator cannot hand out; not measured here
    "gpu": 1200 << 20,
}

FRAGMENTATION: Mapping[str, float] = {
    # Part of the activations that the allocator holds beside them. glibc keeps freed blocks of up to 32 MB in a heap that
    # only grows; measured with glibc 2.36. MALLOC_MMAP_THRESHOLD_=262144 in the environment spares it, for an eighth of time.
    "cpu": 0.7,
    "gpu": 0.0,  # in OVERHEAD
}


MOST_KEPT_WEIGHTS = 32 << 20
"""Attention weights of one layer that swift_attention.py keeps at most."""


@dataclass(frozen=True)
class Load:
    """What a process is given in one step."""

    batch: int
    """Rows."""
    length: int
    """Tokens of the longest row that is trained."""
    world_size: int = 1
    device: str = "gpu"
    """"gpu" or "cpu"."""


@dataclass(frozen=True)
class Memory:
    """Bytes for each process at its peak."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    fragmentation: int
    overhead: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """By name."""
        return dict(vars(self))


def trained_parameters(shape: ModelShape, arguments: Mapping[str, Any]) -> int:
    """Parameters that the optimizer changes: all of them, or those of the LoRA matrices (r x (in + out) a module)."""
    if arguments.get("tuner_type", "lora") == "full":
        return shape.parameters
    rank, dora = int(arguments.get("lora_rank", 8)), bool(arguments.get("use_dora"))
    return sum(rank * sum(linear) + dora * linear[0] for linear in _adapted(shape, arguments).values())


def estimate_memory(shape: ModelShape, arguments: Mapping[str, Any], load: Load) -> Memory:
    """Peak memory of one process. arguments: of ms-swift, preset and spec together."""
    compute = _BYTES.get(str(arguments.get("torch_dtype", shape.dtype)), 4)
    full = arguments.get("tuner_type", "lora") == "full"
    trained = trained_parameters(shape, arguments)
    width = compute if full else 4  # peft holds LoRA matrices in float32
    gradients = trained * width * (2 if load.world_size > 1 else 1)  # DistributedDataParallel copies them into buckets
    activations = _activations(shape, arguments, load, compute)
    state = next(factor for pattern, factor in _OPTIMIZER if pattern.search(str(arguments.get("optim", ""))))
    return Memory(
        weights=_weights(shape, arguments, compute),
        adapter=0 if full else trained * width,
        gradients=gradients,
        optimizer=int(trained * width * state),
        activations=activations,
        logits=_logits(shape, arguments, load, compute),
        fragmentation=int(activations * FRAGMENTATION[load.device]),
        overhead=OVERHEAD[load.device],
    )


def _weights(shape: ModelShape, arguments: Mapping[str, Any], compute: int) -> int:
    if arguments.get("quant_method") is None:
        return shape.parameters * compute
    inside = sum(out * into for out, into in shape.linears.values())
    each = _QUANTIZED.get(int(arguments.get("quant_bits", 4)), 1.0)
    return int(inside * each) + (shape.parameters - inside) * compute


def _activations(shape: ModelShape, arguments: Mapping[str, Any], load: Load, compute: int) -> int:
    tokens = load.batch * load.length
    layer = tokens * _layer_bytes(shape, arguments, compute, compute if load.device == "cpu" else 1)
    if attends_in_blocks(arguments, on_cpu=load.device == "cpu"):
        layer += compute * min(load.batch * shape.heads * load.length**2 // 2, MOST_KEPT_WEIGHTS)
    if arguments.get("gradient_checkpointing", True):
        return shape.layers * tokens * shape.hidden * compute + layer  # each layer's input, and one layer again
    return _layers_walked_back(shape, arguments) * layer


def _layer_bytes(shape: ModelShape, arguments: Mapping[str, Any], compute: int, mask: int) -> int:
    """Bytes that one decoder layer keeps for each token until its backward pass. mask: of dropout, an element."""
    norms = 2 * 4 * shape.hidden  # RMSNorm computes in float32 and keeps its input
    attention = compute * (2 * shape.query + 2 * shape.key)  # q, k, v and the outcome
    mlp = compute * 3 * shape.intermediate  # the gate, its SiLU, and up
    # Inputs of the matrices: normed twice, attention's outcome (counted above), the product before `down`.
    inputs = compute * (2 * shape.hidden + shape.intermediate)
    if arguments.get("tuner_type", "lora") != "full":
        own = 5 * shape.hidden + shape.query + shape.intermediate  # inputs of q, k, v, gate and up; of o; of down
        if float(arguments.get("lora_dropout", 0.05)) > 0:
            inputs = (compute + mask) * own  # each matrix drops elements of its own copy, and keeps a mask
        elif compute != 4:
            inputs = compute * own  # each LoRA casts its own copy
    return norms + attention + mlp + inputs


def _layers_walked_back(shape: ModelShape, arguments: Mapping[str, Any]) -> int:
    """Layers from the lowest trained one upwards: below it nothing is kept."""
    if arguments.get("tuner_type", "lora") == "full":
        return shape.layers
    found = [re.search(r"\.(?:layers|h)\.(\d+)\.", f".{name}.") for name in _adapted(shape, arguments)]
    return shape.layers - min((int(match[1]) for match in found if match), default=0)


def _logits(shape: ModelShape, arguments: Mapping[str, Any], load: Load, compute: int) -> int:
    """The output over the vocabulary: itself, in float32 with its log-softmax, and the gradients of these.

    ms-swift computes a loss of weighted tokens itself, over all tokens: two copies more.
    """
    copies = 3 if set(str(arguments.get("loss_scale", "default")).split("+")) <= _PLAIN_LOSSES else 5
    kept = 0.5 if arguments.get("use_logits_to_keep") else 1.0  # of answers only; half a row, where nothing is known
    each = 4 * copies + (compute if compute != 4 else 0)
    return int(load.batch * load.length * kept) * shape.vocabulary * each


def _adapted(shape: ModelShape, arguments: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    pattern = arguments.get("target_regex")
    if pattern:
        return {name: linear for name, linear in shape.linears.items() if re.fullmatch(str(pattern), name)}
    wanted = arguments.get("target_modules", "all-linear")
    names = wanted if isinstance(wanted, list) else str(wanted).split()
    if "all-linear" in names:
        return dict(shape.linears)
    return {name: linear for name, linear in shape.linears.items() if name.rpartition(".")[2] in names}
