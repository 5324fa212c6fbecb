"""The files of an artifact and the digest that names them, known without a client of the object store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """One file of an artifact."""

    path: str
    size: int
    sha256: str


def digest_of_files(files: Sequence[File]) -> str:
    """sha256 of the sorted file list, lower-case hex."""
    listed = sorted([f.path, f.size, f.sha256] for f in files)
    return hashlib.sha256(json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()
