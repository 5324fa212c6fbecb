"""One conversion in a process of its own: `python -m bench.conversion_once ROWS.jsonl OUT --spec JSON --processes N`.

Or, with `--script FILE`, the published converter instead, run by the same Python in the same way; or, with `--render-only`, what
the script does and no more: rows are read, parsed, checked and rendered in their own order, without tools.jsonl, order, splits
and report. Prints the seconds, imports not counted, those that processors worked for it (children too), and what became of
the rows, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imports are not to be timed
    from services.conversion.sources import Chunk
    from services.conversion.spec import Spec


def convert(rows: Path, output: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """Our stage, as its worker runs it. The spec's sources are all these rows."""
    import jinja2  # noqa: F401 - the stage imports it when it writes the report

    from services.common.reporter import Silent
    from services.conversion.worker import STAGE

    meant = STAGE.spec.model_validate(spec)
    inputs = {f"sources/{number}": rows for number in range(len(meant.sources))}
    if tokenizer := spec.get("tokenizer"):
        inputs["tokenizer"] = Path(tokenizer)
    output.mkdir()
    begin = _now()
    result = STAGE.run(meant, inputs, output, Silent())
    return _since(begin) | {"left_out": result["rows_rejected"]}


def render(rows: Path, output: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """Only the part of our stage that the script has too: every check of a row, and its training rows' messages."""
    from services.conversion.processes import count_processes, run_tasks
    from services.conversion.sources import cut_chunks
    from services.conversion.worker import STAGE

    meant = STAGE.spec.model_validate(spec)
    output.mkdir()
    begin = _now()
    chunks, processes = cut_chunks([(0, rows)]), count_processes()
    tasks = [(meant, chunks[number::processes], output / f"train-{number}.jsonl") for number in range(processes)]
    left_out = run_tasks(_render_chunks, tasks, lambda _: None)
    return _since(begin) | {"left_out": sum(left_out)}


def _render_chunks(spec: Spec, chunks: Sequence[Chunk], target: Path, tell: Callable[[int], None]) -> int:
    """How many rows were left out. tell: nobody looks at the progress."""
    import orjson

    from services.conversion.reading import to_row, understand_row
    from services.conversion.refusals import Refused
    from services.conversion.rendering import Renderer
    from services.conversion.sources import read_rows

    source, renderer, left_out = spec.all_sources[0], Renderer(spec, as_json=True), 0
    with target.open("wb", buffering=1 << 18) as file:
        for chunk in chunks:
            for raw in read_rows(chunk, spec.max_row_bytes):
                try:
                    row = to_row(understand_row(raw, source, spec), chunk, raw.offset)
                except Refused:
                    left_out += 1
                    continue
                for _, example in renderer.alone(row, row.tools):
                    told = {"id": row.id, "source": row.file, "messages": example.messages}
                    file.write(orjson.dumps(told, option=orjson.OPT_APPEND_NEWLINE))
    return left_out


def run_script(script: Path, rows: Path, output: Path) -> dict[str, Any]:
    """The published converter; it leaves out the rows on which it would crash."""
    output.mkdir()
    target = output / "train.jsonl"
    sys.argv = [str(script), str(rows), str(target), "--skip-broken"]
    begin = _now()
    runpy.run_path(str(script), run_name="__main__")
    return _since(begin) | {"left_out": _count_lines(rows) - _count_lines(target)}


def _now() -> tuple[float, float]:
    """(seconds on the clock, seconds that processors have worked for this process and its ended children)."""
    used = os.times()
    return time.perf_counter(), used.user + used.system + used.children_user + used.children_system


def _since(begin: tuple[float, float]) -> dict[str, Any]:
    now = _now()
    return {"seconds": now[0] - begin[0], "cpu": now[1] - begin[1]}


def _count_lines(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.conversion_once")
    parser.add_argument("rows", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--spec", type=json.loads, default="{}")
    parser.add_argument("--processes", default="1")
    parser.add_argument("--script", type=Path)
    parser.add_argument("--render-only", action="store_true")
    told = parser.parse_args()
    os.environ["FABRICTUNE_PROCESSES"] = told.processes
    spec = {"sources": [{"uri": str(told.rows)}], **told.spec}
    if told.script:
        result = run_script(told.script, told.rows, told.output)
    else:
        result = (render if told.render_only else convert)(told.rows, told.output, spec)
    print(json.dumps(result))


if __name__ == "__main__":
    _main()
