"""Between the passes: what all processes found is added up, and it is decided which rows go on, where, and with what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.common.fabric import Tool
from services.conversion.mixture import SPLITS, ToolGroups, assign_splits
from services.conversion.reading import ASKED, POOL, Summary, read_summary
from services.conversion.report import EXAMPLES, Outcome, Report
from services.conversion.selection import find_duplicates, find_repeated_ids, leave_out
from services.conversion.sources import Chunk
from services.conversion.spec import Spec
from services.conversion.writing import Plan


def make_plan(
    spec: Spec, chunks: Sequence[Chunk], folders: Sequence[Path], buckets: int, tokenizer: str
) -> tuple[Plan, Outcome, Report]:
    """The plan of the second pass, what will have become of the rows, and the first pass's counts.

    Raises InvalidData when sources put a tool into two splits.
    """
    summaries = [read_summary(folder) for folder in folders]
    report = add_up(summaries)
    rows = {chunk: number for summary in summaries for chunk, number in summary.rows.items()}
    gone, exact = find_duplicates(spec, folders, rows, buckets)
    kept: Counter[int] = Counter()
    for chunk in chunks:
        kept[chunk.source] += rows.get(chunk.number, 0) - gone.count_in(chunk.number)
    left_out = leave_out(spec, folders, rows, kept, buckets, gone)
    splits = split_tools(spec, summaries)
    marks = gone.union(left_out)
    asked = [
        (each.query, each.tools)
        for each in sorted(a for s in summaries for a in s.asked)[:ASKED]
        if all(splits[tool.name] == "train" for tool in each.tools) and (each.chunk, each.number) not in marks
    ]
    repeated = bytes(find_repeated_ids(folders, rows, buckets).bits)
    plan = Plan(spec, rows, bytes(marks.bits), splits, draw_pools(summaries, splits), asked, tokenizer, repeated)
    by_split = {split: [name for name, where in splits.items() if where == split] for split in SPLITS}
    duplicates = {"exact": exact, "near": gone.count - exact}
    outcome = Outcome(duplicates, left_out.count, by_split, warn(spec, by_split))
    return plan, outcome, report


def add_up(summaries: Sequence[Summary]) -> Report:
    """The first pass's counts. Of the examples the first in place stay; their lines are still those of their chunks."""
    total = Report()
    for summary in summaries:
        total.add(summary.report)
        for code, examples in summary.report.examples.items():
            total.examples.setdefault(code, []).extend(examples)
    for code, examples in total.examples.items():
        total.examples[code] = sorted(examples, key=lambda e: (e["chunk"], e["line"]))[:EXAMPLES]
    return total


def split_tools(spec: Spec, summaries: Sequence[Summary]) -> dict[str, str]:
    """Tool → split. Raises InvalidData."""
    groups, fixed = ToolGroups(), dict[str, set[str]]()
    for summary in summaries:
        for pair in summary.groups:
            groups.tie(pair)
    for summary in summaries:
        for name, named in summary.fixed.items():
            fixed.setdefault(groups.root(name), set()).update(named)
    assigned = assign_splits(groups, fixed, spec.split.validation, spec.split.test, spec.seed)
    return {name: assigned[root] for name, root in sorted(groups.pairs())}


def draw_pools(summaries: Sequence[Summary], splits: Mapping[str, str]) -> dict[str, list[Tool]]:
    """Split → its tools among the first POOL, in seeded order."""
    first: dict[str, tuple[int, Tool]] = {}
    for summary in summaries:
        for place, tool in summary.pool:
            if tool.name not in first or place < first[tool.name][0]:
                first[tool.name] = place, tool
    pools: dict[str, list[Tool]] = {split: [] for split in SPLITS}
    for _, tool in sorted(first.values())[:POOL]:
        pools[splits[tool.name]].append(tool)
    return pools


def warn(spec: Spec, by_split: Mapping[str, Sequence[str]]) -> list[str]:
    """What a reader of the report ought to know."""
    warnings = []
    for split, part in (("test", spec.split.test), ("validation", spec.split.validation)):
        if part and not by_split[split]:
            warnings.append(
                f"no tool could be held out for {split}, of which {part:.0%} was asked: tools that are called in one row "
                f"are never separated, and here nearly all hang together. Name a source with `split: {split}` instead"
            )
    known = {name for names in by_split.values() for name in names}
    if missing := sorted({name for group in spec.equivalent_tools for name in group} - known):
        warnings.append(f"equivalent_tools names {', '.join(map(repr, missing))}, which no row has")
    return warnings


def number_lines(chunks: Sequence[Chunk], summaries: Sequence[Summary]) -> dict[int, int]:
    """Chunk → lines of its file before it."""
    lines = {chunk: number for summary in summaries for chunk, number in summary.lines.items()}
    before: dict[int, int] = {}
    last, total = "", 0
    for chunk in chunks:
        where = f"{chunk.source}:{chunk.path}"
        total = total if where == last else 0
        before[chunk.number], last = total, where
        total += lines.get(chunk.number, 0)
    return before
