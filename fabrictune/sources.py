"""Where rows come from: a path, an https address, another bucket, a model hub, or a name that the original recipe uses.

    rows/train.jsonl · folder          read where they are
    datasets/ID                        an artifact, used as it is
    https://host/rows.jsonl[.gz|.zst]  also .parquet; http on loopback only
    s3://bucket/prefix                 any S3: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, keys from AWS_…
    hf:ORG/NAME[:SUBSET][@REVISION]    Hugging Face (HF_ENDPOINT, HF_TOKEN)
    ms:ORG/NAME[:SUBSET][@REVISION]    ModelScope (MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN)
    ms-agent, …                        see ALIASES

A stage reads artifacts only, so what is elsewhere is fetched here, by the one who submits. It is kept in
`{FABRICTUNE_DATA_DIR}/sources`, a folder for each source, and is fetched again only when it has changed.
FABRICTUNE_MAX_SOURCE_BYTES (20 GB) bounds each of them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from fabrictune.errors import ApiError
from fabrictune.row_files import SUFFIXES, check_rows, kept_name, may_hold_rows, names_rows

if TYPE_CHECKING:
    from fabrictune.download import OnProgress

MAX_BYTES = 20_000_000_000
HUB = re.compile(r"(hf|ms):([\w.-]+/[\w.-]+?)(?::([\w.-]+))?(?:@([\w./-]+))?")
SPELLINGS = "a path, datasets/ID, https://…, s3://BUCKET/PREFIX, hf:ORG/NAME or ms:ORG/NAME"


class Alias(NamedTuple):
    """A data set of the original recipe."""

    uri: str
    format: str
    layout: str


ALIASES: Mapping[str, Alias] = {
    "ms-agent": Alias("ms:iic/ms_agent", "ms_agent", "both"),
    # Of the default subset only the system prompts were converted, and those not right: ms-agent is what it was made from.
    "ms-agent-for-agentfabric-default": Alias(
        "ms:AI-ModelScope/ms_agent_for_agentfabric:default", "agentfabric", "both"
    ),
    "ms-agent-for-agentfabric-addition": Alias(
        "ms:AI-ModelScope/ms_agent_for_agentfabric:addition", "agentfabric", "both"
    ),
    "ms-bench": Alias("ms:iic/ms_bench", "chat", "split"),
}
"""The names that the recipe's training command uses."""


class Rows(NamedTuple):
    """Rows on this machine."""

    path: Path
    """A file, or a folder of them and of nothing else."""
    origin: str = ""
    """Where they were fetched from, without secrets; "" for a path of the user's."""


def resolve_alias(source: Mapping[str, Any]) -> dict[str, Any]:
    """A conversion's source with its alias, if it is one, put into uri, format and layout; what is given wins."""
    alias = ALIASES.get(str(source.get("uri", "")))
    if alias is None:
        return dict(source)
    given = {key: value for key, value in source.items() if key != "uri" and value}
    return {**source, **alias._asdict(), **given}


def is_artifact(uri: str) -> bool:
    """Whether a source is an artifact's name."""
    return uri.startswith("datasets/")


def is_remote(uri: str) -> bool:
    """Whether a source must be fetched."""
    return "://" in uri or uri.startswith(("hf:", "ms:"))


def public_uri(uri: str) -> str:
    """A source as it may be written down: a signed address loses its signature."""
    if not uri.startswith(("http://", "https://")):
        return uri
    from fabrictune.addresses import shown

    return shown(uri)


def find_rows(uri: str, folder: Path = Path(), on_progress: OnProgress = lambda _have, _total: None) -> Rows:
    """The rows of a source, fetched when they are elsewhere. Raises ApiError, and errors of the services' tree.

    uri: any source but an artifact; a path is relative to `folder`.
    """
    if not is_remote(uri):
        path = folder / uri
        if not path.exists():
            known = f", or a name of the recipe's ({', '.join(ALIASES)})" if "/" not in uri and "." not in uri else ""
            raise ApiError(f"there are no rows at {path}: give {SPELLINGS}{known}", "NOT_FOUND")
        return Rows(path)
    scheme = re.split(r":(?://)?", uri, maxsplit=1)[0]
    fetch = _FETCHERS.get(scheme)
    if fetch is None:
        raise ApiError(f"{uri!r} is no source of rows: give {SPELLINGS}", "INVALID_ARGUMENT")
    return fetch(uri, _cache_of(uri), _max_bytes(), on_progress)


def _fetch_web(uri: str, cache: Path, max_bytes: int, on_progress: OnProgress) -> Rows:
    from fabrictune.addresses import check_address, shown
    from fabrictune.download import download

    name = unquote(PurePosixPath(check_address(uri).path).name)
    if not may_hold_rows(name) or "/" in name:
        raise ApiError(f"{shown(uri)} names no rows: it must end in one of {', '.join(SUFFIXES)}", "INVALID_ARGUMENT")
    target = cache / "rows" / kept_name(name)
    download(uri, target, cache / "work", max_bytes, on_progress)
    _check_fetched(target, shown(uri))
    return Rows(target, shown(uri))


def _fetch_bucket(uri: str, cache: Path, max_bytes: int, on_progress: OnProgress) -> Rows:
    from fabrictune import local
    from fabrictune.download import download

    trust, found = local.sign_bucket_rows(uri, names_rows)
    total = sum(file.size for file in found)
    if total > max_bytes:
        raise _too_large(uri, total, max_bytes)
    targets = {_inside(cache / "rows", kept_name(file.path), uri): file for file in found}
    _forget_others(cache / "rows", targets)
    before = 0
    for target, file in targets.items():
        work = cache / "work" / hashlib.sha256(file.path.encode()).hexdigest()[:16]
        download(file.address, target, work, max_bytes, _after(before, total, on_progress), trust)
        _check_fetched(target, f"{uri} {file.path}")
        before += file.size
    return Rows(_alone(cache / "rows", targets), uri)


def _fetch_hub(uri: str, cache: Path, max_bytes: int, on_progress: OnProgress) -> Rows:
    match = HUB.fullmatch(uri)
    if match is None:
        raise ApiError(f"{uri!r} must look like {uri[:2]}:ORG/NAME, …:SUBSET, or …@REVISION", "INVALID_ARGUMENT")
    from fabrictune import local

    hub, name, subset, revision = match.groups()
    fetched = local.fetch_hub_rows(hub, name, subset or "", revision or "", cache / "work", may_hold_rows, max_bytes)
    on_progress(fetched.size, fetched.size)
    targets = {_inside(cache / "rows", kept_name(path), uri): fetched.folder / path for path in fetched.paths}
    _forget_others(cache / "rows", targets)
    for target, file in targets.items():
        _check_fetched(file, f"{uri} {file.relative_to(fetched.folder)}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.hardlink_to(file)
    named = f"{hub}:{name}" + (f":{subset}" if subset else "") + f"@{fetched.revision}"
    return Rows(_alone(cache / "rows", targets), named)


_FETCHERS: Mapping[str, Callable[[str, Path, int, OnProgress], Rows]] = {
    "https": _fetch_web,
    "http": _fetch_web,
    "s3": _fetch_bucket,
    "hf": _fetch_hub,
    "ms": _fetch_hub,
}


def _cache_of(uri: str) -> Path:
    """A folder for one source; its name tells a reader which."""
    data_dir = Path(os.environ.get("FABRICTUNE_DATA_DIR", ".fabrictune"))
    stem = re.sub(r"[^a-z0-9]+", "-", public_uri(uri).lower()).strip("-")[-40:].strip("-")
    return data_dir / "sources" / f"{stem}-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"


def _max_bytes() -> int:
    said = os.environ.get("FABRICTUNE_MAX_SOURCE_BYTES", "")
    if not said:
        return MAX_BYTES
    if not said.isdigit() or not int(said):
        raise ApiError(f"FABRICTUNE_MAX_SOURCE_BYTES is {said!r}; it must be a number of bytes", "INVALID_ARGUMENT")
    return int(said)


def _check_fetched(file: Path, origin: str) -> None:
    """What is no rows file is not kept, so that it is asked for again."""
    try:
        check_rows(file, origin)
    except ApiError:
        file.unlink()
        raise


def _inside(folder: Path, path: str, uri: str) -> Path:
    """Raises ApiError when a listed path leads out of the folder."""
    target = (folder / path).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise ApiError(f"{uri} lists a file outside of its folder: {path!r}", "DATA_LOSS")
    return target


def _after(before: int, total: int, on_progress: OnProgress) -> OnProgress:
    """Progress of one of several files, told as that of all."""
    return lambda have, _total: on_progress(before + have, total)


def _forget_others(folder: Path, wanted: Mapping[Path, Any]) -> None:
    """What the source has no more goes."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.rglob("*"):
        if not file.is_dir() and file.resolve() not in wanted:
            file.unlink()


def _alone(folder: Path, targets: Mapping[Path, Any]) -> Path:
    """One file is given as that file."""
    return next(iter(targets)) if len(targets) == 1 else folder


def _too_large(uri: str, size: int, max_bytes: int) -> ApiError:
    return ApiError(
        f"{uri} has {size} bytes of rows, more than {max_bytes}; FABRICTUNE_MAX_SOURCE_BYTES sets the limit",
        "RESOURCE_EXHAUSTED",
    )
