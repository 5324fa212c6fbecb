"""The evaluation report: report.json for programs and one self-contained report.html for people.

report.json: {"version": 1, "title", "dataset", "prompts", "left_out": {reason: rows},
 "metrics": {name: meaning}, "titles": {name: words}, "less_is_better": [name],
 "columns": [{"label", "role", "answers": file, "seconds": {p50, p95}, "failures": {kind: rows},
              "groups": {group: {metric: {k (not of means), n, value, low, high}}}}],
   # in order: "baseline" (an earlier report), "reference" (other models), "target" (the one that is judged), "constrained"
 "paired": {metric: {difference, low, high, n}},           # the target minus the first column, on the same rows
 "pairs": [{"label", "metrics": {as paired}}],              # the target minus each other column
 "examples": [{id, question, asked (without AgentFabric's prefix), prompt, result, tools, expected, reference,
               answers: {label: text}, failed: [metric], failure, reason}],     # the worst rows first
 "suites": [{"name", "title", "prompts", "left_out", "columns", "paired", "pairs", "examples"}],     # BFCL beside a data set
 "latency": [{"label", requests, concurrency, first_token: {p50, p95}, …}],
 "gate": [as in the manifest's metadata]}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from services.evaluation.intervals import Estimate, Proportion, percentiles
from services.evaluation.metrics import (
    FAILURES,
    GROUPS,
    KINDS,
    METRICS,
    Score,
    score_answer,
)
from services.evaluation.questions import Answer, Question
from services.evaluation.summary import paired_difference, summarize
from services.evaluation.wire import strip_prompt

WORST = 50
ROLES = ("baseline", "reference", "target", "constrained")
MAIN_ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Column:
    """One model's answers; questions that it was not asked have none."""

    label: str
    questions: Sequence[Question]
    answers: Sequence[Answer]
    role: str = "target"
    file: str = MAIN_ANSWERS
    """Where the answers are, row by row."""

    @cached_property
    def by_id(self) -> Mapping[str, Answer]:
        """Answers by the ids of their questions."""
        return {answer.id: answer for answer in self.answers}

    @cached_property
    def scores(self) -> list[Score]:
        """One score an answer, in the questions' order."""
        return [score_answer(q, self.by_id[q.id]) for q in self.questions if q.id in self.by_id]


@dataclass(frozen=True)
class Section:
    """Columns of one suite of questions."""

    name: str
    title: str
    columns: Sequence[Column]
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Why rows are not asked → how many."""

    @property
    def target(self) -> Column:
        """The column that is judged."""
        return next((c for c in self.columns if c.role == "target"), self.columns[-1])


def render_json(
    sections: Sequence[Section],
    dataset: str,
    latency: Sequence[Mapping[str, Any]] = (),
    gate: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The report as plain JSON; see the module's docstring. The first section is the report's own, others are in `suites`."""
    return {
        "version": 1,
        "dataset": dataset,
        "metrics": {name: metric.meaning for name, metric in METRICS.items()},
        "titles": {name: metric.title for name, metric in METRICS.items()},
        "less_is_better": [name for name, metric in METRICS.items() if metric.less],
        **_section(sections[0]),
        "suites": [_section(section) for section in sections[1:]],
        "latency": list(latency),
        "gate": list(gate),
    }


def render_html(report: Mapping[str, Any]) -> str:
    """The report as one page without anything from outside."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(report=report, groups=GROUPS, kinds=list(KINDS))


def _section(section: Section) -> dict[str, Any]:
    target, others = section.target, [c for c in section.columns if c is not section.target]
    pairs = [{"label": c.label, "metrics": _paired(c, target)} for c in others]
    return {
        "name": section.name,
        "title": section.title,
        "prompts": sum(q.after is None for q in target.questions),
        "left_out": dict(section.left_out),
        "columns": [_column(c) for c in section.columns],
        "paired": pairs[0]["metrics"] if pairs and others[0].role != "constrained" else {},
        "pairs": pairs,
        "examples": _examples(section),
    }


def _column(column: Column) -> dict[str, Any]:
    groups = summarize(column.scores)
    failures = Counter(score.failure for score in column.scores if score.failed)
    return {
        "label": column.label,
        "role": column.role,
        "answers": column.file,
        "seconds": percentiles([answer.seconds for answer in column.by_id.values() if not answer.refused]),
        "failures": {kind: failures[kind] for kind in KINDS if failures[kind]},
        "groups": {g: {m: _plain(p) for m, p in metrics.items()} for g, metrics in groups.items()},
    }


def _plain(estimate: Estimate) -> dict[str, Any]:
    low, high = estimate.interval
    told = {"n": estimate.n, "value": round(estimate.value, 4), "low": round(low, 4), "high": round(high, 4)}
    return {"k": estimate.k, **told} if isinstance(estimate, Proportion) else told


def _paired(before: Column, after: Column) -> dict[str, dict[str, Any]]:
    found = {}
    for metric in METRICS:
        difference, low, high, n = paired_difference(before.scores, after.scores, metric)
        if n:
            found[metric] = {"difference": difference, "low": low, "high": high, "n": n}
    return found


def _examples(section: Section) -> list[dict[str, Any]]:
    """The rows on which the target does worst: those that miss most metrics first, of equals those that say less of the row's."""
    target = section.target
    by_id = {question.id: question for question in target.questions}
    bad = [score for score in target.scores if score.failed]
    bad.sort(key=lambda s: (-len(s.failed), s.marks["rouge_l"] or 0.0))
    return [_example(by_id[score.id], score, section.columns) for score in bad[:WORST]]


def _example(question: Question, score: Score, columns: Sequence[Column]) -> dict[str, Any]:
    after = question.after
    return {
        "id": question.id,
        "question": question.messages[-1]["content"],
        "asked": strip_prompt(question)[-1]["content"],
        "prompt": [dict(m) for m in question.messages],
        "result": after.observation if after else "",
        "tools": [t["function"]["name"] for t in question.tools],
        "expected": list(question.expected),
        "reference": question.reference,
        "answers": {c.label: _say(c.by_id[question.id]) for c in columns if question.id in c.by_id},
        "failed": list(score.failed),
        "failure": score.failure,
        "reason": score.reason if score.failure == FAILURES["exact_arguments"] else "",
    }


def _say(answer: Answer) -> str:
    """The text of an answer, with calls that the server has parsed as AgentFabric would have them; or its refusal."""
    if answer.refused:
        return f"[refused: {answer.refused}]"
    calls = [f"Action: {call['name']}\nAction Input: {call['arguments']}" for call in answer.calls or ()]
    return "\n".join([*([answer.text] if answer.text or not calls else []), *calls])
