"""How many rows a dataset trains and how long they are, by conversion's report or by a look at the first of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.common.errors import InvalidData

SAMPLE_BYTES = 4 << 20
"""Read of train.jsonl where no report says how long its rows are."""


@dataclass(frozen=True)
class DatasetSize:
    """Rows to train on, as far as they are known."""

    lengths: Mapping[int, float]
    """Tokens → rows of that length."""
    exact: bool
    """Counted with the model's tokenizer, not guessed from letters."""

    def within(self, limit: int | None) -> tuple[float, float, int]:
        """(rows, mean tokens, most tokens) of the rows that are not longer than the limit."""
        kept = {tokens: rows for tokens, rows in self.lengths.items() if limit is None or tokens <= limit}
        rows = sum(kept.values())
        return rows, sum(t * r for t, r in kept.items()) / rows if rows else 0.0, max(kept, default=0)


def measure_dataset(report: bytes | None, sample: bytes, whole_size: int) -> DatasetSize:
    """Rows and tokens from conversion's report.json, else from the first bytes of train.jsonl (extrapolated).

    Raises InvalidData when there is a report that is none.
    """
    try:
        told = _read_report(json.loads(report)) if report else {}
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise InvalidData(
            f"the dataset's report.json cannot be read ({type(error).__name__}: {error}); convert again"
        ) from None
    if told:
        return DatasetSize(told, exact=True)
    lines = [line for line in sample.splitlines() if line.strip()]
    if len(sample) < whole_size and len(lines) > 1:
        lines.pop()  # cut off in the middle
    counts = [count_roughly(line) for line in lines]
    scale = whole_size / (sum(map(len, lines)) + len(lines)) if lines and len(sample) < whole_size else 1.0
    return DatasetSize({tokens: rows * scale for tokens, rows in Counter(counts).items()}, exact=False)


def _read_report(told: Mapping[str, Any]) -> dict[int, float]:
    """Tokens → rows of that length; {} where they were not counted."""
    tokens, rows = told.get("tokens") or {}, (told.get("rows_written") or {}).get("train", 0)
    if not rows or not tokens.get("histogram"):
        return {}
    width, share = int(tokens["bin"]), rows / tokens["rows"]
    return {min(int(b) * width + width // 2, tokens["max"]): n * share for b, n in tokens["histogram"].items()}


def count_roughly(line: bytes) -> int:
    """Tokens of a row without a tokenizer: four letters of a Latin script, or one and a half of a Chinese one, each."""
    try:
        text = "".join(str(m.get("content", "")) for m in json.loads(line)["messages"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return len(line) // 4
    ascii_letters = sum(map(str.isascii, text))
    return int(ascii_letters / 4 + (len(text) - ascii_letters) / 1.5) + 20
