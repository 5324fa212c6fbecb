"""Our merge against peft's merge_and_unload, bit by bit, over what adapters can be: drawn by hypothesis, on tiny models."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.reporter import Silent
from services.merging.worker import STAGE

pytestmark = pytest.mark.heavy

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPT2 = ("c_attn", "c_proj", "c_fc")


@dataclass(frozen=True)
class Case:
    """A base model and adapters for it. kind: "llama", "tied" (a Llama whose head is its embedding) or "gpt2" (Conv1D)."""

    kind: str
    dtype: str
    config: Mapping[str, Any]
    weights: tuple[float, ...] = ()
    combination: str = "linear"
    ranks: tuple[int, ...] = field(default=(4,))
    adapter_dtype: str = "float32"


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fabrictune-peft-") as folder:
        make_base.folder = Path(folder)  # type: ignore[attr-defined]
        yield Path(folder)


@cache
def make_base(kind: str, dtype: str) -> Path:
    """A model with random weights in several small shards."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder: Path = make_base.folder / f"{kind}-{dtype}"  # type: ignore[attr-defined]
    if kind == "gpt2":
        made: Any = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4))
    else:
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=kind == "tied",
        )  # fmt: skip
        made = LlamaForCausalLM(config)
    made.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="20KB")
    return folder


def make_adapter(case: Case, base: Path, folder: Path, rank: int, seed: int) -> None:
    """An adapter as training leaves it, every number of it random."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    adapted = get_peft_model(model, LoraConfig(**{"r": rank, "init_lora_weights": False, **case.config}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "modules_to_save" in name or "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    if case.adapter_dtype != "float32":
        adapted.to(getattr(torch, case.adapter_dtype))
    adapted.save_pretrained(folder)


def merge_with_peft(base: Path, adapters: list[Path], case: Case) -> Any:
    """The definition."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    adapted = PeftModel.from_pretrained(model, adapters[0], adapter_name="0", autocast_adapter_dtype=True)
    if case.weights:
        for i, folder in enumerate(adapters[1:], 1):
            adapted.load_adapter(folder, adapter_name=str(i), autocast_adapter_dtype=True)
        names = [str(i) for i in range(len(adapters))]
        adapted.add_weighted_adapter(names, list(case.weights), "mixed", combination_type=case.combination)
        adapted.set_adapter("mixed")
    return adapted.merge_and_unload(safe_merge=False)


def check(case: Case) -> None:
    import torch
    from safetensors.torch import load_file

    base = make_base(case.kind, case.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        adapters = [Path(scratch) / f"adapter-{i}" for i in range(len(case.ranks))]
        for i, folder in enumerate(adapters):
            make_adapter(case, base, folder, case.ranks[i], seed=i)
        spec: dict[str, Any] = {"base_model": "models/b", "adapter": "adapters/a"}
        inputs = {"base_model": base, "adapter": adapters[0]}
        if case.weights:
            told = [{"adapter": "adapters/a", "weight": w} for w in case.weights]
            spec = {"base_model": "models/b", "adapters": told, "combination": case.combination}
            inputs = {"base_model": base, **{f"adapters/{i}": folder for i, folder in enumerate(adapters)}}
        output = Path(scratch) / "out"
        output.mkdir()
        STAGE.run(STAGE.spec.model_validate(spec), inputs, output, Silent())
        model = merge_with_peft(base, adapters, case)
        wanted = model.state_dict()
        files = sorted(output.glob("*.safetensors"))
        found = {k: v for file in files for k, v in load_file(file).items()}
        assert [f.name for f in files] == [f.name for f in sorted(base.glob("*.safetensors"))]
        for name, tensor in found.items():
            assert tensor.dtype == wanted[name].dtype
            off = (tensor != wanted[name]).sum().item()
            assert torch.equal(tensor, wanted[name]), f"{name}: {off} of {tensor.numel()} numbers differ"
        tied = json.loads((output / "config.json").read_text()).get("tie_word_embeddings", case.kind != "llama")
        assert tied == model.config.tie_word_embeddings
        assert set(wanted) - set(found) <= ({"lm_head.weight"} if tied else set())
        index = output / "model.safetensors.index.json"
        if index.exists():
            assert json.loads(index.read_text())["weight_map"].keys() == found.keys()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(("llama", "tied", "gpt2")))
    names = GPT2 if kind == "gpt2" else LINEAR
    embedding = "wte" if kind == "gpt2" else "embed_tokens"
    targets = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    config: dict[str, Any] = {
        "lora_alpha": draw(st.integers(1, 33)),
        "fan_in_fan_out": kind == "gpt2" and draw(st.booleans()),
    }
    several = draw(st.booleans())
    use_dora = not several and draw(st.booleans())
    extra = (
        () if use_dora or several else draw(st.sampled_from(((), (embedding,), ("lm_head",), (embedding, "lm_head"))))
    )
    config["target_modules"] = [*targets, *extra]
    if not several:
        config |= {"use_dora": use_dora, "use_rslora": draw(st.booleans())}
        if not extra:
            config["modules_to_save"] = draw(st.sampled_from((None, ["lm_head"], [embedding], [embedding, "lm_head"])))
        if draw(st.booleans()):
            config["rank_pattern"] = {targets[0]: draw(st.integers(1, 12))}
    if draw(st.booleans()):
        config["alpha_pattern"] = {targets[-1]: draw(st.integers(1, 40))}
    dtype = draw(st.sampled_from(("float32", "bfloat16", "float16")))
    rank = draw(st.integers(1, 12))
    told: dict[str, Any] = {"adapter_dtype": draw(st.sampled_from(("float32", "bfloat16"))), "ranks": (rank,)}
    if several:
        combination = draw(st.sampled_from(("linear", "cat")))
        count = draw(st.integers(2, 3))
        ranks = [rank if combination == "linear" else draw(st.integers(1, 12)) for _ in range(count)]
        weights = [draw(st.sampled_from((1.0, 0.5, 0.3, -0.7, 2.0))) for _ in range(count)]
        told |= {"combination": combination, "ranks": tuple(ranks), "weights": tuple(weights)}
    return Case(kind, dtype, config, **told)


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::UserWarning")
@settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(case=cases())
def test_equal_to_peft(scratch: Path, case: Case) -> None:
    check(case)


EXPLICIT = {
    "all linear layers, rank 8": Case("llama", "bfloat16", {"target_modules": "all-linear"}, ranks=(8,)),
    "dora": Case("llama", "bfloat16", {"target_modules": "all-linear", "use_dora": True}, ranks=(8,)),
    "dora in float32": Case("llama", "float32", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora of Conv1D": Case(
        "gpt2", "bfloat16", {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}
    ),
    "a tied embedding and its head": Case("tied", "bfloat16", {"target_modules": ["embed_tokens", "lm_head"]}),
    "a tied head that is saved": Case(
        "tied", "bfloat16", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    ),
    "a tied embedding that is saved": Case(
        "tied", "float16", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    ),
    "two, linear": Case("llama", "bfloat16", {"target_modules": "all-linear"}, (0.7, -0.3), ranks=(8, 8)),
    "three, concatenated": Case("llama", "float32", {"target_modules": ["q_proj"]}, (1.0, 0.5, -2.0), "cat", (2, 5, 8)),
    "two, concatenated, as peft rounds them": Case(
        "llama", "bfloat16", {"target_modules": ["up_proj"]}, (1.0, 0.3), "cat", (5, 6)
    ),
    "one with a weight": Case("llama", "bfloat16", {"target_modules": ["q_proj"]}, (0.5,)),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", EXPLICIT.values(), ids=EXPLICIT.keys())
def test_equal_to_peft_where_it_matters(scratch: Path, case: Case) -> None:
    check(case)
