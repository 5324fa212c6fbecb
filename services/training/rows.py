"""The dataset before it is trained on: every row is checked here, since ms-swift would drop a bad one in silence.

Lengths are counted exactly by ms-swift's own template in the child; `certainly_too_long` is a lower bound that spares
the start when nothing would be left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.errors import InvalidData

_ROLES = ("system", "user", "assistant")
_SHOWN = 5
_LONGEST = 64
"""Rows with the most letters, among which the one with the most tokens is looked for."""
_TEMPLATE_TOKENS = 24
"""What a chat template adds to a row of three messages, roughly."""


@dataclass(frozen=True)
class Row:
    """One training example, as far as its name goes."""

    id: str
    fingerprint: str
    characters: int
    text: str
    """All contents, joined."""


def read_rows(file: Path) -> list[Row]:
    """The rows of a train.jsonl or validation.jsonl; [] when it is absent. Raises InvalidData naming bad lines."""
    if not file.exists():
        return []
    rows, wrong = [], []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append(_read_row(line))
            except ValueError as error:
                wrong.append(f"line {number}: {error}")
    if wrong:
        shown = "\n".join(f"  {text}" for text in wrong[:_SHOWN])
        more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise InvalidData(
            f"{file.name}: {len(wrong)} rows cannot be trained on; convert the source again\n{shown}{more}"
        )
    return rows


def fingerprint(messages: Sequence[Mapping[str, Any]]) -> str:
    """Names a row by its messages, for ms-swift drops the id. Same as swift_plugin.fingerprint."""
    text = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def certainly_too_long(rows: Sequence[Row], model: Path, max_length: int) -> list[Row]:
    """Rows whose contents alone have more than max_length tokens; [] when the model has no tokenizer.json.

    The template adds a few tokens to each message, so that ms-swift may refuse some more.
    """
    if not (model / "tokenizer.json").exists():
        return []
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    # A token is at least one byte, so short texts need no count; the rest go in batches that bound the memory.
    suspects = [row for row in rows if len(row.text.encode()) > max_length]
    found = []
    for start in range(0, len(suspects), 256):
        batch = suspects[start : start + 256]
        encodings = tokenizer.encode_batch([row.text for row in batch], add_special_tokens=False)
        found += [row for row, encoding in zip(batch, encodings, strict=True) if len(encoding.ids) > max_length]
    return found


def longest_length(rows: Sequence[Row], model: Path, max_length: int | None) -> int:
    """Tokens of the longest row that is trained, at most max_length; a guess when the model has no tokenizer.json."""
    suspects = sorted(rows, key=lambda row: row.characters)[-_LONGEST:]
    if (model / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        found = [len(e.ids) for e in tokenizer.encode_batch([r.text for r in suspects], add_special_tokens=False)]
    else:
        found = [len(row.text.encode()) // 3 for row in suspects]
    longest = max(found, default=0) + _TEMPLATE_TOKENS
    return longest if max_length is None else min(longest, max_length)


def _read_row(line: bytes) -> Row:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        raise ValueError("messages must be a list with at least one message")
    if "tools" in row:
        raise ValueError("a tools key: ms-swift would put the tools into the prompt again; keep them in tools.jsonl")
    name = str(row.get("id", ""))
    for place, message in enumerate(row["messages"]):
        _check_message(name, place, message)
    messages = row["messages"]
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"row {name!r}: the last message must be the assistant's, it is the {messages[-1]['role']}'s")
    if not any(m["role"] == "assistant" and m.get("loss") is not False and m["content"] for m in messages):
        raise ValueError(f"row {name!r}: nothing in it is trained; every assistant message is empty or has loss false")
    text = "\n".join(m["content"] for m in messages)
    return Row(name, fingerprint(messages), len(text), text)


def _check_message(name: str, place: int, message: Any) -> None:
    where = f"row {name!r}: messages[{place}]"
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise ValueError(f"{where}.role must be one of {', '.join(_ROLES)}")
    if not isinstance(message.get("content"), str):
        raise ValueError(f"{where}.content must be text")
    if message["role"] == "system" and place > 0:
        raise ValueError(f"{where}: a system message can only come first")
    if not isinstance(message.get("loss"), bool | None):
        raise ValueError(f"{where}.loss must be true or false")
