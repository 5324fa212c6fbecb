"""The dataset's files out of their parts: buckets in order, refusals with their lines, the report."""

from __future__ import annotations

import heapq
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from services.conversion.mixture import SPLITS
from services.conversion.reading import REJECTS
from services.conversion.writing import part_file


def join_parts(parts: Path, firsts: Sequence[int], output: Path) -> None:
    """Make train, validation and test, and tools.jsonl, which has the same ids in the order of the three.

    firsts: the first bucket of each part, in order. The parts are gone afterwards.
    """
    for split in SPLITS:
        _join([part_file(parts, split, first) for first in firsts], output / f"{split}.jsonl")
    _join([part_file(parts, f"tools-{split}", first) for split in SPLITS for first in firsts], output / "tools.jsonl")


def join_rejects(folders: Sequence[Path], before: Mapping[int, int], output: Path) -> None:
    """Make rejects.jsonl, in the order of the sources. before: chunk → lines of its file before it."""
    with (output / "rejects.jsonl").open("wb") as file:
        for _, _, told in heapq.merge(*(_read_rejects(folder) for folder in folders), key=lambda r: r[:2]):
            file.write(orjson.dumps(place_refusal(told, before), option=orjson.OPT_APPEND_NEWLINE))


def place_refusal(told: Mapping[str, Any], before: Mapping[int, int]) -> dict[str, Any]:
    """A refusal with its line in the file instead of in its chunk."""
    return {
        key: value + before[told["chunk"]] if key == "line" else value for key, value in told.items() if key != "chunk"
    }


def write_report(told: Mapping[str, Any], output: Path) -> None:
    """Make report.json and report.html."""
    from services.conversion.report_page import render_page

    (output / "report.json").write_text(json.dumps(told, ensure_ascii=False, indent=1), encoding="utf-8")
    (output / "report.html").write_text(render_page(told), encoding="utf-8")


def _join(parts: Sequence[Path], target: Path) -> None:
    """The first part becomes the file, the others are copied behind it."""
    parts[0].rename(target)
    with target.open("ab") as file:
        for part in parts[1:]:
            with part.open("rb") as data:
                shutil.copyfileobj(data, file, 1 << 20)
            part.unlink()


def _read_rejects(folder: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    with (folder / REJECTS).open("rb") as lines:
        for line in lines:
            told = orjson.loads(line)
            yield told["chunk"], told["line"], told
