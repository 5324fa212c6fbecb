"""LoRA adapters beside their base model in one vLLM: described, checked against the base, loaded and unloaded while it runs.

An adapter's name in the engine carries its digest, so another version under the same id is another model there; clients
say "{deployment}:{adapter id}". vLLM forgets what was loaded when it ends, so whoever starts it loads all again.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from services.common.errors import FailedPrecondition, InvalidData, Unavailable
from services.inference.connections import OWN_REQUEST
from services.inference.engine import Model, adapter_model

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank takes (vllm 0.32, config/lora.py), without 1."""
LEAST_RANK = 16
WEIGHTS = "adapter_model.safetensors"
INPUT_SIZES = {"q_proj": "hidden_size", "k_proj": "hidden_size", "v_proj": "hidden_size", "gate_proj": "hidden_size",
               "up_proj": "hidden_size", "down_proj": "intermediate_size"}  # fmt: skip
"""Module → the field of config.json that is the width of what it reads."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as an engine's flags and requests depend on it."""

    name: str
    """"adapters/{id}"."""
    digest: str
    folder: Path
    """Where the engine finds it."""
    rank: int
    bases: Mapping[str, str]
    """Models that it was trained on → their digests; empty when nothing is known."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of its lora_A weights, (rank, in); empty when they lie elsewhere."""

    @property
    def id(self) -> str:
        """The last part of its name."""
        return self.name.rpartition("/")[2]


def describe_adapter(name: str, digest: str, folder: Path, created_by: Mapping[str, Any]) -> Adapter:
    """An adapter in a folder of this machine. Raises InvalidData."""
    try:
        told = (folder / "adapter_config.json").read_text()
        shapes = read_shapes(folder / WEIGHTS)
    except OSError as error:
        raise InvalidData(
            f"{name} cannot be read ({error.strerror}); an adapter has adapter_config.json and {WEIGHTS}"
        ) from None
    return Adapter(name, digest, folder, read_rank(told, name), bases_of(created_by), shapes)


def bases_of(created_by: Mapping[str, Any]) -> dict[str, str]:
    """The models among an artifact's inputs → their digests."""
    inputs = created_by.get("inputs", ())
    return {str(i["name"]): str(i["digest"]) for i in inputs if str(i["name"]).startswith("models/")}


def read_rank(told: str | bytes, where: str) -> int:
    """The largest rank that an adapter_config.json names. Raises InvalidData, also for what vLLM cannot load."""
    try:
        config = json.loads(told)
        ranks = [int(config["r"]), *(int(r) for r in (config.get("rank_pattern") or {}).values())]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidData(f"{where}/adapter_config.json cannot be read: {error!r}") from None
    wrong = [f"use_dora is {config['use_dora']}"] if config.get("use_dora") else []
    if config.get("modules_to_save"):
        wrong.append(f"modules_to_save is {config['modules_to_save']}")
    if max(ranks) > RANKS[-1]:
        wrong.append(f"its rank is {max(ranks)}, more than {RANKS[-1]}")
    if wrong:
        raise InvalidData(
            f"{where} cannot be served beside its base ({'; '.join(wrong)}); merge it and deploy the model"
        )
    return max(ranks)


def read_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the lora_A weights of a safetensors file, from its header alone. Raises OSError, InvalidData."""
    try:
        with weights.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(size, 100 * 2**20)))
        return {k: tuple(v["shape"]) for k, v in header.items() if ".lora_A." in k}
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise InvalidData(f"{weights} is no safetensors file: {error!r}") from None


def check_base(adapter: Adapter, model: Model) -> None:
    """Raises FailedPrecondition, reason ADAPTER_OF_ANOTHER_BASE, when it was trained on, or has the form of, another."""
    why = ""
    if adapter.bases and model.digest not in adapter.bases.values():
        why = f"it was trained on {', '.join(adapter.bases)}"
    for key, shape in adapter.shapes.items():
        module = next((m for m in INPUT_SIZES if f".{m}." in key), "")
        wanted = model.config.get(INPUT_SIZES.get(module, ""))
        layer = re.search(r"\.layers\.(\d+)\.", key)
        layers = int(model.config.get("num_hidden_layers") or 0)
        if wanted and shape[-1] != wanted:
            why = why or f"its {module} reads {shape[-1]} numbers, the model's {wanted}"
        if layer and layers and int(layer[1]) >= layers:
            why = why or f"it has a layer {layer[1]}, the model {layers} layers"
    if why:
        raise FailedPrecondition(
            f"{adapter.name} does not belong to {model.name}: {why}",
            {"adapter": adapter.name, "model": model.name},
            reason_override="ADAPTER_OF_ANOTHER_BASE",
        )


def largest_rank(wanted: int | None, adapters: Sequence[Adapter]) -> int:
    """For --max-lora-rank: what was asked or the adapters need, rounded up to what vLLM takes."""
    need = wanted or max((a.rank for a in adapters), default=LEAST_RANK)
    return next(r for r in RANKS if r >= max(need, 8 if wanted else LEAST_RANK))


async def load_adapter(session: aiohttp.ClientSession, address: str, deployment: str, adapter: Adapter) -> None:
    """Load it into a running engine unless it is there. Raises FailedPrecondition (refused), Unavailable."""
    name = adapter_model(deployment, adapter.id, adapter.digest)
    if name in await list_models(session, address):
        return
    body = {"lora_name": name, "lora_path": str(adapter.folder)}
    status, said = await _post(session, f"{address}/v1/load_lora_adapter", body)
    if status != 200:
        raise FailedPrecondition(
            f"the engine refuses {adapter.name} (HTTP {status}): {said[:500]}",
            {"adapter": adapter.name},
            reason_override="ADAPTER_REFUSED",
        )


async def unload_adapter(session: aiohttp.ClientSession, address: str, name: str) -> None:
    """Take it out of a running engine by its name there; one that is not there is well. Raises Unavailable."""
    status, said = await _post(session, f"{address}/v1/unload_lora_adapter", {"lora_name": name})
    if status not in (200, 404):
        raise Unavailable(f"the engine does not let {name} go (HTTP {status}): {said[:500]}")


async def unload_others(
    session: aiohttp.ClientSession, address: str, deployment: str, kept: Collection[str]
) -> list[str]:
    """Take out all of a deployment's adapters but those, by their names there; returns which. Raises Unavailable."""
    others = sorted(m for m in await list_models(session, address) if m.startswith(f"{deployment}:") and m not in kept)
    for name in others:
        await unload_adapter(session, address, name)
    return others


async def list_models(session: aiohttp.ClientSession, address: str) -> set[str]:
    """What the engine serves. Raises Unavailable."""
    try:
        async with session.get(f"{address}/v1/models", timeout=OWN_REQUEST) as response:
            return {str(card["id"]) for card in (await response.json())["data"]}
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
        raise Unavailable(f"the engine does not say what it serves: {error!r}") from None


async def _post(session: aiohttp.ClientSession, url: str, body: Mapping[str, str]) -> tuple[int, str]:
    try:
        async with session.post(url, json=body, timeout=OWN_REQUEST) as response:
            return response.status, await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise Unavailable(f"the engine went away while its adapters changed: {error!r}") from None
