"""The conversion worker: reads every source, refuses or converts every row, splits by tool, writes the dataset.

Conversations are held in memory between the two passes (which tools stand together; then what is written), about as many
bytes as the sources have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from services.common.errors import InvalidData
from services.common.reporter import Progress, Reporter
from services.common.stage import Stage
from services.conversion.fabric import Example, language_of, render_rows, render_system, render_together
from services.conversion.mixture import (
    SPLITS,
    ToolGroups,
    add_distractors,
    assign_splits,
    fits_none,
    pick_count,
    pick_one,
    seeded,
    seeded_order,
)
from services.conversion.react import ROW_TOO_LONG, Refused, Tool, Turn, parse_system_prompt, parse_turn
from services.conversion.report import Report
from services.conversion.sources import RawRow, find_files, parse_row, read_rows
from services.conversion.spec import Source, Spec

EVERY = 500


@dataclass(frozen=True)
class _Row:
    """A row that has been understood."""

    id: str
    raw: RawRow
    source: Source
    tools: tuple[Tool, ...]
    rounds: tuple[tuple[str, Turn], ...]

    def __repr__(self) -> str:
        return f"{self.raw.source}:{self.id}:{self.raw.offset}"  # what seeded orders know it by


def run(spec: Spec, inputs: Mapping[str, Path], output: Path, reporter: Reporter) -> dict[str, Any]:
    """Convert the sources. inputs: "sources/0", "sources/1", …: folders or files."""
    report = Report()
    with (output / "rejects.jsonl").open("w", encoding="utf-8") as rejects:
        rows = list(_read_all(spec, inputs, report, rejects, reporter))
        splits = _split(spec, rows)
        with _Writer(output, report) as writer:
            for split in SPLITS:
                members = seeded_order([r for r in rows if splits[repr(r)] == split], spec.seed, "order")
                _write_split(spec, split, members, writer, report, rejects, reporter)
    report.converted = report.rows_in - sum(report.rejected.values())
    told = report.to_json(spec.model_dump(mode="json"))
    (output / "report.json").write_text(json.dumps(told, ensure_ascii=False, indent=1), encoding="utf-8")
    _judge(spec, report)
    reporter.log(
        f"{report.rows_in} rows in, {report.converted} converted, {told['rows_rejected']} rejected; wrote {dict(report.rows)}"
    )
    keys = ("rows_in", "rows_converted", "rows_rejected", "rejected_by_code", "rows_written", "rows_scored", "tools")
    return {key: told[key] for key in keys}


def _read_all(
    spec: Spec, inputs: Mapping[str, Path], report: Report, rejects: IO[str], reporter: Reporter
) -> Iterator[_Row]:
    for number, source in enumerate(spec.sources):
        path = inputs[f"sources/{number}"]
        taken = []
        for file in find_files(path, source.files):
            for raw in read_rows(file, file.name):
                report.rows_in += 1
                if report.rows_in % EVERY == 0:
                    reporter.progress(Progress(unit="rows", step=report.rows_in, phase="reading"))
                try:
                    taken.append(_understand(raw, source, spec.max_row_bytes))
                except Refused as refused:
                    rejects.write(_line(report.reject(raw, refused)))
        if source.count and len(taken) > source.count:
            left_out = seeded_order(taken, spec.seed, "count")[source.count :]
            report.rows_in -= len(left_out)  # not asked for, so neither converted nor rejected
            gone = {repr(r) for r in left_out}
            taken = [r for r in taken if repr(r) not in gone]
        for row in taken:
            report.sources[row.raw.source] += 1
            yield row
    reporter.progress(Progress(unit="rows", step=report.rows_in, total_steps=report.rows_in, phase="writing"))


def _understand(raw: RawRow, source: Source, max_bytes: int) -> _Row:
    conversation = parse_row(raw, max_bytes)
    tools = parse_system_prompt(conversation.system)
    rounds = tuple((query, parse_turn(answer, tools)) for query, answer in conversation.rounds)
    return _Row(conversation.id, raw, source, tools, rounds)


def _split(spec: Spec, rows: Sequence[_Row]) -> dict[str, str]:
    """Row → split."""
    groups, fixed = ToolGroups(), dict[str, set[str]]()
    for row in rows:
        if row.tools:
            groups.tie([t.name for t in row.tools])
    for row in rows:
        if row.tools and row.source.split != "auto":
            fixed.setdefault(groups.root(row.tools[0].name), set()).add(row.source.split)
    assigned = assign_splits(groups, fixed, spec.split.validation, spec.split.test, spec.seed)
    bare = {"auto": "train"}  # rows without tools cannot leak one
    return {
        repr(r): assigned[groups.root(r.tools[0].name)] if r.tools else bare.get(r.source.split, r.source.split)
        for r in rows
    }


def _write_split(
    spec: Spec, split: str, rows: Sequence[_Row], writer: _Writer, report: Report, rejects: IO[str], reporter: Reporter
) -> None:
    pool = list({t.name: t for row in rows for t in row.tools}.values())
    pool = seeded_order(pool, spec.seed, f"pool {split}")
    report.tools[split] = {t.name for t in pool}
    together = split == "train" and (spec.questions.max > 1 or spec.refusals.ratio > 0)
    asked = [r for r in rows if _is_single(r) and r.rounds[0][1].calls]
    waiting: list[_Row] = []
    for number, row in enumerate(rows):
        if number % EVERY == 0:
            reporter.progress(Progress(unit="rows", step=number, total_steps=len(rows), phase=f"writing {split}"))
        if not (together and _is_single(row)):
            _write_alone(spec, split, row, pool, writer, report, rejects)
            continue
        if waiting and not _may_join(waiting, row):
            _write_together(spec, waiting, pool, asked, writer, report)
            waiting = []
        waiting.append(row)
        if len(waiting) >= pick_count(spec.questions.min, spec.questions.max, spec.seed, "questions", waiting[0].id):
            _write_together(spec, waiting, pool, asked, writer, report)
            waiting = []
    if waiting:
        _write_together(spec, waiting, pool, asked, writer, report)


def _write_alone(
    spec: Spec, split: str, row: _Row, pool: Sequence[Tool], writer: _Writer, report: Report, rejects: IO[str]
) -> None:
    language = _language(spec, row)
    count = pick_count(spec.distractors.min, spec.distractors.max, spec.seed, "distractors", row.id)
    tools = add_distractors(row.tools, pool, count, spec.seed, row.id) if row.tools and count else list(row.tools)
    system = render_system(tools, _role(spec, row.id, language), language, spec.wording)
    layouts = ("split", "inline") if row.source.layout == "both" else (row.source.layout,)
    examples = [(layout, e) for layout in layouts for e in render_rows(layout, system, tools, row.rounds, language)]
    try:
        for _, example in examples:
            _check_length(spec, example)
    except Refused as refused:
        rejects.write(_line(report.reject(row.raw, refused)))
        return
    report.languages[language] += 1
    for _, turn in row.rounds:
        report.calls += bool(turn.calls)
        report.without_call += not turn.calls
    for number, (layout, example) in enumerate(examples):
        report.layouts[layout] += 1
        row_id = f"{row.id}/{number}" if len(examples) > 1 else row.id
        writer.write(split, row_id, row.raw.source, example, tools)


def _write_together(
    spec: Spec, rows: Sequence[_Row], pool: Sequence[Tool], asked: Sequence[_Row], writer: _Writer, report: Report
) -> None:
    """Several rows as questions of one: their tools side by side are each other's distractors."""
    first = rows[0]
    language = _language(spec, first)
    own = list({t.name: t for row in rows for t in row.tools}.values())
    wanted = pick_count(spec.distractors.min, spec.distractors.max, spec.seed, "distractors", first.id)
    tools = add_distractors(own, pool, max(0, wanted + 1 - len(own)), spec.seed, first.id)
    system = render_system(tools, _role(spec, first.id, language), language, spec.wording)
    rounds = [*(row.rounds[0] for row in rows), *_refusals(spec, first.id, len(rows), tools, asked)]
    rounds.sort(key=lambda r: seeded(spec.seed, "turn", first.id, r[0]))
    report.languages[language] += len(rows)
    report.calls += sum(bool(turn.calls) for _, turn in rounds)
    report.without_call += sum(not turn.calls for _, turn in rounds)
    report.layouts["together"] += 1
    messages = render_together(system, tools, rounds, language)
    writer.write("train", "+".join(r.id for r in rows), first.raw.source, Example(messages, None), tools)
    for row in rows:
        if seeded(spec.seed, "summary", row.id) % 10_000 < spec.summaries * 10_000:
            system = render_system(row.tools, _role(spec, row.id, language), language, spec.wording)
            for number, example in enumerate(render_rows("split", system, row.tools, row.rounds, language)):
                if example.expected is None:
                    report.layouts["split"] += 1
                    writer.write("train", f"{row.id}/{number}", row.raw.source, example, row.tools)


def _refusals(
    spec: Spec, row_id: str, questions: int, tools: Sequence[Tool], asked: Sequence[_Row]
) -> list[tuple[str, Turn]]:
    """Questions of other rows that none of these tools fits, each with a refusal as its answer."""
    # From none to twice as many as the ratio says: were it always the same number, a model could count instead of read.
    count = pick_count(0, round(2 * questions * spec.refusals.ratio), spec.seed, "refusals", row_id)
    found: list[tuple[str, Turn]] = []
    start = seeded(spec.seed, "refused", row_id)
    for step in range(min(len(asked), 200)):
        if len(found) == count:
            break
        other = asked[(start + step) % len(asked)]
        if fits_none(other.tools, tools):
            query = other.rounds[0][0]
            answers = _in_language(spec.refusals.answers, language_of(query))
            found.append((query, Turn(answer=pick_one(answers, spec.seed, row_id, query))))
    return found


def _is_single(row: _Row) -> bool:
    """Whether a row may share a prompt: one question, answered by a call or in plain words."""
    return len(row.rounds) == 1 and row.source.layout == "split" and bool(row.tools)


def _may_join(waiting: Sequence[_Row], row: _Row) -> bool:
    """Whether a row may share a prompt with those that wait: its question has one right answer there, and theirs too."""
    return all(fits_none(row.tools, other.tools) for other in waiting)


def _check_length(spec: Spec, example: Example) -> None:
    length = sum(len(m["content"]) for m in example.messages)
    if spec.max_row_characters and length > spec.max_row_characters:
        raise Refused(ROW_TOO_LONG, f"{length} characters after conversion")


def _language(spec: Spec, row: _Row) -> str:
    return spec.language if spec.language != "auto" else language_of(row.rounds[-1][0])


def _role(spec: Spec, row_id: str, language: str) -> str:
    return pick_one(_in_language(spec.instructions, language), spec.seed, "role", row_id)


def _in_language(texts: Sequence[str], language: str) -> Sequence[str]:
    """Those in the language; all when there are none."""
    return [text for text in texts if language_of(text) == language] or texts


def _judge(spec: Spec, report: Report) -> None:
    rejected = sum(report.rejected.values())
    if not report.rows_in:
        raise InvalidData("the sources hold no rows")
    if not report.rows["train"]:
        raise InvalidData(
            f"no row is left to train on: {rejected} of {report.rows_in} were rejected. {report.explain_rejects()}"
        )
    if rejected / report.rows_in > spec.max_reject_ratio:
        raise InvalidData(
            f"{rejected} of {report.rows_in} rows were rejected, more than max_reject_ratio {spec.max_reject_ratio:.0%} allows. "
            f"{report.explain_rejects()}"
        )


class _Writer:
    """The dataset's files; tools.jsonl has the same ids in the same order as the splits one after the other."""

    def __init__(self, output: Path, report: Report) -> None:
        self._report = report
        self._files = {split: (output / f"{split}.jsonl").open("w", encoding="utf-8") for split in SPLITS}
        self._tools = (output / "tools.jsonl").open("w", encoding="utf-8")

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (*self._files.values(), self._tools):
            file.close()

    def write(self, split: str, row_id: str, source: str, example: Example, tools: Sequence[Tool]) -> None:
        """One row, and its tools beside it."""
        self._files[split].write(_line({"id": row_id, "source": source, "messages": list(example.messages)}))
        beside: dict[str, Any] = {"id": row_id, "tools": [t.to_openai() for t in tools]}
        if example.expected is not None:
            beside["expected"] = list(example.expected)
            self._report.scored[split] += 1
        self._tools.write(_line(beside))
        self._report.rows[split] += 1


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _inputs(spec: Spec) -> dict[str, str]:
    return {f"sources/{number}": source.uri for number, source in enumerate(spec.sources)}


STAGE: Stage[Spec] = Stage(
    kind="conversion",
    collection="conversionJobs",
    output_kind="dataset",
    output_collection="datasets",
    spec=Spec,
    inputs=_inputs,
    run=run,
)

if __name__ == "__main__":
    from services.common.worker import main

    main(STAGE)
