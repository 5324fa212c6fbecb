"""Rows of a data set on a model hub: Hugging Face or ModelScope, by each hub's own library.

Only files that hold rows are fetched. Which of them make up a subset is said by the data set's card (`configs`), by
ModelScope's older `NAME.json`, or by the files' own names, in this order.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import yaml

from services.common.errors import NotFound, ResourceExhausted, enumerated
from services.common.hubs import asking

CARD = "README.md"
LOOSE = ".json"
# Of .json files that hubs keep beside the rows; what they hold are no rows.
NO_ROWS = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
    "configuration.json",
)


class Fetched(NamedTuple):
    """Rows files below a folder."""

    folder: Path
    paths: tuple[str, ...]
    revision: str
    size: int


@dataclass(frozen=True)
class Listing:
    """The files of a data set: path → bytes."""

    revision: str
    """A commit where the hub tells it."""
    sizes: Mapping[str, int]


class Hub(Protocol):
    """What is asked of a hub's library."""

    def list_files(self, name: str, revision: str) -> Listing:
        """The files."""

    def fetch(self, name: str, revision: str, paths: Sequence[str], folder: Path) -> None:
        """Bring some of them into a folder; goes on where an earlier call stopped."""


def fetch_rows(
    hub: str, name: str, subset: str, revision: str, folder: Path, names_rows: Callable[[str], bool], max_bytes: int
) -> Fetched:
    """Fetch a data set's rows files into a folder. hub: "hf" or "ms"; subset, revision: "" takes all, and the newest.

    Raises NotFound (data set, revision, subset), Unauthenticated, PermissionDenied, ResourceExhausted, Unavailable.
    """
    library = HUBS[hub]()
    listing = library.list_files(name, revision)
    about = [CARD, f"{name.partition('/')[2]}{LOOSE}"] if subset else []
    about = [path for path in about if path in listing.sizes]
    if about:
        library.fetch(name, listing.revision, about, folder)
    told = {path: (folder / path).read_text(encoding="utf-8", errors="replace") for path in about}
    paths = select_rows(list(listing.sizes), subset, names_rows, told)
    if not paths:
        has = enumerated(sorted(path for path in listing.sizes if names_rows(path)), 20)
        what = f"no subset {subset!r}" if subset else "no rows files"
        raise NotFound(f"{hub}:{name} has {what}; its rows files are: {has or 'none'}")
    size = sum(listing.sizes[path] for path in paths)
    if size > max_bytes:
        raise ResourceExhausted(
            f"{hub}:{name} has {size} bytes of rows, more than {max_bytes}; FABRICTUNE_MAX_SOURCE_BYTES sets the limit"
        )
    library.fetch(name, listing.revision, paths, folder)
    return Fetched(folder, tuple(paths), listing.revision, size)


def select_rows(
    paths: Sequence[str], subset: str, names_rows: Callable[[str], bool], told: Mapping[str, str]
) -> list[str]:
    """The rows files of a subset, in order. told: path → text of the files that tell subsets (see the module)."""
    rows = [p for p in sorted(paths) if names_rows(p) and PurePosixPath(p).name not in (*NO_ROWS, *told)]
    # A .json file is a data set's only rows, or something else.
    rows = [p for p in rows if not p.lower().endswith(LOOSE)] or rows
    if not subset:
        return rows
    patterns = _patterns_of_card(told.get(CARD, ""), subset)
    for path, text in told.items():
        patterns = patterns or (_patterns_of_meta(text, subset) if path != CARD else [])
    if patterns:
        return [p for p in rows if any(_fits(p, pattern) for pattern in patterns)]
    return [p for p in rows if _is_named(p, subset)]


def _patterns_of_card(card: str, subset: str) -> list[str]:
    """data_files of the card's config: a pattern, a list of them, or a list of {split, path}."""
    front = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    try:
        known = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return []
    configs = known.get("configs") if isinstance(known, dict) else None
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict) and config.get("config_name") == subset:
            return list(_texts(config.get("data_files"), keys=("path",)))
    return []


def _patterns_of_meta(text: str, subset: str) -> list[str]:
    """{subset: {split: {"meta": FILE, …}}}."""
    try:
        known = json.loads(text)
    except ValueError:
        return []
    return list(_texts(known.get(subset), keys=None)) if isinstance(known, dict) else []


def _texts(value: Any, keys: tuple[str, ...] | None) -> Iterator[str]:
    """All texts inside a value; of mappings only those under `keys`, unless that is None."""
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, keys)
    elif isinstance(value, dict):
        for key, item in value.items():
            if keys is None or key in keys:
                yield from _texts(item, keys)


def _fits(path: str, pattern: str) -> bool:
    return path == pattern or fnmatch.fnmatchcase(path, pattern.replace("**/", "*").removeprefix("./"))


def _is_named(path: str, subset: str) -> bool:
    """Whether a part of the path is the subset's name: addition/a.jsonl, train_addition.jsonl; not additional.jsonl."""
    words, wanted = (re.split(r"[^a-z0-9]+", text.lower()) for text in (path, subset))
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words)))


class HuggingFace:
    """By huggingface_hub; HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are its own settings."""

    def list_files(self, name: str, revision: str) -> Listing:
        """The files, and the commit that they are of."""
        with asking(name, "hf"):
            import huggingface_hub

            info = huggingface_hub.HfApi().dataset_info(name, revision=revision or None, files_metadata=True)
            return Listing(str(info.sha), {file.rfilename: int(file.size or 0) for file in info.siblings or ()})

    def fetch(self, name: str, revision: str, paths: Sequence[str], folder: Path) -> None:
        """See Hub."""
        with asking(name, "hf"):
            import huggingface_hub

            huggingface_hub.snapshot_download(
                name,
                repo_type="dataset",
                revision=revision,
                local_dir=folder,
                allow_patterns=[_literal(p) for p in paths],
            )


class ModelScope:
    """By modelscope_hub; MODELSCOPE_ENDPOINT and MODELSCOPE_API_TOKEN are its own settings."""

    def list_files(self, name: str, revision: str) -> Listing:
        """The files. The hub does not tell the commit."""
        with asking(name, "ms"):
            import modelscope_hub

            found = modelscope_hub.HubApi().list_repo_files(name, "dataset", revision=revision or None)
            return Listing(revision or "master", {f.path: int(f.size or 0) for f in found if f.type != "tree"})

    def fetch(self, name: str, revision: str, paths: Sequence[str], folder: Path) -> None:
        """See Hub."""
        with asking(name, "ms"):
            import modelscope_hub

            modelscope_hub.HubApi().download_repo(
                name, "dataset", revision=revision, local_dir=folder, allow_patterns=[_literal(p) for p in paths]
            )


HUBS: Mapping[str, Callable[[], Hub]] = {"hf": HuggingFace, "ms": ModelScope}


def _literal(path: str) -> str:
    """A pattern that fits this path only."""
    return re.sub(r"([*?\[])", r"[\1]", path)
