"""A folder becomes a repository on a model hub, by the hub's own library. Private, unless the user says otherwise.

A repository that exists and is public is not written to unless that was said: nothing becomes public by mistake.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from services.common.errors import FailedPrecondition, Unauthenticated
from services.common.hubs import asking

REPOSITORIES: Mapping[str, str] = {"dataset": "dataset", "rows": "dataset", "adapter": "model", "model": "model"}
"""Kind of artifact → kind of repository."""
TOKENS: Mapping[str, str] = {"hf": "HF_TOKEN", "ms": "MODELSCOPE_API_TOKEN"}


class Published(NamedTuple):
    """Where it is."""

    address: str
    private: bool


def publish(
    hub: str, name: str, kind: str, folder: Path, public: bool = False, license_id: str = "", message: str = ""
) -> Published:
    """Upload a folder as hub:name, made first when it is not there. kind: the artifact's, see REPOSITORIES.

    Raises Unauthenticated (no token), PermissionDenied, FailedPrecondition (public already), Unavailable.
    """
    token = read_token(hub)
    with asking(name, hub):
        return _PUBLISHERS[hub](name, REPOSITORIES[kind], folder, public, license_id, message, token)


def read_token(hub: str) -> str:
    """The user's token for a hub. Raises Unauthenticated."""
    token = os.environ.get(TOKENS[hub], "")
    if not token:
        raise Unauthenticated(f"publishing needs a token that may write: set {TOKENS[hub]}")
    return token


def _publish_hf(
    name: str, kind: str, folder: Path, public: bool, license_id: str, message: str, token: str
) -> Published:
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    url = api.create_repo(name, repo_type=kind, private=not public, exist_ok=True)
    private = bool(api.repo_info(name, repo_type=kind).private)
    _check_private(str(url), private, public)
    api.upload_folder(repo_id=name, repo_type=kind, folder_path=folder, commit_message=message)
    return Published(str(url), private)


def _publish_ms(
    name: str, kind: str, folder: Path, public: bool, license_id: str, message: str, token: str
) -> Published:
    import modelscope_hub

    api = modelscope_hub.HubApi(token=token)
    address = f"{modelscope_hub.HubConfig().endpoint}/{kind}s/{name}"
    if not api.repo_exists(name, kind):
        # Without a licence the library would claim Apache-2.0.
        api.create_repo(name, kind, visibility="public" if public else "private", license=license_id or "other")
    found = api.get_repo(name, kind)
    # Only what is surely private counts: the hub tells it in one of two fields.
    private = found.private is True or getattr(found.visibility, "name", "") in ("PRIVATE", "INTERNAL")
    _check_private(address, private, public)
    api.upload_folder(name, kind, folder, commit_message=message, use_cache=False)
    return Published(address, private)


def _check_private(address: str, private: bool, public: bool) -> None:
    if not private and not public:
        raise FailedPrecondition(f"{address} is public already; --public says that this is meant. Nothing was uploaded")


_PUBLISHERS: Mapping[str, Callable[[str, str, Path, bool, str, str, str], Published]] = {
    "hf": _publish_hf,
    "ms": _publish_ms,
}
