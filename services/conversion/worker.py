"""The conversion worker: reads every source, refuses or converts every row, splits by tool, writes the dataset.

Conversations are held in memory between the two passes (which tools stand together; then what is written), about as many
bytes as the sources have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from services.common.errors import InvalidData
from services.common.reporter import Progress, Reporter
from services.common.stage import Stage
from services.conversion.mixture import SPLITS, ToolGroups, assign_splits, seeded_order
from services.conversion.readers import READERS
from services.conversion.refusals import Refused
from services.conversion.report import Report
from services.conversion.sources import RawRow, decode_row, find_files, read_rows
from services.conversion.spec import Source, Spec
from services.conversion.writing import EVERY, DatasetWriter, Row


def run(spec: Spec, inputs: Mapping[str, Path], output: Path, reporter: Reporter) -> dict[str, Any]:
    """Convert the sources. inputs: "sources/0", "sources/1", …: folders or files."""
    report = Report()
    with DatasetWriter(spec, output, report) as writer:
        rows = list(_read_all(spec, inputs, report, writer, reporter))
        splits = _split(spec, rows)
        for split in SPLITS:
            members = seeded_order([r for r in rows if splits[repr(r)] == split], spec.seed, "order")
            writer.write_split(split, members, reporter)
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
    spec: Spec, inputs: Mapping[str, Path], report: Report, writer: DatasetWriter, reporter: Reporter
) -> Iterator[Row]:
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
                    writer.reject(raw, refused)
        if source.count and len(taken) > source.count:
            left_out = seeded_order(taken, spec.seed, "count")[source.count :]
            report.rows_in -= len(left_out)  # not asked for, so neither converted nor rejected
            gone = {repr(r) for r in left_out}
            taken = [r for r in taken if repr(r) not in gone]
        for row in taken:
            report.sources[row.raw.source] += 1
            yield row
    reporter.progress(Progress(unit="rows", step=report.rows_in, total_steps=report.rows_in, phase="writing"))


def _understand(raw: RawRow, source: Source, max_bytes: int) -> Row:
    row_id, tools, rounds, system = READERS[source.format](decode_row(raw.data, max_bytes))
    return Row(row_id or f"{raw.source}:{raw.line}", raw, source, tools, rounds, system)


def _split(spec: Spec, rows: Sequence[Row]) -> dict[str, str]:
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
