"""Our merge against peft's merge_and_unload, bit by bit, on a small Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.merging.worker import STAGE
from tests.conftest import Recorder

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["plain", "patterns", "saved"],
)
def test_equal_to_peft(tmp_path: Path, reporter: Recorder, dtype: str, settings: dict[str, Any]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    wanted = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    get_peft_model(model, LoraConfig(**wanted)).save_pretrained(tmp_path / "adapter")
    found = {}
    for engine in ("stream", "peft"):
        output = tmp_path / engine
        output.mkdir()
        spec = STAGE.spec.model_validate({"base_model": "models/b", "adapter": "adapters/a", "engine": engine})
        STAGE.run(spec, {"base_model": tmp_path / "base", "adapter": tmp_path / "adapter"}, output, reporter)
        found[engine] = {k: v for f in output.glob("*.safetensors") for k, v in load_file(f).items()}
    assert found["stream"].keys() == found["peft"].keys()
    for name, tensor in found["peft"].items():
        assert torch.equal(found["stream"][name], tensor), name
    names = {f.name for f in (tmp_path / "stream").glob("model*")}
    assert names == {f.name for f in (tmp_path / "base").glob("model*")}
