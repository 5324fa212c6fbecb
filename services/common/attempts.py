"""Attempts at a job: which one this is, and what it leaves when it ends."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format

from services.common.errors import Cancelled, FabrictuneError, FailedPrecondition
from services.common.store import Store

MAX_ATTEMPTS = 50
"""Of one job, whatever ended them."""


def claim_attempt(store: Store, name: str) -> int:
    """The number of the attempt that begins now, from 1; it is taken by writing it, so no two workers share one.

    Raises FailedPrecondition after MAX_ATTEMPTS: drains and lost nodes do not count against a Job's retries.
    """
    for number in range(1, MAX_ATTEMPTS + 1):
        if store.put_json(f"{name}/attempts/{number:04d}", {"time": time.time()}, only_if_absent=True):
            return number
    raise FailedPrecondition(f"{name} was begun {MAX_ATTEMPTS} times and never came to an end; see its log")


def outcome_of(
    store: Store, name: str, error: FabrictuneError | None, attempt: int, begin: float
) -> Mapping[str, Any] | None:
    """What outcome.json says of an attempt that ended so; None when another attempt goes on. begin: Unix seconds."""
    told = {"attempt": attempt, "start_time": begin, "end_time": time.time()}
    if error is None:
        return {"state": "SUCCEEDED", **told}
    if isinstance(error, Cancelled):
        asked = store.get_json(f"{name}/cancel.json") is not None
        return {"state": "CANCELLED", **told} if asked else None
    if error.exit_code == 75:
        return None  # another attempt may do better; the cluster counts them, the server writes the last word
    return {"state": "FAILED", "error": json_format.MessageToDict(error.to_status()), **told}
