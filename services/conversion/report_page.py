"""report.json as one page for people: report.html, complete in itself, without scripts and without anything from outside.

A key that is absent leaves its section out. Names and excerpts come from rows, so the template escapes all text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from services.conversion.mixture import SPLITS
from services.conversion.refusals import REASONS
from services.conversion.report import MAX_LENGTHS

if TYPE_CHECKING:
    import jinja2

TEMPLATE = Path(__file__).with_name("report.html.jinja")
TOOLS, NAMES = 30, 10
BARS_PER_OCTAVE = 8


class Bar(NamedTuple):
    """A line of a bar chart."""

    name: str
    rows: int
    part: str
    """Of the whole, in words."""
    width: float
    """Percent of the longest bar."""


class Column(NamedTuple):
    """A bar of the histogram: percent of the plot. On the logarithmic axis its area stands for its rows."""

    left: float
    width: float
    height: float
    title: str


class Limit(NamedTuple):
    """A max_length: where its line stands (None: outside of the plot), and how many rows are longer."""

    length: int
    left: float | None
    rows: int
    part: str


def render_page(report: Mapping[str, Any]) -> str:
    """The page. report: what report.json holds; every key may be absent."""
    rejected, held_out = report.get("rejected_by_code") or {}, report.get("held_out_tools") or []
    page = {
        "sources": [str(s.get("uri", "")) for s in (report.get("spec") or {}).get("sources", ())],
        "sum": _sum(report),
        "splits": _splits(report),
        "held_out": held_out,
        "held_out_count": max((report.get("tools") or {}).get("test", 0), len(held_out)),
        "refusals": [_refusal(code, count, report) for code, count in rejected.items()],
        "tokens": _tokens(report.get("tokens") or {}),
        "tools": _bars((report.get("tools_by_frequency") or [])[:TOOLS]),
        "near_misses": report.get("near_misses") or [],
        "panels": _panels(report),
        "warnings": report.get("warnings") or [],
        "spec": report.get("spec") or {},
    }
    return _template().render(page)


def share(part: float, whole: float) -> str:
    """A part in percent, such as "12.5 %"; never "0 %" or "100 %" for what is not quite that."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "< 0.1 %"
    return "> 99.9 %" if 99.9 < percent < 100 else f"{percent:.1f}".removesuffix(".0") + " %"


def _sum(report: Mapping[str, Any]) -> dict[str, Any]:
    """The rows in, and where they went. missing: rows that the report does not account for; 0, or there is a bug."""
    duplicates = report.get("rows_duplicate") or {}
    terms = [
        ("converted", "converted", report.get("rows_converted") or 0, ""),
        (
            "duplicate",
            "duplicates",
            sum(duplicates.values()),
            " · ".join(f"{n:,} {k}" for k, n in duplicates.items() if n),
        ),
        ("left-out", "left out", report.get("rows_left_out") or 0, "not chosen by count or mix_ratio"),
        ("rejected", "rejected", report.get("rows_rejected") or 0, "each with its reason"),
    ]
    rows_in = report.get("rows_in") or 0
    return {
        "rows_in": rows_in,
        "terms": [
            {"kind": kind, "name": name, "count": count, "note": note if count else "", "part": share(count, rows_in),
             "width": 100 * count / rows_in if rows_in else 0.0}
            for kind, name, count, note in terms
        ],
        "missing": rows_in - sum(count for _, _, count, _ in terms),
    }  # fmt: skip


def _splits(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    keys = {"rows": "rows_written", "scored": "rows_scored", "tools": "tools"}
    columns = {name: report.get(key) for name, key in keys.items()}
    rows = columns["rows"] or {}
    most = max(rows.values(), default=0)
    return [
        {key: None if column is None else column.get(name, 0) for key, column in columns.items()}
        | {"name": name, "rows": rows.get(name, 0), "width": 100 * rows.get(name, 0) / most if most else 0.0}
        for name in SPLITS
        if any(name in (column or ()) for column in columns.values())
    ]


def _refusal(code: str, count: int, report: Mapping[str, Any]) -> dict[str, Any]:
    examples = []
    for told in (report.get("rejected_examples") or {}).get(code, ()):
        expected, _, found = str(told.get("expected", "")).partition("; found ")
        examples.append({"expected": expected, "found": found} | {k: v for k, v in told.items() if k != "expected"})
    known, first = REASONS.get(code), examples[0]["expected"] if examples else ""
    return {
        "code": code,
        "count": count,
        "part": share(count, report.get("rows_in") or 0),
        "expected": known.expected if known else first,
        "mend": known.mend if known else "",
        "examples": examples,
    }


def _tokens(tokens: Mapping[str, Any]) -> dict[str, Any] | None:
    """The histogram on a logarithmic axis, and what each max_length would cost."""
    step, counts = tokens.get("bin") or 32, {int(k): v for k, v in (tokens.get("histogram") or {}).items() if v}
    if not counts:
        return None
    longer = {int(k): v for k, v in (tokens.get("longer_than") or {}).items()}
    rows = tokens.get("rows") or sum(counts.values())
    longest = tokens.get("max") or (max(counts) + 1) * step
    low = math.floor(math.log2(max(min(counts), 1) * step))
    high = math.log2(max(longest, *(longer or MAX_LENGTHS)) * 1.12)

    def place(length: float) -> float:
        return 100 * (math.log2(max(length, 2**low)) - low) / (high - low)

    merged = [(begin, end, n) for begin, end, n in _merge(counts, step) if place(end) > place(begin)]
    densities = [n / (place(end) - place(begin)) for begin, end, n in merged]
    columns = [
        Column(place(b), place(e) - place(b), 100 * d / max(densities), f"{b:,} to {e - 1:,} tokens: {n:,} rows")
        for (b, e, n), d in zip(merged, densities, strict=True)
    ]
    limits = [Limit(at, place(at), longer.get(at, 0), share(longer.get(at, 0), rows)) for at in longer or MAX_LENGTHS]
    ticks = [(2**power, place(2**power)) for power in range(low, math.floor(high) + 1)]
    return {
        "columns": columns,
        "limits": sorted(limits),
        "ticks": ticks,
        "rows": rows,
        "counted": bool(longer),
        "mean": tokens.get("mean"),
        "max": tokens.get("max"),
        "tokenizer": tokens.get("tokenizer") or "",
    }


def _merge(counts: Mapping[int, int], step: int) -> Iterable[tuple[int, int, int]]:
    """(first length, length after the last, rows): bins of one width, joined where they would be slivers on the axis."""
    last, begin = max(counts) + 1, 0
    while begin < last:
        end = max(begin + 1, round(begin * 2 ** (1 / BARS_PER_OCTAVE)))
        if rows := sum(counts.get(at, 0) for at in range(begin, min(end, last))):
            yield begin * step, end * step, rows
        begin = end


def _panels(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = {"with a call": report.get("turns_with_calls", 0), "without": report.get("turns_without_call", 0)}
    told = [
        ("Languages", "converted rows", _named(report.get("languages"))),
        ("Layouts", "training rows written", _named(report.get("layouts"))),
        ("Assistant turns", "as trained", _named({k: v for k, v in turns.items() if v})),
        ("Questions in a row", "turns of the user", _numbered(report.get("turns"))),
        ("Calls in a turn", "0: answered in words", _numbered(report.get("calls_per_turn"))),
        ("Sources", "rows understood in each", _named(report.get("rows_by_source"))),
    ]
    return [{"title": title, "note": note, "bars": bars} for title, note, bars in told if bars]


def _named(counts: Mapping[str, int] | None) -> list[Bar]:
    ordered = sorted((counts or {}).items(), key=lambda pair: (-pair[1], pair[0]))
    rest = ordered[NAMES:]
    more = [(f"{len(rest):,} more", sum(n for _, n in rest))] if rest else []
    return _bars([*ordered[:NAMES], *more])


def _numbered(counts: Mapping[str, int] | None) -> list[Bar]:
    ordered = sorted((int(k), n) for k, n in (counts or {}).items())
    rest = ordered[NAMES:]
    more = [(f"{rest[0][0]} or more", sum(n for _, n in rest))] if rest else []
    return _bars([*((str(k), n) for k, n in ordered[:NAMES]), *more])


def _bars(pairs: Iterable[tuple[str, int]]) -> list[Bar]:
    pairs = [(str(name), count) for name, count in pairs]
    whole, most = sum(n for _, n in pairs), max((n for _, n in pairs), default=0)
    return [Bar(name, count, share(count, whole), 100 * count / most if most else 0.0) for name, count in pairs]


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["count"] = "{:,}".format
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
