"""Where a job may run and for how long: the part that all specs share, and the values they share it with."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from services.common.errors import InvalidSpec, Violation

ID_PATTERN = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"
_SECONDS = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)?")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _parse_seconds(value: Any) -> Any:
    if isinstance(value, str) and (match := _SECONDS.fullmatch(value.strip())):
        return float(match[1]) * _UNITS[match[2] or "s"]
    return value


Seconds = Annotated[
    float,
    BeforeValidator(_parse_seconds),
    Field(ge=0),
    PlainSerializer(lambda value: f"{value}s", return_type=str, when_used="json"),
]
"""A duration in seconds; "300s", "5m", "2h" and "1d" are accepted, as is protobuf's JSON form of Duration."""


class Resources(BaseModel):
    """Mirrors fabrictune.v1.Resources."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: int = Field(0, ge=0, description="GPUs for each node; 0 runs on the CPU")
    nodes: int = Field(1, ge=1)
    cpu: str = Field("", description="a Kubernetes quantity, such as 4 or 500m")
    memory: str = Field("", description="a Kubernetes quantity, such as 16Gi")
    queue_timeout: Seconds = Field(0, description="how long it may wait for a place to run; 0: no limit")
    run_timeout: Seconds = Field(0, description="how long it may run once it has one; 0: no limit")


def check_id(value: str, field: str) -> str:
    """The id, if it is one. Raises InvalidSpec."""
    if not re.fullmatch(ID_PATTERN, value):
        raise InvalidSpec(f"{value!r} is no id", violations=[Violation(field, f"must match {ID_PATTERN}")])
    return value


def split_name(name: str, *collections: str) -> tuple[str, ...]:
    """Take the ids out of a resource name.

    ("deployments/d/revisions/r", "deployments", "revisions") → ("d", "r").

    Raises InvalidSpec.
    """
    match = re.fullmatch("/".join(f"{c}/({ID_PATTERN})" for c in collections), name)
    if match is None:
        looks = "/".join(f"{c}/an-id" for c in collections)
        raise InvalidSpec(f"{name!r} must look like {looks}", violations=[Violation("name", f"must look like {looks}")])
    return match.groups()[::2]
