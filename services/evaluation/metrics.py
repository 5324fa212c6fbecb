r"""Scoring of answers, one at a time, as AgentFabric would act on them.

An answer calls a tool when RolePlay finds a call in it: `re.findall(r'Action: (.+)\nAction Input: (.+)')`, of which only the
first is run (modelscope-agent 0.7.1, agents/role_play.py), or when the server says so (`tool_calls`). docs/evaluation.md tells
what each metric means and where its definition comes from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.common.pictures import find_pictures, find_shown
from services.evaluation.arguments import allow_only, find_mismatch
from services.evaluation.questions import Answer, Question
from services.evaluation.rouge import rouge_l
from services.evaluation.toolbench import Action, is_hallucinated, read_action, score_arguments

CALL = re.compile(r"Action: (.+)\nAction Input: (.+)")
STOPPED = frozenset({"stop", "tool_calls", "function_call"})
"""Reasons of the OpenAI API that mean the model came to an end by itself, or by a stop string."""


@dataclass(frozen=True)
class Metric:
    """What is measured; all values are from 0 to 1."""

    title: str
    meaning: str
    less: bool = False
    """Less is better."""
    graded: bool = False
    """Not only right or wrong."""


METRICS: Mapping[str, Metric] = {
    "calls": Metric("calls a tool", "of the questions that need a tool: the answer calls one"),
    "right_tool": Metric("the right tool", "of the questions that need a tool: the answer calls the right one"),
    "exact_arguments": Metric(
        "exact arguments", "of the questions that need a tool: right tool and equal arguments (BFCL's AST rules)"
    ),
    "parses": Metric("arguments parse", "of the answers that call a tool: the arguments are one strict JSON object"),
    "listed": Metric(
        "a listed tool", "of the answers that call a tool: the tool is one of those listed (1 minus hallucinated tools)"
    ),
    "stops": Metric("stops by itself", "of all answers: it ends by itself, with no more calls than are asked for"),
    "no_call": Metric("no call when none fits", "of the questions that no tool fits: the answer calls none"),
    "rouge_l": Metric(
        "Rouge-L after a result", "of the answers after a tool's result: Rouge-L against the row's", graded=True
    ),
    "pictures": Metric("shows the pictures", "of the answers after a result with pictures: all are shown as ![…](url)"),
    "stops_after_result": Metric(
        "stops after a result", "of the answers after a tool's result: it ends by itself, without another call"
    ),
    "plan_em": Metric("Plan.EM", "of all steps: calls where the row calls, answers where it answers (ModelScope)"),
    "act_em": Metric("Act.EM", "of the steps that call: the same tool is called (ModelScope)"),
    "avg_f1": Metric(
        "Avg.F1", "of the steps that call: F1 of the arguments, half for a name alone (ModelScope)", graded=True
    ),
    "hallu_rate": Metric("HalluRate", "of all steps: a tool is called that is not listed (ModelScope)", less=True),
}

# What went wrong with a step, the first that applies: mark that is False → words.
FAILURES: Mapping[str, str] = {
    "calls": "no call, though a tool fits",
    "no_call": "a call, though no tool fits",
    "listed": "calls a tool that is not listed",
    "right_tool": "calls another tool",
    "parses": "arguments are not JSON",
    "exact_arguments": "other arguments",
    "stops": "does not stop",
    "stops_after_result": "does not stop after a result",
    "pictures": "does not show a picture",
}
REFUSED = "refused by the server"
KINDS = (REFUSED, *FAILURES.values())
GROUPS = ("all", "one tool", "two tools", "three or more tools")


@dataclass(frozen=True)
class Score:
    """What one answer is worth."""

    id: str
    tools: int
    """How many tools its prompt lists."""
    marks: Mapping[str, float | None]
    """Metric → True, False, a part of 1, or None: it does not apply."""
    reason: str = ""
    """Why the arguments are not equal."""
    category: str = ""
    failed: tuple[str, ...] = field(default=(), compare=False)
    """Metrics that are missed, the first one first to be looked at."""
    refused: bool = False
    """There is no answer: the server has refused the question."""
    row: str = ""
    """Answers to the same prompt, and those after its results, hang together: see Question.row."""

    @property
    def failure(self) -> str:
        """The kind of failure, "" for none."""
        return REFUSED if self.refused else FAILURES[self.failed[0]] if self.failed else ""


def score_answer(question: Question, answer: Answer) -> Score:
    """Score one answer."""
    calls = find_calls(answer)
    marks: dict[str, float | None] = dict.fromkeys(METRICS)
    reason = ""
    if question.after is None:
        reason = _mark_call(marks, question, answer, calls)
    else:
        _mark_summary(marks, question, answer, calls)
    _mark_step(marks, question, answer)
    if answer.refused:
        # A question without an answer is failed, also where saying nothing would be right; it says nothing of too much.
        marks = {m: None if mark is None or METRICS[m].less else False for m, mark in marks.items()}
    failed = tuple(metric for metric in FAILURES if marks[metric] is False)
    tools, refused = len(question.tools), bool(answer.refused)
    return Score(question.id, tools, marks, reason, question.category, failed, refused, question.row)


def find_calls(answer: Answer) -> list[tuple[str, str]]:
    """(tool, arguments as text) of each call that an answer makes."""
    if answer.calls is not None:
        return [(str(call["name"]), str(call["arguments"])) for call in answer.calls]
    return CALL.findall(answer.text)


def parse_arguments(raw: str) -> dict[str, Any] | None:
    """Action Input as strict JSON; None unless it is one object."""
    try:
        parsed = json.loads(raw, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def pictures_shown(observation: str, answer: str) -> bool | None:
    """Whether an answer shows every picture of a tool's result as `![…](url)`. None: the result has none."""
    pictures = find_pictures(observation)
    return set(pictures) <= find_shown(answer) if pictures else None


def _ends(answer: Answer) -> bool:
    """Whether a model came to an end by itself: not by a limit, and not by "Observation:", which it may go on to invent."""
    return answer.finish_reason in STOPPED and not answer.stop_string


def _mark_call(
    marks: dict[str, float | None], question: Question, answer: Answer, calls: Sequence[tuple[str, str]]
) -> str:
    """Marks of an answer to a question; returns why the arguments are not equal."""
    expected, listed = question.expected, {t["function"]["name"]: t["function"] for t in question.tools}
    ends = _ends(answer) or (question.goes_on and bool(calls) and answer.finish_reason in STOPPED)
    marks["stops"] = ends and len(calls) <= max(1, len(expected))
    if calls:
        # RolePlay runs the first call only; where several are expected, all count.
        acted = calls if len(expected) > 1 else calls[:1]
        marks["parses"] = all(parse_arguments(raw) is not None for _, raw in acted)
        marks["listed"] = all(name in listed for name, _ in acted)
    if not expected:
        marks["no_call"] = not calls
        return ""
    marks["calls"] = bool(calls)
    acted = calls if len(expected) > 1 else calls[:1]
    marks["right_tool"] = sorted(name for name, _ in acted) == sorted(call["name"] for call in expected)
    problem = "no call"
    if marks["right_tool"]:
        problem = _compare_calls(acted, expected, listed)
    marks["exact_arguments"] = not problem
    return problem if marks["right_tool"] else ""


def _compare_calls(
    acted: Sequence[tuple[str, str]], expected: Sequence[Mapping[str, Any]], listed: Mapping[str, Any]
) -> str:
    """What is wrong with calls of the right tools, in whatever order; "" when each is an expected one."""
    left = list(acted)
    for wanted in expected:
        problems = [_compare_call(call, wanted, listed) for call in left if call[0] == wanted["name"]]
        if "" not in problems:
            return problems[0]
        left.remove(next(c for c in left if c[0] == wanted["name"] and not _compare_call(c, wanted, listed)))
    return ""


def _compare_call(call: tuple[str, str], wanted: Mapping[str, Any], listed: Mapping[str, Any]) -> str:
    arguments = parse_arguments(call[1])
    if arguments is None:
        return "the arguments are not one JSON object"
    schema = listed.get(wanted["name"], {}).get("parameters") or {}
    possible = wanted["possible"] if "possible" in wanted else allow_only(wanted["arguments"], schema)
    return find_mismatch(arguments, possible, schema)


def _mark_summary(
    marks: dict[str, float | None], question: Question, answer: Answer, calls: Sequence[tuple[str, str]]
) -> None:
    """Marks of what is said after a tool's result, where the row answers, too."""
    if question.expected or question.after is None:
        return
    marks["rouge_l"] = rouge_l(answer.text, question.reference)
    marks["stops_after_result"] = _ends(answer) and not calls
    marks["pictures"] = pictures_shown(question.after.observation, answer.text)


def _mark_step(marks: dict[str, float | None], question: Question, answer: Answer) -> None:
    """ModelScope's marks, of every step. Where several calls are expected, the first one counts: its rows have one."""
    calls = find_calls(answer) if answer.calls is not None else []
    action = Action(*calls[-1]) if calls else read_action("" if answer.calls is not None else answer.text)
    wanted = question.expected[0] if question.expected else None
    marks["plan_em"] = action.plan == ("finish" if wanted is None else "call")
    marks["hallu_rate"] = is_hallucinated(action, {t["function"]["name"] for t in question.tools})
    if wanted is not None:
        marks["act_em"] = action.name == wanted["name"]
        marks["avg_f1"] = score_arguments(action, wanted["name"], plain_arguments(wanted))


def plain_arguments(wanted: Mapping[str, Any]) -> Mapping[str, Any]:
    """An expected call's arguments as one would write them: of possible ones the first, without those that may be absent.

    Two of BFCL's own rows have parameters for which nothing is allowed; they are left out, too.
    """
    if "possible" not in wanted:
        return dict(wanted["arguments"])
    return {name: allowed[0] for name, allowed in wanted["possible"].items() if allowed and "" not in allowed}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
