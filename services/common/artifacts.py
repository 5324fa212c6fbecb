"""Artifacts: a folder in the object store plus a manifest that is written last. Without it the artifact does not exist.

    {name}/manifest.json           put with If-None-Match: of two attempts one wins
    {name}/{attempt}/{file}        the winner's files; the manifest names the attempt

Every download is checked against the manifest's hashes; a difference is DATA_LOSS, never a warning.
"""

from __future__ import annotations

import builtins
import fcntl
import hashlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.common.errors import AlreadyExists, DataLoss, InvalidSpec, NotFound, ResourceExhausted
from services.common.manifests import (
    COLLECTIONS,
    File,
    Manifest,
    check_files,
    check_name,
    digest_of_files,
    parse_manifest,
)
from services.common.store import Store
from services.common.transfer import bytes_on_disk, download, upload

OnBytes = Callable[[int], None]


class Artifacts:
    """The artifacts of a store. cache: a folder of this machine that all its processes share."""

    def __init__(self, store: Store, cache: Path) -> None:
        self._store, self._cache = store, cache

    @property
    def store(self) -> Store:
        """Where they lie."""
        return self._store

    def get(self, name: str) -> Manifest:
        """The manifest. Raises NotFound, InvalidSpec (no artifact's name), DataLoss."""
        check_name(name)
        stored = self._store.get_json(f"{name}/manifest.json")
        if stored is None:
            raise NotFound(f"there is no artifact {name}", {"name": name})
        return parse_manifest(name, stored)

    def exists(self, name: str) -> bool:
        """Whether it is there, whole. Raises InvalidSpec (no artifact's name)."""
        check_name(name)
        return self._store.get_json(f"{name}/manifest.json") is not None

    def names(self, prefix: str) -> builtins.list[str]:
        """Names below a prefix, in order."""
        folders = self._store.list_folders(prefix)
        return [n for f in folders if self._store.get_json(f"{(n := prefix + f)}/manifest.json") is not None]

    def list(self, collection: str, page_size: int = 50, page_token: str = "") -> tuple[builtins.list[Manifest], str]:
        """A page of manifests by id, and the next page's token."""
        if collection not in COLLECTIONS:
            raise InvalidSpec(f"{collection!r} is no collection; there are {', '.join(COLLECTIONS)}")
        size = min(page_size or 50, 1000)
        after = f"{collection}/{page_token}/" if page_token else ""
        ids = self._store.list_folders(f"{collection}/", start_after=after, limit=size + 1)
        found = [self._store.get_json(f"{collection}/{i}/manifest.json") for i in ids[:size]]
        manifests = [
            parse_manifest(f"{collection}/{i}", stored)
            for i, stored in zip(ids, found, strict=False)
            if stored is not None
        ]
        return manifests, ids[size - 1] if len(ids) > size else ""

    def delete(self, name: str) -> None:
        """Delete an artifact, the manifest first. Raises NotFound."""
        self.get(name)
        self._store.delete(f"{name}/manifest.json")
        for key in list(self._store.list_keys(f"{name}/")):
            self._store.delete(key)

    def lineage(self, name: str) -> builtins.list[Manifest]:
        """The artifact and what it was made from, breadth first; what has been deleted since is left out."""
        found: builtins.list[Manifest] = []
        queue, seen = [name], {name}
        while queue:
            try:
                manifest = self.get(queue.pop(0))
            except NotFound:
                if not found:
                    raise
                continue
            found.append(manifest)
            inputs = [str(i["name"]) for i in manifest.created_by.get("inputs", ())]
            queue += [i for i in inputs if i not in seen]
            seen.update(inputs)
        return found

    def publish(
        self,
        folder: Path,
        name: str,
        kind: str,
        created_by: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        on_bytes: OnBytes = lambda _: None,
    ) -> Manifest:
        """Upload a folder and seal it. The same files under the same name: the artifact that is there.

        Raises AlreadyExists (other files), InvalidData (no files, pickled weights), errors of the store.
        """
        paths = list_files(folder)
        check_files(name, kind, [p.relative_to(folder).as_posix() for p in paths])
        attempt = new_attempt()
        files = []
        for path in paths:
            relative = path.relative_to(folder).as_posix()
            sha256 = upload(self._store, path, f"{name}/{attempt}/{relative}", on_bytes)
            files.append(File(relative, path.stat().st_size, sha256))
        return self.seal(name, kind, attempt, files, created_by or {}, metadata or {})

    def seal(
        self,
        name: str,
        kind: str,
        attempt: str,
        files: Sequence[File],
        created_by: Mapping[str, Any],
        metadata: Mapping[str, Any],
    ) -> Manifest:
        """Write the manifest of an attempt whose files are there. Raises AlreadyExists."""
        files = tuple(sorted(files, key=lambda f: f.path))
        manifest = Manifest(
            name, kind, files, digest_of_files(files), attempt, created_by, metadata, round(time.time(), 3)
        )
        if self._store.put_json(f"{name}/manifest.json", manifest.to_json(), only_if_absent=True):
            return manifest
        there = self.get(name)
        self.discard(name, attempt, [file.path for file in files])
        if there.digest == manifest.digest or (
            created_by.get("digest") and created_by["digest"] == there.created_by.get("digest")
        ):
            return there
        raise AlreadyExists(f"{name} exists with other files; take another id, or delete it", {"name": name})

    def discard(self, name: str, attempt: str, paths: Iterable[str]) -> None:
        """Delete what an attempt has uploaded, unless it is the one that counts: its seal may have got no answer and stand."""
        manifest = self._store.get_json(f"{name}/manifest.json")
        if manifest is not None and manifest.get("attempt") == attempt:
            return
        for path in paths:
            self._store.delete(f"{name}/{attempt}/{path}")

    def fetch(self, name: str, folder: Path, on_bytes: OnBytes = lambda _: None) -> Manifest:
        """Download into a new folder; goes on where an interrupted one stopped. Raises DataLoss, ResourceExhausted."""
        manifest = self.get(name)
        # Named by the digest: what is there of another artifact is no beginning of this one.
        draft = folder.with_name(f".{folder.name}.{manifest.digest[:12]}.part")
        draft.mkdir(parents=True, exist_ok=True)
        needed, free = manifest.size - bytes_on_disk(draft), shutil.disk_usage(draft).free
        if needed > free:
            raise ResourceExhausted(f"{name} needs {needed / 1e6:.0f} MB; {folder.parent} has {free / 1e6:.0f} MB free")
        for file in manifest.files:
            download(
                self._store,
                f"{name}/{manifest.attempt}/{file.path}",
                draft / file.path,
                file.size,
                file.sha256,
                on_bytes,
            )
        draft.rename(folder)
        return manifest

    def read(self, manifest: Manifest, path: str) -> bytes:
        """One small file, verified. Raises NotFound, DataLoss."""
        file = next((f for f in manifest.files if f.path == path), None)
        if file is None:
            raise NotFound(f"{manifest.name} has no {path}")
        data = self._store.get_bytes(f"{manifest.name}/{manifest.attempt}/{path}")
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise DataLoss(f"{manifest.name}/{path} is not what was stored: its hash differs")
        return data

    def read_head(self, manifest: Manifest, path: str, size: int) -> bytes:
        """The first bytes of a file, at most `size`; not verified, since a hash is one of the whole. Raises NotFound."""
        file = next((f for f in manifest.files if f.path == path), None)
        if file is None:
            raise NotFound(f"{manifest.name} has no {path}")
        # Of an empty object there is no range to ask for.
        return self._store.get_head(f"{manifest.name}/{manifest.attempt}/{path}", size) if file.size else b""

    def cached(self, name: str, digest: str = "") -> Path:
        """The artifact's folder on this machine, read-only by agreement; fetched once for all processes.

        Raises DataLoss when the artifact is not the one with `digest` any more.
        """
        manifest = self.get(name)
        if digest and manifest.digest != digest:
            raise DataLoss(
                f"{name} has changed since the job was accepted: digest {manifest.digest[:12]}, expected {digest[:12]}"
            )
        folder = self._cache / manifest.digest
        self._cache.mkdir(parents=True, exist_ok=True)
        with _lock(self._cache / f"{manifest.digest}.lock"):
            if not folder.exists():
                self.fetch(name, folder)
        return folder


def list_files(folder: Path) -> builtins.list[Path]:
    """All files below a folder, in order."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / "manifest.json")


def new_attempt() -> str:
    """A folder name for an upload that nobody else uses."""
    return f"files-{int(time.time())}-{secrets.token_hex(4)}"


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
