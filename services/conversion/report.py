"""What became of the rows: counts and examples, kept while rows go by. rows in = converted + rejected, always."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.conversion.refusals import EXPECTED, Refused
from services.conversion.sources import RawRow

EXCERPT = 80
EXAMPLES = 3


@dataclass
class Report:
    """Counts of one conversion."""

    rows_in: int = 0
    converted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)
    """Training rows written, by split."""
    scored: Counter[str] = field(default_factory=Counter)
    """Rows with an expected answer, by split."""
    tools: dict[str, set[str]] = field(default_factory=dict)
    """Tools' names, by split."""
    languages: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    without_call: int = 0

    def reject(self, raw: RawRow, refused: Refused) -> dict[str, Any]:
        """Count a refusal; returns its line for rejects.jsonl, which can be mended and fed back (`row`)."""
        self.rejected[refused.code] += 1
        text = raw.data.decode("utf-8", errors="replace")
        told = {
            "source": raw.source,
            "line": raw.line,
            "offset": raw.offset,
            "code": refused.code,
            "expected": f"{EXPECTED[refused.code]}; found {refused.detail}",
            "excerpt": text[:EXCERPT],
        }
        examples = self.examples.setdefault(refused.code, [])
        if len(examples) < EXAMPLES:
            examples.append(told)
        return {**told, "row": text}

    def to_json(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """report.json."""
        rejected = sum(self.rejected.values())
        return {
            "version": 1,
            "rows_in": self.rows_in,
            "rows_converted": self.converted,
            "rows_rejected": rejected,
            "rejected_by_code": dict(self.rejected.most_common()),
            "rejected_examples": self.examples,
            "rows_written": dict(self.rows),
            "rows_scored": dict(self.scored),
            "tools": {split: len(names) for split, names in self.tools.items()},
            "held_out_tools": sorted(self.tools.get("test", ())),
            "languages": dict(self.languages),
            "layouts": dict(self.layouts),
            "rows_by_source": dict(self.sources),
            "turns_with_calls": self.calls,
            "turns_without_call": self.without_call,
            "spec": dict(spec),
        }

    def explain_rejects(self) -> str:
        """The reasons, most frequent first, with the place of the first of each."""
        parts = []
        for code, count in self.rejected.most_common(5):
            first: Sequence[dict[str, Any]] = self.examples[code]
            parts.append(
                f"{code} {count} × (first in {first[0]['source']} line {first[0]['line']}: expected {EXPECTED[code]})"
            )
        return "; ".join(parts)
