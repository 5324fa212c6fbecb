"""The conversion worker: every row of every source is refused by name or converted, then dealt to train, validation and test.

Two passes, with rows on disk between them, so memory does not grow with the data: `reading` understands rows and puts them
into buckets of their seeded order, `planning` decides which go on and where, `writing` renders bucket after bucket. Both
passes use every core; the result is the same to the byte whatever their number.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.errors import InvalidData
from services.common.reporter import Progress, Reporter
from services.common.stage import Stage
from services.conversion.assembly import join_parts, join_rejects, place_refusal, write_report
from services.conversion.planning import make_plan, number_lines
from services.conversion.processes import Tell, count_processes, run_tasks
from services.conversion.reading import read_chunks, read_summary
from services.conversion.report import Report
from services.conversion.sources import CHUNK_BYTES, Chunk, cut_chunks, find_files, unpacked_bytes
from services.conversion.spec import Spec
from services.conversion.spill import TOOLS_BYTES, count_buckets
from services.conversion.writing import Plan, write_buckets


def run(spec: Spec, inputs: Mapping[str, Path], output: Path, reporter: Reporter) -> dict[str, Any]:
    """Convert the sources.

    inputs: "sources/0", "sources/1", …: folders or files; "tokenizer" when the spec names one; "shares/0", … when nodes have
    already read them.
    """
    work = _Work.plan(spec, inputs)
    scratch = output / ".work"
    scratch.mkdir()
    try:
        shares = [folder for role, folder in inputs.items() if role.startswith("shares/")]
        for folder in shares:
            # Linked: what is used up below stays whole where it came from.
            shutil.copytree(folder, scratch, copy_function=os.link, dirs_exist_ok=True)
        if not shares:
            share(spec, inputs, scratch, (0, 1), reporter)
        folders = sorted(scratch.glob("read-*"))
        plan, outcome, report = make_plan(spec, work.chunks, folders, work.buckets, str(inputs.get("tokenizer", "")))
        firsts = _write(plan, folders, scratch, work, report, reporter)
        before = number_lines(work.chunks, [read_summary(folder) for folder in folders])
        join_parts(scratch, firsts, output)
        join_rejects(folders, before, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for code, examples in report.examples.items():
        report.examples[code] = [place_refusal(told, before) for told in examples]
    told = outcome.to_json(report, spec.model_dump(mode="json", exclude={"resources"}), spec.tokenizer)
    write_report(told, output)
    for warning in outcome.warnings:
        reporter.log(warning, "WARNING")
    _judge(spec, report)
    reporter.log(
        f"{told['rows_in']} rows in, {told['rows_converted']} converted, {told['rows_rejected']} rejected, "
        f"{sum(told['rows_duplicate'].values())} duplicates, {told['rows_left_out']} left out; wrote {report.rows}"
    )
    keys = ("rows_in", "rows_converted", "rows_rejected", "rows_duplicate", "rows_left_out")
    return {key: told[key] for key in (*keys, "rejected_by_code", "rows_written", "rows_scored", "tools")}


def check(spec: Spec, inputs: Mapping[str, Path]) -> None:
    """Raises InvalidData when a source has no rows files."""
    _Work.plan(spec, inputs)


def share(spec: Spec, inputs: Mapping[str, Path], folder: Path, place: tuple[int, int], reporter: Reporter) -> None:
    """Do one node's part of the first pass. place: (this node, nodes). Leaves a folder "read-…" for each process."""
    node, nodes = place
    work = _Work.plan(spec, inputs)
    chunks = work.chunks[node::nodes]
    tasks = []
    tools_bytes = TOOLS_BYTES // (nodes * work.processes)
    for number in range(max(1, min(work.processes, len(chunks)))):
        target = folder / f"read-{node:04d}-{number:04d}"
        target.mkdir()
        tasks.append((spec, chunks[number :: work.processes], target, work.buckets, tools_bytes))
    run_tasks(read_chunks, tasks, _teller(reporter, "reading", 0))


@dataclass(frozen=True)
class _Work:
    """What there is to do: the same for whoever asks."""

    chunks: Sequence[Chunk]
    buckets: int
    processes: int
    """Of this node."""

    @classmethod
    def plan(cls, spec: Spec, inputs: Mapping[str, Path]) -> _Work:
        """From the sources' files."""
        files = [(n, f) for n, s in enumerate(spec.sources) for f in find_files(inputs[f"sources/{n}"], s.files)]
        chunks = cut_chunks(files)
        if spec.self_cognition.count:
            chunks.append(Chunk(len(chunks), len(spec.sources), "", "self-cognition"))
        size = unpacked_bytes(files)
        return cls(chunks, count_buckets(size), 1 if size < CHUNK_BYTES else count_processes())


def _write(
    plan: Plan, folders: Sequence[Path], scratch: Path, work: _Work, report: Report, reporter: Reporter
) -> list[int]:
    """Do the second pass; returns the first bucket of each part of the files, in order."""
    parts = min(work.processes, work.buckets)
    firsts = [number * work.buckets // parts for number in range(parts)]
    tasks = [
        (plan, range(first, end), folders, scratch)
        for first, end in zip(firsts, [*firsts[1:], work.buckets], strict=True)
    ]
    total = sum(plan.rows.values())
    for part in run_tasks(write_buckets, tasks, _teller(reporter, "writing", total)):
        report.add(part)
    return firsts


def _teller(reporter: Reporter, phase: str, total: int) -> Tell:
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        reporter.progress(Progress(unit="rows", step=done, total_steps=total, phase=phase))

    return tell


def _judge(spec: Spec, report: Report) -> None:
    rejected = sum(report.rejected.values())
    if not report.rows_in:
        raise InvalidData("the sources hold no rows")
    if not report.rows.get("train"):
        raise InvalidData(
            f"no row is left to train on: {rejected} of {report.rows_in} were rejected. {report.explain_rejects()}"
        )
    if rejected / report.rows_in > spec.max_reject_ratio:
        raise InvalidData(
            f"{rejected} of {report.rows_in} rows were rejected, more than max_reject_ratio {spec.max_reject_ratio:.0%} allows. "
            f"{report.explain_rejects()}"
        )


def _inputs(spec: Spec) -> dict[str, str]:
    tokenizer = {"tokenizer": spec.tokenizer} if spec.tokenizer else {}
    return {f"sources/{number}": source.uri for number, source in enumerate(spec.sources)} | tokenizer


STAGE: Stage[Spec] = Stage(
    kind="conversion",
    collection="conversionJobs",
    output_kind="dataset",
    output_collection="datasets",
    spec=Spec,
    inputs=_inputs,
    run=run,
    check=check,
    share=share,
)

if __name__ == "__main__":
    from services.common.worker import main

    main(STAGE)
