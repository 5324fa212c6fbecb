"""Raw rows, from wherever they are, become artifacts: a job reads nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabrictune.errors import ApiError
from fabrictune.row_files import SUFFIXES, rows_below
from fabrictune.sources import Rows, find_rows, is_artifact

if TYPE_CHECKING:
    from fabrictune.client import Client


def push_rows(
    client: Client,
    uri: str,
    push: Callable[..., Any],
    folder: Path = Path(),
    find: Callable[[str, Path], Rows] = find_rows,
) -> str:
    """The name of an artifact with these rows; one that is pushed gets a name made from its content. Raises ApiError.

    uri: a source (see fabrictune.sources) with paths relative to `folder`, or an artifact's name, which is returned.
    """
    if is_artifact(uri) and not (folder / uri).exists():
        return uri
    path, origin = find(uri, folder)
    files = rows_below(path)
    if not files:
        raise ApiError(f"{path} has no rows files; they end in {', '.join(SUFFIXES)}", "INVALID_ARGUMENT")
    digest = hashlib.sha256()
    for place, file in files.items():
        with file.open("rb") as data:
            digest.update(place.encode() + hashlib.file_digest(data, "sha256").digest())
    named = origin.partition("@")[0].rstrip("/").rpartition("/")[2] if path.is_dir() and origin else path.stem
    stem = "".join(c if c.isalnum() and c.isascii() else "-" for c in named.lower().split(".")[0])
    name = f"datasets/rows-{stem.strip('-')[:18].strip('-') or 'rows'}-{digest.hexdigest()[:10]}"
    push(client, files, name, "rows", {"description": f"raw rows: {named}", **({"source": origin} if origin else {})})
    return name
