"""What a merge is asked to do. Mirrors fabrictune.v1.MergeSpec."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from services.common.resources import ID_PATTERN


def _named(collection: str) -> AfterValidator:
    def check(name: str) -> str:
        if not re.fullmatch(f"{collection}/{ID_PATTERN}", name):
            raise ValueError(f"{name!r} must look like {collection}/an-id")
        return name

    return AfterValidator(check)


class Spec(BaseModel):
    """One merge."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_model: Annotated[str, _named("models")]
    adapter: Annotated[str, _named("adapters")]
    engine: Annotated[Literal["stream", "peft"], BeforeValidator(lambda value: value or "stream")] = "stream"
