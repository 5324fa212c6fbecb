"""Which files hold rows, and a look at the first bytes of one that came from elsewhere: an error page is no rows file."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

from fabrictune.errors import ApiError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
LOOSE_SUFFIX = ".json"
"""Hubs have JSON lines under this name, too; kept as .jsonl, since nothing else of that name is read."""
HEAD = 1 << 16
_MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".parquet": b"PAR1"}


def names_rows(path: str) -> bool:
    """Whether a file of this name holds rows."""
    return path.endswith(SUFFIXES)


def may_hold_rows(path: str) -> bool:
    """Whether a file of this name holds rows, or may, if there is no better one."""
    return path.endswith((*SUFFIXES, LOOSE_SUFFIX))


def kept_name(path: str) -> str:
    """The name that it is kept under: rows.json → rows.jsonl."""
    return f"{path}l" if path.endswith(LOOSE_SUFFIX) else path


def rows_below(path: Path) -> dict[str, Path]:
    """Place below the folder → rows file, in order. Hidden ones are left out: nobody means a .env, or an editor's copy.

    Of a path that is a file: that file, whatever its name.
    """
    if path.is_file():
        return {path.name: path}
    places = {file.relative_to(path): file for file in sorted(path.rglob("*")) if file.is_file()}
    return {
        place.as_posix(): file
        for place, file in places.items()
        if names_rows(place.name) and not any(part.startswith(".") for part in place.parts)
    }


def check_rows(file: Path, origin: str) -> None:
    """Raises ApiError when a file is not what its name says: an HTML page, a JSON array, an empty file.

    Rows are not judged: the conversion refuses each that is wrong by itself.
    """
    suffix = file.suffix
    with file.open("rb") as data:
        head = data.read(HEAD)
    magic = _MAGIC.get(suffix, b"")
    if head.startswith(magic) and suffix in (".zst", ".parquet"):
        return
    if not head.startswith(magic):
        raise _refusal(origin, f"is no {suffix} file; {_describe(head)}")
    if suffix == ".gz":
        try:
            with gzip.open(file) as data:
                head = data.read(HEAD)
        except (OSError, EOFError, zlib.error) as error:
            raise _refusal(origin, f"cannot be unpacked: {error}") from None
    if not _holds_rows(_text(head)):
        raise _refusal(origin, f"is not JSON lines; {_describe(head)}")


def _holds_rows(text: bytes) -> bool:
    """Whether some line is an object and the whole is no other kind of file. One broken row is not yet another kind."""
    lines = text.split(b"\n")
    if text.startswith(b"<") or _is_array(lines) or _is_object(lines):
        return False
    return any(line.lstrip().startswith(b"{") for line in lines)


def _is_array(lines: Sequence[bytes]) -> bool:
    if not lines[0].startswith(b"["):
        return False
    try:
        json.loads(lines[0])
    except ValueError:
        return True
    return len(lines) == 1


def _is_object(lines: Sequence[bytes]) -> bool:
    """Whether it is one object over several lines."""
    return lines[0].strip() == b"{" and len(lines) > 1 and lines[1].lstrip().startswith(b'"')


def _text(head: bytes) -> bytes:
    return head.removeprefix(b"\xef\xbb\xbf").strip()


def _describe(head: bytes) -> str:
    text = _text(head)
    if not text:
        return "it is empty"
    if text.startswith(b"<"):
        return "it is an HTML page: a sign-in or error page, or the page that links to the file"
    if _is_array(text.split(b"\n")):
        return "it is a JSON array: `jq -c '.[]' rows.json > rows.jsonl` makes lines of it"
    if _is_object(text.split(b"\n")):
        return "it is one JSON object over several lines: `jq -c . rows.json > rows.jsonl` makes lines of it"
    for name, magic in (
        ("gzip", b"\x1f\x8b"),
        ("Zstandard", b"\x28\xb5\x2f\xfd"),
        ("Parquet", b"PAR1"),
        ("ZIP", b"PK"),
    ):
        if text.startswith(magic):
            return f"it is {name} data"
    return f"it begins with {json.dumps(text[:40].decode(errors='replace'), ensure_ascii=False)}"


def _refusal(origin: str, what: str) -> ApiError:
    return ApiError(f"{origin} {what}", "INVALID_ARGUMENT", "INVALID_DATA")
