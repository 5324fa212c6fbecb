"""Artifacts that are read and written in place: by ranges of their files, and as a stream. For stages whose data is larger than
the disk of the machine that works on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from services.common.artifacts import Artifacts, new_attempt
from services.common.errors import DataLoss, NotFound
from services.common.manifests import File, Manifest, check_files
from services.common.store import Store
from services.common.transfer import upload_chunks


class RemoteArtifact:
    """An artifact in the store. Threads may share it."""

    def __init__(self, store: Store, artifacts: Artifacts, name: str, digest: str = "") -> None:
        """Raises NotFound, DataLoss when it is not the one with `digest` any more."""
        self._store, self._artifacts = store, artifacts
        self._manifest = artifacts.get(name)
        if digest and self._manifest.digest != digest:
            found = self._manifest.digest[:12]
            raise DataLoss(f"{name} has changed since the job was accepted: digest {found}, expected {digest[:12]}")
        self._files = {file.path: file for file in self._manifest.files}

    @property
    def name(self) -> str:
        """Such as "models/m1"."""
        return self._manifest.name

    @property
    def sizes(self) -> Mapping[str, int]:
        """File → bytes."""
        return {file.path: file.size for file in self._files.values()}

    def sha256_of(self, path: str) -> str:
        """What the manifest says of a file. Raises NotFound."""
        return self._file(path).sha256

    def read(self, path: str) -> bytes:
        """A small file, verified. Raises NotFound, DataLoss."""
        return self._artifacts.read(self._manifest, path)

    def read_range(self, path: str, begin: int, end: int) -> bytes:
        """Bytes of a file; not verified, since a hash is one of the whole. Raises NotFound, DataLoss (they are not there)."""
        return _read_range(self._store, f"{self.name}/{self._manifest.attempt}/{self._file(path).path}", begin, end)

    def fetch(self) -> Path:
        """All of it as a folder of this machine, verified."""
        return self._artifacts.cached(self.name, self._manifest.digest)

    def _file(self, path: str) -> File:
        if path not in self._files:
            raise NotFound(f"{self.name} has no {path}")
        return self._files[path]


class RemoteDraft:
    """An artifact that is being written. It exists once it is sealed; until then nobody sees it. Use it in a `with`."""

    def __init__(self, store: Store, artifacts: Artifacts, name: str, kind: str) -> None:
        self._store, self._artifacts = store, artifacts
        self._name, self._kind, self._attempt = name, kind, new_attempt()
        self._files: dict[str, File] = {}
        self._begun: list[str] = []
        self._is_sealed = False

    def __enter__(self) -> RemoteDraft:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_sealed:
            self._artifacts.discard(self._name, self._attempt, self._begun)

    @property
    def sizes(self) -> dict[str, int]:
        """File → bytes, of those that are written."""
        return {file.path: file.size for file in self._files.values()}

    def write(self, path: str, size: int, chunks: Iterator[Any]) -> File:
        """Upload a file of `size` bytes from a stream. Raises what `chunks` raises, and errors of the store."""
        self._begun.append(path)
        file = File(path, size, upload_chunks(self._store, self._key(path), size, chunks))
        self._files[path] = file
        return file

    def read_range(self, path: str, begin: int, end: int) -> bytes:
        """Bytes of a file that is written."""
        return _read_range(self._store, self._key(path), begin, end)

    def seal(self, created_by: Mapping[str, Any], metadata: Mapping[str, Any]) -> Manifest:
        """Make it exist. Raises InvalidData (no files, pickled weights), AlreadyExists."""
        check_files(self._name, self._kind, list(self._files))
        files = list(self._files.values())
        manifest = self._artifacts.seal(self._name, self._kind, self._attempt, files, created_by, metadata)
        self._is_sealed = True  # or another attempt has won, and ours was deleted
        return manifest

    def _key(self, path: str) -> str:
        return f"{self._name}/{self._attempt}/{path}"


def _read_range(store: Store, key: str, begin: int, end: int) -> bytes:
    data = store.get_range(key, begin, end)
    if len(data) != end - begin:
        raise DataLoss(f"{key} ends at byte {begin + len(data)}, {end} was expected")
    return data
