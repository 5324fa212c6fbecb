"""What a training run will take: memory for each GPU, steps, time and cost; a pure function of shapes and counts.

Memory is counted (memory.py). Time is arithmetic over an assumed utilisation, for nobody can know it before a run: the
answer says which, and the first minutes of a run say better.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.common.errors import InvalidData, InvalidSpec, Violation
from services.training.dataset_size import DatasetSize
from services.training.memory import Load, Memory, estimate_memory, trained_parameters
from services.training.presets import load_preset
from services.training.shapes import ModelShape
from services.training.spec import Spec

GIB = 1 << 30
MARGIN = 0.15
"""How far an estimate may be off (docs/training.md): what is too large by more certainly does not fit."""
UTILISATION = 0.35
"""Part of a GPU's dense peak that LoRA training is assumed to reach; not measured here."""
CPU_CORE_TFLOPS = 0.03
"""Float32 arithmetic of one core that `swift sft` reached on the two cores without AVX-512 of docs/training.md."""


@dataclass(frozen=True)
class Device:
    """One GPU. memory: bytes that a process can use; tflops: dense bfloat16 peak of the vendor's data sheet."""

    name: str
    memory: int
    tflops: float


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("t4", 15 * GIB, 65),  # float16
        Device("l4", 22 * GIB, 121),
        Device("a10", 22 * GIB, 125),
        Device("rtx-4090", 23 * GIB, 165),
        Device("a100-40gb", 39 * GIB, 312),
        Device("l40s", 44 * GIB, 362),
        Device("a100-80gb", 79 * GIB, 312),
        Device("h100-80gb", 79 * GIB, 989),
        Device("h200", 139 * GIB, 989),
    )
}


@dataclass(frozen=True)
class Estimate:
    """What a run takes."""

    memory: Memory
    """Of each process."""
    device: Device | None
    """None: a CPU, or a GPU of a kind that was not named."""
    parameters: int
    trained: int
    rows: int
    tokens: int
    """Over all epochs, padding not counted."""
    steps: int
    seconds: float | None
    """None where nothing is known of the device."""
    cost: float | None
    """In the currency of the price; None without one."""
    advice: str
    """What to change where it does not fit; else ""."""

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the device's memory; None where that is not known."""
        return None if self.device is None else self.memory.total <= self.device.memory


def estimate_training(
    spec: Spec, shape: ModelShape, dataset: DatasetSize, device: str = "", price_per_hour: float = 0.0, cores: int = 0
) -> Estimate:
    """Memory, time and cost of a spec. price_per_hour: of one GPU; cores: of a CPU run. Raises InvalidSpec."""
    preset = load_preset(spec.preset)
    arguments = {**preset.arguments, **spec.arguments}
    gpus, nodes = spec.resources.gpus, spec.resources.nodes
    world = max(gpus, 1) * nodes
    known = find_device(device) if device else None
    limit = int(arguments["max_length"]) if arguments.get("max_length") else None
    rows, mean, longest = dataset.within(limit)
    if not rows:
        raise InvalidData(f"no row of the dataset is within max_length {limit}; set spec.arguments.max_length higher")
    packed = bool(arguments.get("packing"))
    length = int(arguments.get("packing_length") or limit or longest) if packed else longest
    load = Load(int(arguments.get("per_device_train_batch_size", 1)), length, world, "gpu" if gpus or known else "cpu")
    memory = estimate_memory(shape, arguments, load)
    batch = int(arguments.get("effective_batch_size", preset.effective_batch_size or load.batch * world))
    units = math.ceil(rows * mean / length) if packed else rows
    steps = math.ceil(math.ceil(units / batch) * float(arguments.get("num_train_epochs", 3)))
    if int(arguments.get("max_steps", -1)) > 0:
        steps = int(arguments["max_steps"])
    tokens = int(steps * batch * mean * rows / units)
    speed = known.tflops * UTILISATION * world if known else cores * CPU_CORE_TFLOPS * nodes
    seconds = tokens * count_flops(shape, arguments, mean) / (speed * 1e12) if speed else None
    cost = seconds / 3600 * world * price_per_hour if seconds is not None and price_per_hour else None
    return Estimate(
        memory, known, shape.parameters, trained_parameters(shape, arguments), round(rows), tokens, steps,
        seconds, cost, advise(memory, known.memory if known else None, arguments),
    )  # fmt: skip


def count_flops(shape: ModelShape, arguments: Mapping[str, Any], length: float) -> float:
    """Arithmetic for each token of training: forward, backward, and forward again with gradient checkpointing.

    2 for each parameter and pass; the gradients of frozen weights are not computed. Attention: 2 x 2 x width x half the
    length. Source: Kaplan et al. 2020, section 2.1.
    """
    forward = 2 * shape.matrix_parameters + 2 * length * shape.query * shape.layers
    weights = 2 * trained_parameters(shape, arguments)
    again = 1 if arguments.get("gradient_checkpointing", True) else 0
    return forward * (2 + again) + weights


def advise(memory: Memory, available: int | None, arguments: Mapping[str, Any]) -> str:
    """What makes a run smaller, the most effective first; "" when it fits or nothing is known."""
    if available is None or memory.total <= available:
        return ""
    parts = memory.parts
    hints = []
    batch = int(arguments.get("per_device_train_batch_size", 1))
    if not arguments.get("gradient_checkpointing", True):
        hints.append("gradient_checkpointing: true")
    if batch > 1 and parts["activations"] + parts["logits"] > available // 10:
        hints.append("per_device_train_batch_size: 1 (the effective batch stays)")
    if arguments.get("tuner_type") == "full":
        hints.append("tuner_type: lora")
    elif arguments.get("quant_method") is None and parts["weights"] > available // 4:
        hints.append("the preset agentfabric-qlora (weights in 4 bits)")
    if parts["activations"] + parts["logits"] > available // 10:
        hints.append("a smaller max_length")
    return "; ".join([*hints, "a GPU with more memory"])


def explain(memory: Memory, available: int) -> str:
    """The numbers in one sentence."""
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in memory.parts.items() if size >= GIB // 100)
    return f"each process needs about {_gib(memory.total)} ({parts}) and {_gib(available)} is there"


def certainly_too_large(memory: Memory, available: int) -> bool:
    """Whether it would not fit even if the estimate were too high by MARGIN."""
    return memory.total * (1 - MARGIN) > available


def find_device(name: str) -> Device:
    """A device by the name of DEVICES, or by "24GiB". Raises InvalidSpec listing the names."""
    plain = name.lower().replace(" ", "-").removeprefix("nvidia-")
    if plain in DEVICES:
        return DEVICES[plain]
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)-?gi?b", plain):
        return Device(name, int(float(match[1]) * GIB), 0.0)
    known = ", ".join(DEVICES)
    text = f"{name!r} is no GPU that is known; there are {known}; or give its memory, such as 24GiB"
    raise InvalidSpec("the training cannot be estimated", violations=[Violation("gpu", text)])


def to_plain(estimate: Estimate, dataset: DatasetSize) -> dict[str, Any]:
    """The JSON form of fabrictune.v1.EstimateTrainingResponse."""
    device = estimate.device
    return {
        "memory": [{"name": name, "bytes": size} for name, size in estimate.memory.parts.items()],
        "memory_bytes": estimate.memory.total,
        "parameters": estimate.parameters,
        "trained_parameters": estimate.trained,
        "rows": estimate.rows,
        "tokens": estimate.tokens,
        "steps": estimate.steps,
        "advice": estimate.advice,
        "assumptions": describe(estimate, dataset.exact),
        **({"available_bytes": device.memory, "fits": estimate.fits} if device is not None else {}),
        **({"duration": f"{estimate.seconds:.0f}s"} if estimate.seconds is not None else {}),
        **({"cost": round(estimate.cost, 2)} if estimate.cost is not None else {}),
    }


def describe(estimate: Estimate, exact: bool) -> list[str]:
    """What the figures rest on, in words."""
    said = [
        "memory is counted part by part (docs/training.md has measured peaks of CPUs; those of GPUs were not measured)"
    ]
    if not exact:
        said.append("row lengths are guessed from letters: convert with a tokenizer for exact ones")
    if estimate.device is not None and estimate.seconds is not None:
        said.append(
            f"time assumes {UTILISATION:.0%} of the {estimate.device.tflops:.0f} TFLOPS of {estimate.device.name}"
        )
    elif estimate.seconds is not None:
        said.append(f"time assumes {CPU_CORE_TFLOPS * 1000:.0f} GFLOPS for each core")
    return said


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
