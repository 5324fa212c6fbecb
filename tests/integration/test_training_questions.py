"""Questions that share a prompt, trained as if each had it to itself: ms-swift's own template and collator, a real model.

What a joined row gives is compared with the questions alone, each a row of its own: losses token by token, and gradients.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.training.presets import load_preset
from services.training.spec import Spec
from services.training.swift import PLUGIN, Family, Hardware, Paths, plan_sft
from tests.tiny_llama import CALL, SUMMARY

pytestmark = [pytest.mark.slow, pytest.mark.heavy]

SYSTEM = {"role": "system", "content": "You can use get_weather. " * 12}
ASKED = [("What is the weather in Paris?", CALL), ("What is a cloud?", SUMMARY), ("What now?", CALL), ("And?", SUMMARY)]
ROW = [SYSTEM, *({"role": role, "content": text} for qa in ASKED for role, text in zip(("user", "assistant"), qa))]  # noqa: B905
SCRIPT = """
import json, sys
from types import SimpleNamespace
import torch
from swift.model import get_processor
from swift.template import MaxLengthError, get_template
from transformers import AutoModelForCausalLM
sys.path.insert(0, sys.argv[2])
import swift_plugin, swift_questions as plugin
asked = json.load(sys.stdin)
row, dtype = asked["row"], getattr(torch, sys.argv[3])
template = get_template(get_processor(sys.argv[1], model_type="llama"), template_type="chatml", loss_scale="first_word",
                        max_length=512)
template.set_mode("train")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype).train()
trainer = SimpleNamespace(model=model, template=template, accelerator=SimpleNamespace(unwrap_model=lambda model: model))
plugin.IndependentQuestions(None, trainer).on_train_begin(None, None, None)
taken = []
apply = plugin.PartsAttention.apply
plugin.PartsAttention.apply = lambda *given: (taken.append(given[3]), apply(*given))[1]
def learn(rows):
    "(token, weight, loss) of what is trained, in one batch; and the gradient of all of it"
    taken.clear()
    batch = template.data_collator([template.encode(r, return_length=True) for r in rows])
    batch.pop("channel", None)
    labels, weights = batch.pop("labels"), batch.pop("loss_scale")
    model.zero_grad()
    logits = model(**batch).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    losses.sum().backward()
    kept = labels[:, 1:].flatten() != -100
    told = zip(labels[:, 1:].flatten()[kept].tolist(), weights[:, 1:].flatten()[kept].tolist(), losses[kept].tolist())
    gradient = torch.cat([p.grad.flatten().float() for p in model.parameters()])
    return {"told": sorted(told), "fast": len(taken), "length": batch["input_ids"].shape[1]}, gradient
alone = [{"messages": one} for one in plugin.split_questions(row)]
joined = {"messages": row, "channel": "independent"}
found, gradients = {}, {}
for name, rows in {"alone": alone, "joined": [joined], "padded": [joined, alone[0]], "conversation": [{"messages": row}],
                   "one": [{**alone[0], "channel": "independent"}]}.items():
    found[name], gradients[name] = learn(rows)
size = gradients["alone"].norm().item()
found["off"] = {name: (gradients[name] - gradients["alone"]).norm().item() / size for name in ("joined", "conversation")}
extra = learn([alone[0]])[1]
found["off"]["padded"] = (gradients["padded"] - extra - gradients["alone"]).norm().item() / size
template.max_length = found["joined"]["length"] - 1
try: template.encode(joined)
except MaxLengthError as error: found["too long"] = str(error)
import os
os.environ["FABRICTUNE_LOGIT_ADJUSTMENT"] = "1.5"
batch = {"input_ids": torch.tensor([[1, 2, 3]])}
before = model(**batch).logits
swift_plugin.LogitAdjustment(None, trainer).on_train_begin(None, None, None)
found["less"] = {int(i): round(v, 4) for i, v in enumerate((before - model(**batch).logits)[0, -1].tolist()) if v}
found["served"] = bool((model.eval()(**batch).logits == before).all())
found["word"] = template.tokenizer("Action: x").input_ids[0]
print("RESULT" + json.dumps(found))
"""


def _learn(model: Path, dtype: str) -> dict[str, Any]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "USE_HF": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    argv = [sys.executable, "-c", SCRIPT, str(model), str(PLUGIN.parent), dtype]
    asked = json.dumps({"row": ROW})
    done = subprocess.run(argv, input=asked, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.rsplit("RESULT", 1)[1])
    return found


@pytest.fixture(scope="module")
def learned(tiny_model: Path) -> dict[str, Any]:
    """What is learned from the row in float32."""
    return _learn(tiny_model, "float32")


def _same(one: list[list[float]], other: list[list[float]], within: float = 2e-4) -> bool:
    return len(one) == len(other) and all(a == pytest.approx(b, abs=within) for a, b in zip(one, other, strict=True))


def test_each_question_is_learned_as_if_it_had_the_prompt_to_itself(learned: dict[str, Any]) -> None:
    assert _same(learned["joined"]["told"], learned["alone"]["told"])
    assert learned["off"]["joined"] < 1e-4
    assert not _same(learned["conversation"]["told"], learned["alone"]["told"]), (
        "as one conversation it is another lesson"
    )
    assert learned["off"]["conversation"] > 1e-3


def test_the_prompt_is_computed_once(learned: dict[str, Any]) -> None:
    alone, joined = learned["alone"]["length"] * len(ASKED), learned["joined"]["length"]
    assert joined < alone / 2
    assert joined <= learned["conversation"]["length"], "what questions begin with in common is not repeated"
    assert learned["joined"]["fast"] == 2, "both layers multiplied parts only"


def test_a_joined_row_beside_another_one_is_learned_through_a_mask(learned: dict[str, Any]) -> None:
    assert learned["padded"]["fast"] == 0
    assert learned["off"]["padded"] < 1e-4
    assert len(learned["padded"]["told"]) > len(learned["joined"]["told"])


def test_a_single_question_is_a_row_like_any_other(learned: dict[str, Any]) -> None:
    assert learned["one"]["fast"] == 0
    assert all(any(a == pytest.approx(b, abs=2e-4) for b in learned["alone"]["told"]) for a in learned["one"]["told"])


def test_a_joined_row_that_is_too_long_is_refused_with_its_length(learned: dict[str, Any]) -> None:
    length = learned["joined"]["length"]
    assert learned["too long"] == f"Current length of row({length}) is larger than the max_length({length - 1})."


def test_the_call_s_first_word_has_the_adjustment_against_it_while_training_only(learned: dict[str, Any]) -> None:
    assert learned["less"] == {str(learned["word"]): 1.5}
    assert learned["served"]


def test_bfloat16_gives_the_same_to_its_precision(tiny_model: Path) -> None:
    found = _learn(tiny_model, "bfloat16")
    assert found["joined"]["fast"] == 2
    assert _same(found["joined"]["told"], found["alone"]["told"], within=0.1)
    assert found["off"]["joined"] < 0.05


def test_presets_say_it_to_the_child_by_plugin_and_environment() -> None:
    spec = Spec.model_validate(
        {"dataset": "datasets/d", "base_model": "models/m", "preset": "smollm2-cpu",
         "arguments": {"independent_questions": True, "logit_adjustment": 0.5}}
    )  # fmt: skip
    command = plan_sft(
        spec, load_preset(spec.preset), Paths(Path("m"), Path("w")), Hardware(), Family("llama", "chatml")
    )
    after = command.argv[command.argv.index("--external_plugins") + 1 :]
    assert "swift_questions.py" in [Path(word).name for word in after[:3]]
    assert {"fabrictune_questions", "fabrictune_logits"} <= set(command.argv)
    assert command.env["FABRICTUNE_LOGIT_ADJUSTMENT"] == "0.5"
    assert not any("logit_adjustment" in word or "independent_questions" in word for word in command.argv)
