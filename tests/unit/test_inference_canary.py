from __future__ import annotations

from pathlib import Path

import pytest

from services.common.errors import FailedPrecondition, InvalidData, InvalidSpec
from services.inference.adapters import Adapter, check_base, largest_rank, read_rank
from services.inference.canary import judge, share
from services.inference.engine import Model
from services.inference.outcomes import Figures
from services.inference.spec import Canary, parse_canary, parse_spec

MODEL = Model("models/m", "d1", Path(), {"hidden_size": 64, "num_hidden_layers": 2}, 0)


@pytest.mark.parametrize(
    ("candidate", "stable", "words"),
    [
        (Figures(19, 0, 9.0), Figures(100, 0, 0.1), ""),
        (Figures(20, 0, 0.2), Figures(100, 0, 0.1), ""),
        (Figures(20, 0, 0.3), Figures(100, 0, 0.1), "3 times|2 times as long"),
        (Figures(20, 0, 0.3), Figures(3, 0, 0.1), ""),
        (Figures(1, 1, 0.0), Figures(100, 0, 0.1), "1 of its 1 answers failed"),
        (Figures(100, 2, 0.1), Figures(100, 0, 0.1), ""),
        (Figures(100, 3, 0.1), Figures(100, 0, 0.1), "3 of its 100 answers failed"),
    ],
)
def test_a_candidate_is_judged_by_failures_and_by_its_first_byte(
    candidate: Figures, stable: Figures, words: str
) -> None:
    found = judge(Canary(), candidate, stable)
    assert bool(found) == bool(words) and (not words or any(w in found for w in words.split("|")))


def test_what_is_left_of_the_traffic_keeps_its_proportions() -> None:
    assert share({"a": 67, "b": 33}, 90) == {"a": 61, "b": 29}


def test_every_wrong_field_of_a_canary_is_named_at_once() -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_canary({"steps": [50, 10], "max_error_rate": 2})
    assert [v.field for v in caught.value.violations] == ["canary.steps", "canary.max_error_rate"]


@pytest.mark.parametrize(
    ("bases", "shapes", "words"),
    [
        ({"models/o": "d2"}, {}, "was trained on models/o"),
        ({}, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (8, 32)}, "reads 32 numbers"),
        ({}, {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": (8, 64)}, "has a layer 7"),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    bases: dict[str, str], shapes: dict[str, tuple[int, ...]], words: str
) -> None:
    with pytest.raises(FailedPrecondition, match=words) as caught:
        check_base(Adapter("adapters/a", "x", Path(), 8, bases, shapes), MODEL)
    assert caught.value.reason_override == "ADAPTER_OF_ANOTHER_BASE"


def test_what_vllm_cannot_load_is_refused_with_all_reasons() -> None:
    with pytest.raises(InvalidData, match=r"use_dora is True; modules_to_save .* rank is 1000"):
        read_rank('{"r": 1000, "use_dora": true, "modules_to_save": ["lm_head"]}', "adapters/a")
    assert largest_rank(None, []) == 16 and largest_rank(20, []) == 32


def test_more_adapters_than_there_is_room_for_are_refused() -> None:
    with pytest.raises(InvalidSpec):
        parse_spec({"model": "models/m", "adapters": ["adapters/a", "adapters/b"], "lora": {"max_adapters": 1}})
