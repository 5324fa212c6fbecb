"""What became of the rows: counts and examples, kept while rows go by, added up over processes.

rows in = converted + duplicates + left out + rejected, always.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from services.conversion.refusals import REASONS, Refused

EXCERPT = 80
EXAMPLES = 3
MOST_FREQUENT = 100
TOKEN_BIN = 32
MAX_LENGTHS = (1024, 1500, 2048, 4096, 8192)
"""Of ms-swift's max_length, the recipe's 1500 among them: how many rows each would drop or cut."""

Counts = dict[str, int]


@dataclass
class Tokens:
    """Lengths of training rows under the base model's own tokenizer."""

    rows: int = 0
    total: int = 0
    longest: int = 0
    histogram: Counts = field(default_factory=dict)
    """Bin of TOKEN_BIN tokens → rows."""
    longer_than: Counts = field(default_factory=dict)

    def add(self, lengths: Iterable[int]) -> None:
        """Count rows of these lengths."""
        for length in lengths:
            self.rows += 1
            self.total += length
            self.longest = max(self.longest, length)
            count(self.histogram, str(length // TOKEN_BIN))
            for limit in MAX_LENGTHS:
                if length > limit:
                    count(self.longer_than, str(limit))

    def to_json(self, tokenizer: str) -> dict[str, Any]:
        """The report's "tokens"."""
        return {
            "tokenizer": tokenizer,
            "rows": self.rows,
            "mean": round(self.total / self.rows, 1) if self.rows else 0,
            "max": self.longest,
            "bin": TOKEN_BIN,
            "histogram": {key: self.histogram[key] for key in sorted(self.histogram, key=int)},
            "longer_than": {str(limit): self.longer_than.get(str(limit), 0) for limit in MAX_LENGTHS},
        }


@dataclass
class Report:
    """Counts of one conversion, or of a part of it."""

    rows_in: int = 0
    rejected: Counts = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Code → its first refusals, as they stand in rejects.jsonl."""
    rows: Counts = field(default_factory=dict)
    """Training rows written, by split."""
    scored: Counts = field(default_factory=dict)
    """Rows with an expected answer, by split."""
    languages: Counts = field(default_factory=dict)
    layouts: Counts = field(default_factory=dict)
    sources: Counts = field(default_factory=dict)
    """Rows understood, by file."""
    tools: Counts = field(default_factory=dict)
    """Tool → rows whose own prompt lists it."""
    turns: Counts = field(default_factory=dict)
    """Rounds of a row → rows."""
    calls: Counts = field(default_factory=dict)
    """Calls of a turn → turns."""
    turns_with_calls: int = 0
    turns_without_call: int = 0
    """As trained: refusals that were added are among them."""
    near_misses: Counts = field(default_factory=dict)
    """A tool, a line break, and a listed tool that questions for the first were refused beside → questions."""
    tools_exchanged: int = 0
    """Listed, not called, held out from the row's split: another tool of the split stands in its place."""
    tokens: Tokens = field(default_factory=Tokens)

    def add(self, other: Report) -> None:
        """Add another part's counts."""
        self.rows_in += other.rows_in
        self.turns_with_calls += other.turns_with_calls
        self.tools_exchanged += other.tools_exchanged
        self.turns_without_call += other.turns_without_call
        for name in (
            "rejected",
            "rows",
            "scored",
            "languages",
            "layouts",
            "sources",
            "tools",
            "turns",
            "calls",
            "near_misses",
        ):
            add_counts(getattr(self, name), getattr(other, name))
        self.tokens.rows += other.tokens.rows
        self.tokens.total += other.tokens.total
        self.tokens.longest = max(self.tokens.longest, other.tokens.longest)
        add_counts(self.tokens.histogram, other.tokens.histogram)
        add_counts(self.tokens.longer_than, other.tokens.longer_than)

    def explain_rejects(self) -> str:
        """The reasons, most frequent first, with the place of the first of each."""
        parts = []
        for code, number in most_frequent(self.rejected, 5):
            first = self.examples[code][0]
            parts.append(
                f"{code} {number} × (first in {first['source']} line {first['line']}: expected {REASONS[code].expected})"
            )
        return "; ".join(parts)


@dataclass(frozen=True)
class Outcome:
    """What is known only of the whole conversion."""

    duplicates: Mapping[str, int]
    """"exact" and "near" → rows."""
    left_out: int
    splits: Mapping[str, Iterable[str]]
    """Split → its tools' names."""
    warnings: list[str]

    def to_json(self, report: Report, spec: Mapping[str, Any], tokenizer: str) -> dict[str, Any]:
        """report.json."""
        rejected = sum(report.rejected.values())
        converted = report.rows_in - rejected - sum(self.duplicates.values()) - self.left_out
        return {
            "version": 2,
            "rows_in": report.rows_in,
            "rows_converted": converted,
            "rows_duplicate": dict(self.duplicates),
            "rows_left_out": self.left_out,
            "rows_rejected": rejected,
            "rejected_by_code": dict(most_frequent(report.rejected)),
            "rejected_examples": {code: report.examples[code] for code in sorted(report.examples)},
            "rows_written": by_key(report.rows),
            "rows_scored": by_key(report.scored),
            "tools": {split: len(list(names)) for split, names in self.splits.items()},
            "held_out_tools": sorted(self.splits.get("test", ()))[:1000],
            "tools_exchanged": report.tools_exchanged,
            "tools_by_frequency": most_frequent(report.tools, MOST_FREQUENT),
            "languages": by_key(report.languages),
            "layouts": by_key(report.layouts),
            "rows_by_source": by_key(report.sources),
            "turns": {key: report.turns[key] for key in sorted(report.turns, key=int)},
            "calls_per_turn": {key: report.calls[key] for key in sorted(report.calls, key=int)},
            "turns_with_calls": report.turns_with_calls,
            "turns_without_call": report.turns_without_call,
            "near_misses": [[*pair.split("\n"), n] for pair, n in most_frequent(report.near_misses, MOST_FREQUENT)],
            **({"tokens": report.tokens.to_json(tokenizer)} if tokenizer else {}),
            "warnings": self.warnings,
            "spec": dict(spec),
        }


def describe_refusal(refused: Refused, data: bytes, source: str, line: int, offset: int) -> dict[str, Any]:
    """A refused row's line in rejects.jsonl, which can be mended and fed back (`row`)."""
    text = data.decode("utf-8", errors="replace")
    return {
        "source": source,
        "line": line,
        "offset": offset,
        "code": refused.code,
        "expected": f"{REASONS[refused.code].expected}; found {refused.detail}",
        "excerpt": text[:EXCERPT],
        "row": text,
    }


def count(counts: Counts, key: str, number: int = 1) -> None:
    """Add to a count."""
    counts[key] = counts.get(key, 0) + number


def add_counts(counts: Counts, others: Mapping[str, int]) -> None:
    """Add counts to counts."""
    for key, number in others.items():
        counts[key] = counts.get(key, 0) + number


def by_key(counts: Counts) -> Counts:
    """The same whoever counted: in the order of the keys."""
    return {key: counts[key] for key in sorted(counts)}


def most_frequent(counts: Counts, most: int | None = None) -> list[tuple[str, int]]:
    """Largest first; equal ones by key."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
