"""What an artifact is: its files, the digest that names them, and its manifest. Known without a client of the object store."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from services.common.errors import DataLoss, InvalidData, InvalidSpec, enumerated
from services.common.resources import ID_PATTERN

COLLECTIONS = ("datasets", "models", "adapters", "reports")
# Of a job that is not done, seen by its workers only: checkpoints, and what its nodes share.
NAME = re.compile(
    rf"({'|'.join(COLLECTIONS)})/{ID_PATTERN}|checkpoints/[A-Za-z0-9-]+/step-\d+|shares/[A-Za-z0-9-]+/node-\d+"
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class File:
    """One file of an artifact."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact is: `manifest.json`."""

    name: str
    kind: str
    files: tuple[File, ...]
    digest: str
    """sha256 of the sorted file list."""
    attempt: str
    """The folder below the name in which the files lie."""
    created_by: Mapping[str, Any] = field(default_factory=dict)
    """{job, spec, digest, inputs: [{name, digest}], versions}"""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    create_time: float = 0

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)

    def to_json(self) -> dict[str, Any]:
        """What is stored."""
        return {**asdict(self), "files": [asdict(f) for f in self.files]}


def parse_manifest(name: str, stored: Mapping[str, Any]) -> Manifest:
    """The manifest that is stored for `name`. Raises DataLoss when it cannot be read or was changed."""
    try:
        files = tuple(File(**f) for f in stored["files"])
        manifest = Manifest(**{**stored, "files": files})
    except (KeyError, TypeError) as error:
        raise DataLoss(f"the manifest of {name} cannot be read: {error}") from None
    if manifest.digest != digest_of_files(files):
        raise DataLoss(f"the manifest of {name} was changed: its digest does not fit its files")
    return manifest


def digest_of_files(files: Sequence[File]) -> str:
    """sha256 of the sorted file list, lower-case hex."""
    listed = sorted([f.path, f.size, f.sha256] for f in files)
    return hashlib.sha256(json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def check_name(name: str) -> None:
    """Raises InvalidSpec when `name` cannot be an artifact's."""
    if not NAME.fullmatch(name):
        raise InvalidSpec(
            f"{name!r} is no artifact's name; it looks like datasets/an-id (also models, adapters, reports)"
        )


def check_files(name: str, kind: str, paths: Sequence[str]) -> None:
    """Refuse what may not be in an artifact. Raises InvalidSpec, InvalidData naming all that is wrong."""
    check_name(name)
    if not paths:
        raise InvalidData(f"{name} would have no files")
    outside = [
        p for p in paths if PurePosixPath(p).is_absolute() or ".." in PurePosixPath(p).parts or p == "manifest.json"
    ]
    if outside:
        raise InvalidData(f"{name} may not have a file called {outside[0]!r}")
    pickled = [p for p in paths if p.lower().endswith(PICKLES)]
    if kind in ("model", "adapter") and pickled:
        raise InvalidData(f"{name} has pickled weights ({enumerated(pickled)}); only safetensors are taken")
    if kind == "model" and not any(p.endswith(".safetensors") for p in paths):
        raise InvalidData(f"{name} has no .safetensors weights")
