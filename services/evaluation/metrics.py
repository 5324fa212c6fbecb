r"""Scoring of tool calls, one answer at a time, as AgentFabric would act on it.

An answer calls a tool when RolePlay finds a call in it: `re.findall(r'Action: (.+)\nAction Input: (.+)')`, of which only the
first is run (modelscope-agent 0.7.1, agents/role_play.py). Arguments are compared by BFCL's AST rules (Berkeley Function
Calling Leaderboard v4): names exact, none unknown, required ones present, types strict but for an int where a number is
asked, strings without regard to case, blanks and `,./-_*^`. Each proportion comes with its 95 % Wilson interval.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.common.pictures import find_pictures, find_shown

CALL = re.compile(r"Action: (.+)\nAction Input: (.+)")
_IGNORED = re.compile(r"[\s,./\-_*^]")
Z95 = 1.959963984540054

# name → what it means; all are parts of 1, and more is better.
METRICS: Mapping[str, str] = {
    "calls": "of the questions that need a tool: the answer calls one",
    "right_tool": "of the questions that need a tool: the answer calls the right one",
    "exact_arguments": "of the questions that need a tool: right tool and equal arguments (BFCL's AST rules)",
    "parses": "of the answers that call a tool: the arguments are one strict JSON object",
    "listed": "of the answers that call a tool: the tool is one of those listed (1 minus hallucinated tools)",
    "stops": "of all answers: it ends by itself, with at most one call",
    "no_call": "of the questions that no tool fits: the answer calls none",
}
GROUPS = ("all", "one tool", "two tools", "three or more tools")


@dataclass(frozen=True)
class Score:
    """What one answer is worth. None: the metric does not apply to it."""

    id: str
    tools: int
    """How many tools its prompt lists."""
    marks: Mapping[str, bool | None]


@dataclass(frozen=True)
class Proportion:
    """k of n, with the 95 % Wilson interval (low, high). n == 0: nothing to measure, value 0."""

    k: int
    n: int

    @property
    def value(self) -> float:
        """K / n."""
        return self.k / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Source: Wilson 1927, score interval without continuity correction."""
        if not self.n:
            return 0.0, 1.0
        n, p, z = self.n, self.value, Z95
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


def score_answer(
    row_id: str,
    text: str,
    finish_reason: str,
    tools: Sequence[Mapping[str, Any]],
    expected: Sequence[Mapping[str, Any]],
) -> Score:
    """Score one answer. tools: OpenAI function objects of the prompt; expected: [{name, arguments}], [] when none fits."""
    calls = CALL.findall(text)
    name, raw = calls[0] if calls else ("", "")
    arguments = parse_arguments(raw) if calls else None
    listed = {t["function"]["name"]: t["function"] for t in tools}
    wanted = expected[0] if expected else None
    right = bool(calls) and wanted is not None and name == wanted["name"]
    marks: dict[str, bool | None] = {
        "calls": bool(calls) if wanted is not None else None,
        "right_tool": right if wanted is not None else None,
        "exact_arguments": None,
        "parses": arguments is not None if calls else None,
        "listed": name in listed if calls else None,
        "stops": finish_reason == "stop" and len(calls) <= 1,
        "no_call": not calls if wanted is None else None,
    }
    if wanted is not None:
        schema = listed.get(wanted["name"], {}).get("parameters", {})
        marks["exact_arguments"] = (
            right and arguments is not None and same_arguments(arguments, wanted["arguments"], schema)
        )
    return Score(row_id, len(tools), marks)


def pictures_shown(observation: str, answer: str) -> bool | None:
    """Whether an answer shows every picture of a tool's result as `![…](url)`. None: the result has none."""
    pictures = find_pictures(observation)
    return set(pictures) <= find_shown(answer) if pictures else None


def parse_arguments(raw: str) -> dict[str, Any] | None:
    """Action Input as strict JSON; None unless it is one object."""
    try:
        parsed = json.loads(raw, parse_constant=_refuse)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def same_arguments(given: Mapping[str, Any], wanted: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    """Whether a call's arguments equal the expected ones. schema: the tool's parameters.

    An argument that is expected but optional may be absent; one that is not expected may not be given.
    """
    required = set(schema.get("required", wanted))
    if not set(given) <= set(wanted) or not (required & set(wanted)) <= set(given):
        return False
    return all(same_value(given[key], wanted[key]) for key in given)


def same_value(given: Any, wanted: Any) -> bool:
    """BFCL's equality of two JSON values: the expected value's own type decides."""
    if isinstance(wanted, bool) or isinstance(given, bool):
        return isinstance(wanted, bool) and isinstance(given, bool) and given == wanted
    if isinstance(wanted, str):
        return isinstance(given, str) and _fold(given) == _fold(wanted)
    if isinstance(wanted, int):
        return isinstance(given, int) and given == wanted
    if isinstance(wanted, float):
        return isinstance(given, int | float) and math.isclose(given, wanted, rel_tol=1e-9)
    if isinstance(wanted, list):
        return isinstance(given, list) and len(given) == len(wanted) and all(map(same_value, given, wanted))
    if isinstance(wanted, dict):
        return (
            isinstance(given, dict)
            and set(given) == set(wanted)
            and all(same_value(given[k], wanted[k]) for k in wanted)
        )
    return given is wanted


def summarize(scores: Iterable[Score]) -> dict[str, dict[str, Proportion]]:
    """Group → metric → proportion."""
    scores = list(scores)
    return {
        group: {
            metric: _count(s.marks[metric] for s in scores if group == "all" or group_of(s.tools) == group)
            for metric in METRICS
        }
        for group in GROUPS
    }


def group_of(tools: int) -> str:
    """The group of a prompt by how many tools it lists."""
    return GROUPS[min(max(tools, 1), 3)]


def paired_difference(before: Sequence[Score], after: Sequence[Score], metric: str) -> tuple[float, float, float, int]:
    """(difference after - before, low, high, n) on the rows that both answered, with its 95 % interval.

    Source: the normal interval for a difference of paired proportions (Newcombe 1998, method 5 without correction).
    """
    first = {s.id: s.marks[metric] for s in before}
    pairs = [(first.get(s.id), s.marks[metric]) for s in after]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    n = len(both)
    if not n:
        return 0.0, 0.0, 0.0, 0
    gained = sum(b and not a for a, b in both)
    lost = sum(a and not b for a, b in both)
    difference = (gained - lost) / n
    half = Z95 * math.sqrt(max(gained + lost - (gained - lost) ** 2 / n, 0.0)) / n
    return difference, max(-1.0, difference - half), min(1.0, difference + half), n


def _count(marks: Iterable[bool | None]) -> Proportion:
    known = [mark for mark in marks if mark is not None]
    return Proportion(sum(known), len(known))


def _fold(text: str) -> str:
    return _IGNORED.sub("", text).lower().replace("'", '"')


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
