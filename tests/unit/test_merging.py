"""Merging without torch: the definition on small files, and everything that must be refused before a byte is written."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from services.common.errors import InvalidData, ResourceExhausted
from services.merging.adapter import read_adapter
from services.merging.folder import merge_folder
from services.merging.mixture import Mixture
from services.merging.worker import STAGE
from tests.conftest import Recorder

RNG = np.random.default_rng(0)
Q = "model.layers.0.self_attn.q_proj.weight"
Tensors = dict[str, np.ndarray[Any, Any]]


def write_base(folder: Path, dtype: Any = np.float32) -> Path:
    folder.mkdir()
    save_file(
        {Q: RNG.normal(size=(6, 4)).astype(dtype), "model.norm.weight": np.ones(4, dtype)}, folder / "a.safetensors"
    )
    save_file({"lm_head.weight": RNG.normal(size=(8, 4)).astype(dtype)}, folder / "b.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("base")
    return folder


def lora(rank: int = 2, rows: int = 6, columns: int = 4) -> Tensors:
    name = f"base_model.model.{Q.removesuffix('.weight')}"
    return {
        f"{name}.lora_A.weight": RNG.normal(size=(rank, columns)).astype(np.float32),
        f"{name}.lora_B.weight": RNG.normal(size=(rows, rank)).astype(np.float32),
    }


def write_adapter(folder: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    folder.mkdir()
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    save_file(lora() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def merged(tmp_path: Path, base: Path, adapter: Path) -> Tensors:
    output = tmp_path / "out"
    output.mkdir()
    merge_folder(base, Mixture([read_adapter(adapter)]), output)
    return {k: v for f in sorted(output.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 2), (True, 8 / np.sqrt(2))])
def test_the_definition(tmp_path: Path, dtype: Any, rslora: bool, scale: float) -> None:
    base, tensors = write_base(tmp_path / "base", dtype), lora()
    out = merged(tmp_path, base, write_adapter(tmp_path / "adapter", tensors, use_rslora=rslora))
    a, b = tensors.values()
    before = load_file(base / "a.safetensors")[Q]
    wanted = (before.astype(np.float32) + np.float32(scale) * (b @ a)).astype(dtype)
    assert out[Q].dtype == dtype
    np.testing.assert_array_equal(out[Q], wanted)


def test_everything_else_stays_byte_for_byte(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    merged(tmp_path, base, write_adapter(tmp_path / "adapter"))
    assert (tmp_path / "out/b.safetensors").read_bytes() == (base / "b.safetensors").read_bytes()
    before, after = (base / "a.safetensors").read_bytes(), (tmp_path / "out/a.safetensors").read_bytes()
    length = 8 + struct.unpack("<Q", before[:8])[0]
    assert before[:length] == after[:length]
    assert len(before) == len(after)
    assert before != after


def test_patterns_give_modules_their_own_alpha(tmp_path: Path) -> None:
    base, tensors = write_base(tmp_path / "base"), lora()
    out = merged(tmp_path, base, write_adapter(tmp_path / "adapter", tensors, alpha_pattern={"q_proj": 2}))
    a, b = tensors.values()
    np.testing.assert_array_equal(out[Q], load_file(base / "a.safetensors")[Q] + np.float32(1) * (b @ a))


def test_saved_modules_replace(tmp_path: Path) -> None:
    head = RNG.normal(size=(8, 4)).astype(np.float32)
    adapter = write_adapter(
        tmp_path / "adapter", {**lora(), "base_model.model.lm_head.weight": head}, modules_to_save=["lm_head"]
    )
    np.testing.assert_array_equal(merged(tmp_path, write_base(tmp_path / "base"), adapter)["lm_head.weight"], head)


def test_the_stage_carries_the_tokenizer(tmp_path: Path, reporter: Recorder) -> None:
    base, adapter, output = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter"), tmp_path / "out"
    (adapter / "tokenizer.json").write_text("adapter's")
    output.mkdir()
    spec = STAGE.spec.model_validate({"base_model": "models/b", "adapter": "adapters/a"})
    told = STAGE.run(spec, {"base_model": base, "adapter": adapter}, output, reporter)
    assert (output / "tokenizer.json").read_text() == "adapter's"
    assert (output / "config.json").exists()
    assert not (output / "adapter_config.json").exists()
    assert told["merged_tensors"] == 1


@pytest.mark.parametrize(
    ("config", "tensors", "named"),
    [
        ({"use_dora": True}, None, "no lora_magnitude_vector"),
        ({"bias": "all"}, None, "bias"),
        ({"peft_type": "IA3"}, None, "peft_type"),
        ({}, {"base_model.model.x.lora_A.weight": np.ones((2, 4), np.float32)}, "lora_A only"),
        ({}, {"something.weight": np.ones(2, np.float32)}, "something.weight"),
        ({}, {k: np.full_like(v, np.nan) for k, v in lora().items()}, "NaN"),
        ({}, {}, "no LoRA matrices"),
    ],
)
def test_adapters_that_cannot_be_merged(
    tmp_path: Path, config: dict[str, Any], tensors: Tensors | None, named: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    with pytest.raises(InvalidData) as refused:
        read_adapter(adapter)
    assert named in f"{refused.value} {refused.value.violations}"


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="another base model") as refused:
        merged(tmp_path, write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter", lora(rows=5)))
    assert "(6, 4) in the base model, (5, 4)" in refused.value.violations[0].description
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "text"])
def test_broken_weights(tmp_path: Path, damage: str) -> None:
    base = write_base(tmp_path / "base")
    file = base / "a.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {"truncated": whole[:-8], "header": b"\xff" * 8 + whole[8:], "empty": b"", "text": b"{}" * 99}[damage]
    )
    with pytest.raises(InvalidData, match=r"a\.safetensors"):
        merged(tmp_path, base, write_adapter(tmp_path / "adapter"))


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InvalidData) as refused:
        read_adapter(adapter)
    assert "pickled and never read" in str(refused.value.violations)


def test_a_full_disk_is_said_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceExhausted, match="needs"):
        merged(tmp_path, write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter"))
    assert not list((tmp_path / "out").iterdir())
