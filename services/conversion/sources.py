"""Reads raw rows, one line at a time, with the line number and byte offset that a refusal names."""

from __future__ import annotations

import ast
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from services.common.errors import InvalidData
from services.conversion.react import (
    EMPTY_CONVERSATIONS,
    INVALID_JSON,
    NO_SYSTEM_TURN,
    ROLE_ORDER,
    ROW_TOO_LARGE,
    WRONG_ENCODING,
    Refused,
)

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class RawRow:
    """One line of a source. offset: bytes before it in the (unpacked) file."""

    source: str
    line: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Conversation:
    """A row whose turns are in order: the system prompt, then (user, assistant) rounds."""

    id: str
    system: str
    rounds: Sequence[tuple[str, str]]


def find_files(path: Path, pattern: str) -> list[Path]:
    """The rows files of a source, in order. Raises InvalidData when there are none."""
    if path.is_file():
        return [path]
    found = [f for f in sorted(path.rglob(pattern or "*")) if f.is_file() and f.name.endswith(SUFFIXES)]
    if not found:
        raise InvalidData(
            f"{path.name} has no rows files{f' that match {pattern!r}' if pattern else ''}; they end in {', '.join(SUFFIXES)}"
        )
    return found


def read_rows(file: Path, source: str) -> Iterator[RawRow]:
    """The lines of a file that are not blank. Raises InvalidData when it cannot be unpacked."""
    offset = 0
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield RawRow(source, number, offset, line.rstrip(b"\r\n"))
                offset += len(line)
    except (gzip.BadGzipFile, EOFError) as error:
        raise InvalidData(f"{file.name} cannot be unpacked: {error}") from None


def parse_row(raw: RawRow, max_bytes: int) -> Conversation:
    """A row in ms_agent's form: `conversations` from/value or `messages` role/content. Raises Refused."""
    if len(raw.data) > max_bytes:
        raise Refused(ROW_TOO_LARGE, f"{len(raw.data)} bytes")
    try:
        row = json.loads(raw.data.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise Refused(WRONG_ENCODING, f"byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise Refused(INVALID_JSON, str(error)[:120]) from None
    if not isinstance(row, dict):
        raise Refused(INVALID_JSON, "not an object")
    turns = [_turn(t) for t in _turns(row)]
    if turns[0][0] != "system":
        raise Refused(NO_SYSTEM_TURN, f"the first turn is the {turns[0][0]}'s")
    roles = [role for role, _ in turns[1:]]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise Refused(ROLE_ORDER, ", ".join(roles[:8]) or "no turns after the system's")
    rounds = [(turns[i][1], turns[i + 1][1]) for i in range(1, len(turns), 2)]
    return Conversation(str(row.get("id") or f"{raw.source}:{raw.line}"), turns[0][1], rounds)


def _turns(row: Mapping[str, Any]) -> list[Any]:
    turns = row.get("conversations", row.get("messages"))
    if isinstance(turns, str):  # the published data set holds Python literals
        try:
            turns = ast.literal_eval(turns)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise Refused(EMPTY_CONVERSATIONS, "the text in `conversations` is no Python list") from None
    if not isinstance(turns, list) or not turns:
        raise Refused(EMPTY_CONVERSATIONS, "no turns")
    return turns


def _turn(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise Refused(EMPTY_CONVERSATIONS, "a turn that is no object")
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(role, str) or not isinstance(text, str):
        raise Refused(EMPTY_CONVERSATIONS, "a turn without a role and text")
    return role, text


def _open(file: Path) -> IO[bytes]:
    if file.name.endswith(".gz"):
        return gzip.open(file, "rb")  # type: ignore[return-value]  # GzipFile is read like one
    if file.name.endswith(".zst"):
        import zstandard

        return zstandard.open(file, "rb")  # type: ignore[no-any-return]
    return file.open("rb")
