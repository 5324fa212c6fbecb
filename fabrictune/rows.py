"""Raw rows on this machine become artifacts: a job reads nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fabrictune.client import Client
from fabrictune.errors import ApiError


def push_rows(client: Client, uri: str, push: Callable[..., Any], folder: Path = Path()) -> str:
    """The name of an artifact with these rows. A local file or folder is pushed under a name made from its content.

    uri: a path (relative to `folder`), or an address that the conversion service reads itself, such as "datasets/d1".
    """
    path = folder / uri
    if not path.exists():
        if uri.startswith("datasets/") or "://" in uri:
            return uri
        raise ApiError(
            f"there are no rows at {path}: give a .jsonl file, a folder of them, or datasets/ID", "NOT_FOUND"
        )
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as data:
                digest.update(file.name.encode() + hashlib.file_digest(data, "sha256").digest())
    stem = (
        "".join(c if c.isalnum() else "-" for c in path.stem.lower().split(".")[0]).strip("-")[:18].strip("-") or "rows"
    )
    name = f"datasets/rows-{stem}-{digest.hexdigest()[:10]}"
    push(client, path, name, "rows", {"description": f"raw rows: {path.name}"})
    return name
