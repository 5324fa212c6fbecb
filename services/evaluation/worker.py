"""The evaluation worker: asks, scores, compares with a baseline on the same rows, writes the report."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from services.common.errors import FailedPrecondition, InvalidData, InvalidSpec
from services.common.reporter import Progress, Reporter
from services.common.stage import Stage
from services.evaluation.ask import Address, Answer, Question, ask_all
from services.evaluation.gate import check_gate, raise_if_not_met
from services.evaluation.metrics import Score, score_answer, summarize
from services.evaluation.report import Column, render_html, render_json
from services.evaluation.spec import Spec, Target

ANSWERS = "answers.jsonl"


def run(spec: Spec, inputs: Mapping[str, Path], output: Path, reporter: Reporter) -> dict[str, Any]:
    """Evaluate one target. inputs: dataset, optionally baseline (an earlier report on the same rows)."""
    questions = read_questions(inputs["dataset"], spec.split, spec.limit)
    address = find_address(spec.target)
    reporter.log(f"asking {address.model} at {address.url} {len(questions)} questions")
    answers = asyncio.run(_ask(spec, questions, address, output, reporter))
    columns = [Column(spec.target.label or address.model, questions, answers)]
    if "baseline" in inputs:
        columns.insert(0, read_column(inputs["baseline"], questions))
    report = render_json(columns, title=f"{len(questions)} held-out questions ({spec.split})", dataset=spec.dataset)
    (output / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    (output / "report.html").write_text(render_html(columns, report), encoding="utf-8")
    measured = summarize(columns[-1].scores)["all"]
    values = {name: {"value": p.value, "k": p.k, "n": p.n} for name, p in measured.items()}
    return {"label": columns[-1].label, "metrics": values, "gate": check_gate(spec.gate, measured)}


def read_questions(dataset: Path, split: str, limit: int) -> list[Question]:
    """The rows of a split whose last turn is to be scored. Raises InvalidData naming the file and line."""
    known = {row["id"]: row for row in _read_lines(dataset / "tools.jsonl")}
    questions = []
    for row in _read_lines(dataset / f"{split}.jsonl"):
        beside = known.get(row["id"])
        if beside is None:
            raise InvalidData(f"{split}.jsonl has a row {row['id']!r} that tools.jsonl has not")
        if "expected" not in beside:
            continue
        turns = row["messages"]
        last = max(i for i, m in enumerate(turns) if m["role"] != "assistant")
        messages = [{"role": m["role"], "content": m["content"]} for m in turns[: last + 1]]
        questions.append(Question(row["id"], messages, beside["tools"], beside["expected"]))
    if not questions:
        raise InvalidData(
            f"the split {split!r} has no rows to score; convert with a larger split.{split}, or choose another one"
        )
    return questions[:limit] if limit else questions


def find_address(target: Target) -> Address:
    """Where the target answers. A revision is reached through the gateway, also while it takes no traffic."""
    if target.revision:
        gateway = os.environ.get("FABRICTUNE_GATEWAY_URL", "")
        if not gateway:
            raise FailedPrecondition(
                "FABRICTUNE_GATEWAY_URL does not say where the gateway is; give target.address instead"
            )
        _, deployment, _, revision = target.revision.split("/")
        token, ca_file = (os.environ.get(f"FABRICTUNE_{name}", "") for name in ("TOKEN", "CA_FILE"))
        return Address(f"{gateway.rstrip('/')}/v1", f"{deployment}@{revision}", token, ca_file)
    key = ""
    if target.api_key_variable:
        key = os.environ.get(target.api_key_variable, "")
        if not key:
            raise InvalidSpec(f"target.api_key_variable names {target.api_key_variable}, which is not set here")
    return Address(target.address, target.model, key)


def read_column(report: Path, questions: list[Question]) -> Column:
    """The last column of an earlier report, on the same rows. Raises InvalidData when a row has no answer there."""
    told = json.loads((report / "report.json").read_text(encoding="utf-8"))
    kept = {a["id"]: Answer(**a) for a in _read_lines(report / ANSWERS)}
    missing = [q.id for q in questions if q.id not in kept]
    if missing:
        raise InvalidData(
            f"the baseline has no answer to {len(missing)} of the rows, such as {missing[0]!r}: it was made on other rows"
        )
    return Column(told["columns"][-1]["label"], questions, [kept[q.id] for q in questions])


async def _ask(
    spec: Spec, questions: list[Question], address: Address, output: Path, reporter: Reporter
) -> list[Answer]:
    got: dict[str, Answer] = {}
    by_id = {q.id: q for q in questions}
    scores: list[Score] = []
    with (output / ANSWERS).open("w", encoding="utf-8") as kept:
        stream = ask_all(
            questions, address, concurrency=spec.concurrency, max_tokens=spec.max_tokens, temperature=spec.temperature
        )
        async for answer in stream:
            got[answer.id] = answer
            kept.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
            kept.flush()
            question = by_id[answer.id]
            scores.append(score_answer(answer.id, answer.text, answer.finish_reason, question.tools, question.expected))
            right = summarize(scores)["all"]["right_tool"]
            phase = f"right tool {right.k}/{right.n}"
            reporter.progress(Progress(unit="prompts", step=len(got), total_steps=len(questions), phase=phase))
    return [got[q.id] for q in questions]


def _read_lines(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError:
        raise InvalidData(
            f"there is no {file.name}; is this a folder that `fabrictune convert` or `evaluate` wrote?"
        ) from None
    except ValueError as error:
        raise InvalidData(f"{file.name} has a line that is not JSON: {error}") from None


def _inputs(spec: Spec) -> dict[str, str]:
    return {"dataset": spec.dataset, **({"baseline": spec.baseline} if spec.baseline else {})}


STAGE: Stage[Spec] = Stage(
    kind="evaluation",
    collection="evaluationJobs",
    output_kind="report",
    output_collection="reports",
    spec=Spec,
    inputs=_inputs,
    run=run,
    verdict=raise_if_not_met,
)

if __name__ == "__main__":
    from services.common.worker import main

    main(STAGE)
