"""Merging without torch: the definition on small files, and everything that must be refused before a byte is written."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file

from services.common.base_models import CHATML
from services.common.errors import DataLoss, FailedPrecondition, InvalidData, ResourceExhausted
from services.common.manifests import File, digest_of_files
from services.merging import blas, rounding
from services.merging.adapter import read_adapter
from services.merging.folder import merge_folder
from services.merging.mixture import Mixture
from services.merging.swift_engine import plan_swift
from services.merging.verify import verify
from services.merging.worker import STAGE
from tests.conftest import ROOT, Recorder
from tests.merging_files import RNG, Q, Tensors, lora, write_adapter, write_base


def merged(tmp_path: Path, base: Path, *adapters: Path, **options: Any) -> Tensors:
    output = tmp_path / "out"
    output.mkdir()
    merge_folder(base, Mixture([read_adapter(adapter) for adapter in adapters], **options), output)
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


def run_stage(inputs: Mapping[str, Path], output: Path, reporter: Recorder, **spec: Any) -> Mapping[str, Any]:
    output.mkdir()
    told = {"base_model": "models/b", **({} if "adapters" in spec else {"adapter": "adapters/a"}), **spec}
    return STAGE.run(STAGE.spec.model_validate(told), inputs, output, reporter)


def test_the_stage_carries_tokenizer_and_generation_config(tmp_path: Path, reporter: Recorder) -> None:
    base, adapter, output = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter"), tmp_path / "out"
    (adapter / "tokenizer.json").write_text("adapter's")
    told = run_stage({"base_model": base, "adapter": adapter}, output, reporter)
    assert (output / "tokenizer.json").read_text() == "adapter's"
    assert (output / "config.json").read_text() == (base / "config.json").read_text()
    assert (output / "generation_config.json").read_text() == '{"temperature": 0.5}'
    assert not (output / "adapter_config.json").exists()
    assert told["merged_tensors"] == 1
    files = [File(f.name, f.stat().st_size, hashlib.sha256(f.read_bytes()).hexdigest()) for f in weights_of(output)]
    assert told["weights_digest"] == digest_of_files(files)


def weights_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("asked", "found"),
    [("", "adapter's {{ x }}"), ("base", "base's {{ x }}"), ("my {{ x }}", "my {{ x }}"), ("chatml", CHATML)],
)
def test_the_chat_template_is_the_one_that_was_asked_for(
    tmp_path: Path, reporter: Recorder, asked: str, found: str
) -> None:
    base, adapter, output = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter"), tmp_path / "out"
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": "base's {{ x }}", "eos_token": "</s>"}))
    (adapter / "chat_template.jinja").write_text("adapter's {{ x }}")
    run_stage({"base_model": base, "adapter": adapter}, output, reporter, chat_template=asked)
    assert (output / "chat_template.jinja").read_text() == found
    config = json.loads((output / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "</s>"
    assert ("chat_template" in config) == (asked == "")  # one place only, once another one was asked for


def test_dora_scales_to_its_magnitudes(tmp_path: Path) -> None:
    tensors, magnitude = lora(), RNG.uniform(1, 2, 6).astype(np.float32)
    a, b = tensors.values()
    name = f"base_model.model.{Q.removesuffix('.weight')}.lora_magnitude_vector"
    adapter = write_adapter(tmp_path / "adapter", {**tensors, name: magnitude}, use_dora=True)
    base = write_base(tmp_path / "base")
    total = load_file(base / "a.safetensors")[Q].astype(np.float64) + 4 * (b.astype(np.float64) @ a)
    wanted = magnitude[:, None] * total / np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(merged(tmp_path, base, adapter)[Q], wanted, rtol=1e-5)


def test_a_transposed_weight_takes_the_transposed_difference(tmp_path: Path) -> None:
    tensors = lora(rows=4, columns=6)  # of a Conv1D with 6 inputs and 4 outputs, whose weight is (6, 4)
    a, b = tensors.values()
    base = write_base(tmp_path / "base")
    found = merged(tmp_path, base, write_adapter(tmp_path / "adapter", tensors, fan_in_fan_out=True))[Q]
    np.testing.assert_allclose(found, load_file(base / "a.safetensors")[Q] + 4 * (b @ a).T, rtol=1e-5)


def test_lora_on_a_tied_head_changes_the_embedding(tmp_path: Path) -> None:
    tensors, base = lora(rows=8, weight="lm_head.weight"), write_base(tmp_path / "base", tied=True)
    a, b = tensors.values()
    found = merged(tmp_path, base, write_adapter(tmp_path / "adapter", tensors))
    name = "model.embed_tokens.weight"
    assert "lm_head.weight" not in found
    np.testing.assert_allclose(found[name], load_file(base / "b.safetensors")[name] + 4 * (b @ a), rtol=1e-5)


def test_a_saved_head_is_untied_from_the_embedding(tmp_path: Path, reporter: Recorder) -> None:
    head = RNG.normal(size=(8, 4)).astype(np.float32)
    tensors = {**lora(), "base_model.model.lm_head.weight": head}
    adapter = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["lm_head"])
    base, output = write_base(tmp_path / "base", tied=True), tmp_path / "out"
    files = {"model.norm.weight": "a.safetensors", Q: "a.safetensors", "model.embed_tokens.weight": "b.safetensors"}
    index = {"metadata": {"total_size": 1000}, "weight_map": files}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    run_stage({"base_model": base, "adapter": adapter}, output, reporter)
    found = load_file(output / "b.safetensors")
    np.testing.assert_array_equal(found["lm_head.weight"], head)
    before = load_file(base / "b.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], before)
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    told = json.loads((output / "model.safetensors.index.json").read_text())
    assert told["weight_map"] == {**files, "lm_head.weight": "b.safetensors"}
    assert told["metadata"]["total_size"] == 1000 + head.nbytes


@pytest.mark.parametrize("combination", ["linear", "cat"])
def test_several_adapters_are_one(tmp_path: Path, reporter: Recorder, combination: str) -> None:
    made = [lora(), lora()]
    adapters = [write_adapter(tmp_path / f"adapter-{i}", tensors, lora_alpha=4) for i, tensors in enumerate(made)]
    base, output = write_base(tmp_path / "base"), tmp_path / "out"
    (a1, b1), (a2, b2) = ([m.astype(np.float64) for m in tensors.values()] for tensors in made)
    before = load_file(base / "a.safetensors")[Q]
    if combination == "cat":
        wanted = before + 0.5 * 2 * (b1 @ a1) - 0.25 * 2 * (b2 @ a2)
    else:  # peft's: the square roots of the weights go to both sides, so there are cross terms
        a, b = np.sqrt(1.0) * a1 - np.sqrt(0.5) * a2, np.sqrt(1.0) * b1 + np.sqrt(0.5) * b2
        wanted = before + b @ a
    inputs = {"base_model": base, "adapters/0": adapters[0], "adapters/1": adapters[1]}
    named = [{"adapter": "adapters/x", "weight": 0.5}, {"adapter": "adapters/y", "weight": -0.25}]
    told = run_stage(inputs, output, reporter, adapters=named, combination=combination)
    np.testing.assert_allclose(load_file(output / "a.safetensors")[Q], wanted, rtol=1e-4, atol=1e-6)
    assert told["adapters"] == named


def test_adapters_that_cannot_be_one_are_named(tmp_path: Path) -> None:
    adapters = [write_adapter(tmp_path / "x"), write_adapter(tmp_path / "y", lora(rank=3), r=3, use_rslora=True)]
    with pytest.raises(InvalidData, match="merged together") as refused:
        Mixture([read_adapter(a) for a in adapters], (1.0, 1.0))
    assert "adapter_config.json use_rslora" in str(refused.value)
    ranks = [write_adapter(tmp_path / "v"), write_adapter(tmp_path / "w", lora(rank=3), r=3)]
    with pytest.raises(InvalidData, match='use the combination "cat"'):
        Mixture([read_adapter(a) for a in ranks], (1.0, 1.0))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "give either adapter or adapters"),
        ({"adapter": "adapters/a", "adapters": [{"adapter": "adapters/b"}]}, "give either adapter or adapters"),
        ({"adapters": [{"adapter": "adapters/b"}], "engine": "swift"}, "engine swift merges one adapter"),
        ({"adapter": "adapters/a", "engine": "peft", "stream": True}, "only the engine stream"),
        ({"adapter": "adapters/a", "chat_template": "agentfabic"}, "neither base, chatml, nor the text"),
        ({"adapters": [{"adapter": "adapters/b", "weight": 0}]}, "all weights are 0"),
    ],
)
def test_specs_that_cannot_be_meant(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        STAGE.spec.model_validate({"base_model": "models/b", **spec})


def test_the_merge_does_not_depend_on_how_numpy_sums() -> None:
    a, b = RNG.normal(size=(40, 50)).astype(np.float32), RNG.normal(size=(33, 40)).astype(np.float32)
    wanted = np.zeros((33, 50), np.float32)
    for k in range(40):  # a product of two float32 is exact in float64
        wanted = (np.multiply(b[:, k : k + 1], a[k], dtype=np.float64) + wanted).astype(np.float32)
    np.testing.assert_array_equal(blas.multiply(b, a), wanted)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_rounding_is_to_nearest_even(dtype: Any) -> None:
    bits = RNG.integers(0, 2**32, 20_000, dtype=np.uint32)
    values = np.concatenate(
        [bits.view(np.float32), np.array([0, -0.0, 1, 1 + 2**-8, 1 + 3 * 2**-8, 65519, 65520], np.float32)]
    )
    values = values[np.isfinite(values)]
    with np.errstate(over="ignore"):
        wanted = values.astype(dtype)
        found = rounding.narrow(values.copy(), np.dtype(dtype))
    np.testing.assert_array_equal(found.view(np.uint8), wanted.view(np.uint8))
    np.testing.assert_array_equal(
        rounding.widen(found), wanted.astype(np.float64 if dtype is np.float64 else np.float32)
    )
    assert rounding.is_finite(found) == bool(np.isfinite(wanted.astype(np.float64)).all())


@pytest.mark.parametrize(
    ("config", "tensors", "named"),
    [
        ({"use_dora": True}, None, "no lora_magnitude_vector"),
        ({"bias": "all"}, None, "adapter_config.json bias"),
        ({"lora_bias": True}, None, "adapter_config.json lora_bias"),
        ({"trainable_token_indices": [1]}, None, "adapter_config.json trainable_token_indices"),
        ({"target_parameters": ["experts"]}, None, "adapter_config.json target_parameters"),
        ({"init_lora_weights": "pissa"}, None, "adapter_config.json init_lora_weights"),
        ({"use_something_new": {"x": 1}}, None, "adapter_config.json use_something_new"),
        ({"r": 0}, None, "the rank must be above 0"),
        ({"r": 3}, None, "has rank 2, and adapter_config.json says 3"),
        ({}, lora(rank=0), "ranks do not fit or are 0"),
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


def test_a_folder_without_an_adapter_config(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(InvalidData, match=r"adapter is no adapter: there is no adapter_config\.json"):
        read_adapter(adapter)


@pytest.mark.parametrize("damage", ["truncated", "longer", "header", "empty", "text"])
@pytest.mark.parametrize("which", ["base/a.safetensors", "adapter/adapter_model.safetensors"])
def test_broken_weights(tmp_path: Path, damage: str, which: str) -> None:
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    file = tmp_path / which
    whole = file.read_bytes()
    broken = {"truncated": whole[:-8], "longer": whole + b"1234", "header": b"\xff" * 8 + whole[8:], "empty": b""}
    file.write_bytes({**broken, "text": b"{}" * 99}[damage])
    with pytest.raises(InvalidData, match=file.name.replace(".", r"\.")):
        merged(tmp_path, base, adapter)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (Q, f"{Q} has NaN"),
        ("lm_head.weight", "lm_head.weight has NaN"),
        ("model.norm.weight", "model.norm.weight has NaN"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_base_with_nan_or_infinity(tmp_path: Path, weight: str, said: str, value: float) -> None:
    base = write_base(tmp_path / "base", ml_dtypes.bfloat16, fill={weight: value})
    with pytest.raises(InvalidData, match=said):
        merged(tmp_path, base, write_adapter(tmp_path / "adapter"))


def test_a_sum_that_overflows(tmp_path: Path) -> None:
    tensors = {name: values * np.float32(1e3) for name, values in lora().items()}
    with pytest.raises(InvalidData, match=f"{Q} would have NaN or infinite"):
        merged(tmp_path, write_base(tmp_path / "base", np.float16), write_adapter(tmp_path / "adapter", tensors))


def test_a_quantized_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", np.int8)
    with pytest.raises(InvalidData, match="is the base quantized"):
        merged(tmp_path, base, write_adapter(tmp_path / "adapter"))


def test_what_was_written_is_checked_against_the_definition(tmp_path: Path) -> None:
    base, mixture = write_base(tmp_path / "base"), Mixture([read_adapter(write_adapter(tmp_path / "adapter"))])
    output = tmp_path / "out"
    output.mkdir()
    plan = merge_folder(base, mixture, output).plan

    def read(folder: Path) -> Callable[[str, int, int], bytes]:
        return lambda file, begin, end: (folder / file).read_bytes()[begin:end]

    sizes = {file.name: file.stat().st_size for file in weights_of(output)}
    verify(plan, mixture, read(base), read(output), sizes)
    with pytest.raises(DataLoss, match="not written as the definition says"):
        verify(plan, mixture, read(base), read(base), sizes)


def test_a_disk_that_becomes_full_leaves_nothing(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", rows=60_000)
    adapter = write_adapter(tmp_path / "adapter", lora(rows=60_000))
    code = (
        "import resource, sys; from pathlib import Path; from fabrictune import local; from tests.toy.listener import Quiet\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"  # a write beyond it fails, as on a full disk
        "spec = {'base_model': 'models/b', 'adapter': 'adapters/a'}\n"
        "inputs = {'base_model': Path(sys.argv[1]), 'adapter': Path(sys.argv[2])}\n"
        "try: local.run_stage('merging', spec, inputs, Path(sys.argv[3]), Quiet())\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    argv = [sys.executable, "-c", code, str(base), str(adapter), str(tmp_path / "out")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "ResourceExhausted writing a.safetensors failed: File too large" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


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


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_the_engine_swift_refuses_a_base_with_code_of_its_own(tmp_path: Path, file: str) -> None:
    base = write_base(tmp_path / "base", np.float32)
    told = json.loads((base / file).read_text()) if (base / file).exists() else {}
    (base / file).write_text(json.dumps({**told, "auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    with pytest.raises(FailedPrecondition, match=f"auto_map in {file}.*swift export would run"):
        plan_swift(base, tmp_path / "adapter", tmp_path / "out")
