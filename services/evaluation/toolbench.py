"""ModelScope's metrics of ToolBench: Plan.EM, Act.EM, HalluRate and Avg.F1, one step at a time.

Source: modelscope/evalscope, evalscope/third_party/toolbench_static/eval.py (the same in ms-swift's agent documents). A step's
plan is to call a tool or to finish with an answer; AgentFabric has no tool `Finish`, so an answer without a call finishes. The
action is read leniently: after the last `Action:` and the last `Action Input:`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

ACTION, INPUT = "Action:", "Action Input:"


@dataclass(frozen=True)
class Action:
    """What a step does. name: "" when it finishes."""

    name: str
    arguments: str

    @property
    def plan(self) -> str:
        """Either "call" or "finish"."""
        return "call" if self.name else "finish"


def read_action(text: str) -> Action:
    """The last action of a text."""
    arguments = text.rpartition(INPUT)[2].strip() if INPUT in text else "{}"
    # "Action Input:" does not contain "Action:", so the last one is the tool's.
    name = text.rpartition(ACTION)[2].partition(INPUT)[0].strip() if ACTION in text else ""
    return Action(name, arguments)


def is_hallucinated(action: Action, listed: Collection[str]) -> bool:
    """Whether it calls a tool that the prompt does not list."""
    return bool(action.name) and action.name not in listed


def score_arguments(action: Action, name: str, arguments: Mapping[str, Any]) -> float:
    """F1 of an action's arguments, 0 for another tool or what is not JSON.

    An argument counts 1 when its value is equal, 1/2 when only its name is there: recall is the sum over the reference's
    arguments, precision over the action's. Without arguments in the reference: 1 for none, else 0.
    """
    if action.name != name:
        return 0.0
    try:
        given = json.loads(action.arguments)
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(given, dict):
        return 0.0
    if not arguments:
        return float(not given)
    matched = sum((1.0 if given[key] == value else 0.5) for key, value in arguments.items() if key in given)
    if not matched:
        return 0.0
    recall, precision = matched / len(arguments), matched / len(given)
    return 2 * recall * precision / (recall + precision)
