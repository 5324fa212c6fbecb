"""Hugging Face and ModelScope, asked by their own libraries: whatever these raise becomes one of our errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from services.common.errors import (
    FabrictuneError,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)


@contextmanager
def asking(name: str, hub: str) -> Iterator[None]:
    """What a hub's library raises becomes one of our errors that says what to do."""
    try:
        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)  # it tells of every page that it lists
        yield
    except FabrictuneError:
        raise
    except ImportError as error:
        raise FailedPrecondition(f"{error.name} is not installed here: run `make setup`") from None
    except Exception as error:
        # Neither library has one root for its errors, nor imports at this module's import; their classes' names are stable.
        for kind in type(error).__mro__:
            if kind.__name__ in _ERRORS:
                raised, text = _ERRORS[kind.__name__]
                raise raised(f"{hub}:{name} {text} ({_first_line(error)})") from None
        raise


_ERRORS: Mapping[str, tuple[type[FabrictuneError], str]] = {
    # huggingface_hub
    "GatedRepoError": (PermissionDenied, "is shown to those only who have asked for it; HF_TOKEN says who you are"),
    "RevisionNotFoundError": (NotFound, "has no such revision"),
    "RepositoryNotFoundError": (NotFound, "is not there, or not for you; HF_TOKEN says who you are"),
    "EntryNotFoundError": (NotFound, "has no such file"),
    "HFValidationError": (NotFound, "is no name of a repository"),
    "OfflineModeIsEnabled": (Unavailable, "cannot be had: HF_HUB_OFFLINE is set"),
    # modelscope_hub
    "NotExistError": (NotFound, "is not there, or not for you; MODELSCOPE_API_TOKEN says who you are"),
    "AuthenticationError": (Unauthenticated, "wants to know who you are: set MODELSCOPE_API_TOKEN"),
    "PermissionDeniedError": (PermissionDenied, "is not for you; MODELSCOPE_API_TOKEN says who you are"),
    "HubError": (Unavailable, "cannot be had from the hub"),
    # both: httpx's and requests' roots, and the system's
    "HTTPError": (Unavailable, "cannot be had from the hub. Is this machine online? A folder works, too"),
    "RequestException": (Unavailable, "cannot be had from the hub. Is this machine online? A folder works, too"),
    "OSError": (Unavailable, "cannot be had from the hub. Is this machine online? A folder works, too"),
}
"""Class → our error and what it says; the most special class of an error counts."""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
