"""Artifacts between a folder and the object store, by the signed addresses that a server hands out.

Files stream: nothing is held in memory. A download goes to a hidden folder beside its target, goes on where it stopped,
is checked against the manifest's hashes, and is renamed at the end, so a half folder is never taken for a whole one.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import ssl
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from fabrictune.connection import read_connection
from fabrictune.errors import ApiError
from fabrictune.v1 import artifact_pb2

if TYPE_CHECKING:
    from fabrictune.client import Client

CHUNK = 1 << 20
OnBytes = Callable[[int], None]
Source = Path | Mapping[str, Path]
"""A folder with all that is in it, one file, or files by the paths that they are to have."""


def pull(client: Client, name: str, folder: Path, on_bytes: OnBytes = lambda _: None) -> artifact_pb2.Artifact:
    """Download an artifact into a new folder. Raises ApiError (DATA_LOSS when a hash differs, ALREADY_EXISTS)."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ApiError(f"{folder} exists and is not empty; choose another folder", "ALREADY_EXISTS")
    download = client.artifacts.begin_download(name)
    # Named by the digest: what is there of another artifact is no beginning of this one.
    draft = folder.with_name(f".{folder.name}.{download.artifact.digest[:12]}.part")
    needed, free = download.artifact.size_bytes - _bytes_on_disk(draft), shutil.disk_usage(_nearest(folder)).free
    if needed > free:
        raise ApiError(
            f"{name} needs {needed / 1e6:.0f} MB, but only {free / 1e6:.0f} MB are free at {folder}",
            "RESOURCE_EXHAUSTED",
        )
    with open_http(60) as http:
        for file in download.artifact.files:
            target = (draft / file.path).resolve()
            if not target.is_relative_to(draft.resolve()):
                raise ApiError(f"{name} has a file outside of its folder: {file.path!r}", "DATA_LOSS")
            _pull_file(http, download.addresses[file.path], target, file, on_bytes)
    if folder.exists():
        folder.rmdir()
    draft.mkdir(parents=True, exist_ok=True)
    draft.rename(folder)
    _forget_drafts(folder)
    return download.artifact


def push(
    client: Client,
    source: Source,
    name: str,
    kind: str,
    metadata: Mapping[str, str] | None = None,
    on_bytes: OnBytes = lambda _: None,
) -> artifact_pb2.Artifact:
    """Upload files as an artifact. Sending the same ones again returns the one that is there."""
    files = dict(_scan(source))
    if not files:
        raise ApiError(f"{source} has no files", "INVALID_ARGUMENT")
    request = artifact_pb2.CreateUploadRequest(name=name, kind=kind)
    for path, file in files.items():
        request.files.add(path=path, size_bytes=file.stat().st_size, sha256=_sha256(file))
    request.metadata.update(metadata or {})
    upload = client.artifacts.begin_upload(request)
    if upload.HasField("existing"):
        return upload.existing
    with open_http(None) as http:
        for path, file in files.items():
            headers = {"content-length": str(file.stat().st_size)}
            try:
                answer = http.put(upload.addresses[path], content=_read(file, on_bytes), headers=headers)
            except httpx.ConnectError as error:
                raise _unreachable(error) from None
            except httpx.HTTPError as error:
                raise ApiError(f"the upload of {path} broke off ({error}); run it again", "UNAVAILABLE") from None
            if answer.status_code >= 300:
                raise ApiError(
                    f"the object store refused {path}: HTTP {answer.status_code} {answer.text[:200]}", "UNAVAILABLE"
                )
    return client.artifacts.seal(upload.upload_id)


def source_size(source: Source) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for _, file in _scan(source))


def _pull_file(
    http: httpx.Client, address: str, target: Path, file: artifact_pb2.ArtifactFile, on_bytes: OnBytes
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    have = target.stat().st_size if target.exists() else 0
    if have > file.size_bytes:
        target.unlink()
        have = 0
    on_bytes(have)
    if have < file.size_bytes or file.size_bytes == 0:
        headers = {"range": f"bytes={have}-"} if have else {}
        try:
            with http.stream("GET", address, headers=headers) as answer, target.open("ab" if have else "wb") as out:
                if answer.status_code >= 300:
                    answer.read()
                    raise ApiError(f"the object store refused {file.path}: HTTP {answer.status_code}", "UNAVAILABLE")
                for chunk in answer.iter_bytes(CHUNK):
                    out.write(chunk)
                    on_bytes(len(chunk))
        except httpx.ConnectError as error:
            raise _unreachable(error) from None
        except httpx.HTTPError as error:
            raise ApiError(
                f"the download of {file.path} broke off ({error}); run it again to go on", "UNAVAILABLE"
            ) from None
    if _sha256(target) != file.sha256:
        target.unlink()
        raise ApiError(f"{file.path} is not what the manifest says (sha256 differs); it was thrown away", "DATA_LOSS")


class _Forwarded(httpx.BaseTransport):
    """Reaches a store that only answers inside a cluster through the ports that `fabrictune connect` forwards.

    The request keeps its Host, which the address's signature covers, and TLS asks for the store's own name.
    """

    def __init__(self, ports: Mapping[str, str], ca_file: str) -> None:
        trust = ssl.create_default_context()
        if ca_file:
            trust.load_verify_locations(ca_file)
        self._ports, self._inner = ports, httpx.HTTPTransport(verify=trust)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send it."""
        url = request.url
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        here = self._ports.get(f"{url.host}:{port}")
        if here:
            host, _, number = here.rpartition(":")
            request.extensions["sni_hostname"] = url.host
            request.url = url.copy_with(host=host, port=int(number))
        return self._inner.handle_request(request)

    def close(self) -> None:
        """Close the connections."""
        self._inner.close()


def open_http(timeout: float | None) -> httpx.Client:
    """A client for the object store's signed addresses, through the ports of `fabrictune connect` where there are some."""
    said = read_connection()
    if not said.get("s3"):
        return httpx.Client(timeout=timeout)
    return httpx.Client(timeout=timeout, transport=_Forwarded(said["s3"], str(said.get("ca_file") or "")))


def _unreachable(error: httpx.ConnectError) -> ApiError:
    return ApiError(
        f"the object store at {error.request.headers['host']} cannot be reached from here ({error}); `fabrictune connect` "
        "forwards one that only answers inside its cluster",
        "UNAVAILABLE",
    )


def _scan(source: Source) -> Iterator[tuple[str, Path]]:
    if not isinstance(source, Path):
        yield from source.items()
        return
    if source.is_file():
        yield source.name, source
        return
    for file in sorted(source.rglob("*")):
        if file.is_file() and file != source / "manifest.json":
            yield file.relative_to(source).as_posix(), file


def _read(file: Path, on_bytes: OnBytes) -> Iterator[bytes]:
    with file.open("rb") as data:
        while chunk := data.read(CHUNK):
            on_bytes(len(chunk))
            yield chunk


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _bytes_on_disk(draft: Path) -> int:
    """What a download that broke off has taken already."""
    stats = (file.stat() for file in draft.rglob("*") if file.is_file())
    return sum(min(stat.st_blocks * 512, stat.st_size) for stat in stats)


def _forget_drafts(folder: Path) -> None:
    """The folder is there now: what was begun of other artifacts under its name will never go on."""
    ours = re.compile(rf"\.{re.escape(folder.name)}(\.[0-9a-f]{{12}})?\.part")
    for draft in folder.parent.glob(".*.part"):
        if ours.fullmatch(draft.name):
            shutil.rmtree(draft, ignore_errors=True)


def _nearest(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
