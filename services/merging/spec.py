"""What a merge is asked to do. Mirrors fabrictune.v1.MergeSpec."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from services.common.base_models import CHATML
from services.common.resources import ID_PATTERN

TEMPLATES: Mapping[str, str] = {"": "", "base": "", "chatml": CHATML}
"""Names that chat_template may have. Ours is ChatML without a system prompt that is added unasked."""


def _named(collection: str) -> AfterValidator:
    def check(name: str) -> str:
        if not re.fullmatch(f"{collection}/{ID_PATTERN}", name):
            raise ValueError(f"{name!r} must look like {collection}/an-id")
        return name

    return AfterValidator(check)


class WeightedAdapter(BaseModel):
    """One of several adapters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapter: Annotated[str, _named("adapters")]
    weight: float = Field(1.0, allow_inf_nan=False, description="may be negative")


class Spec(BaseModel):
    """One merge."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_model: Annotated[str, _named("models")]
    adapter: Annotated[str, _named("adapters")] | None = Field(None, description="either this or adapters")
    adapters: tuple[WeightedAdapter, ...] = Field((), description="several, or one with a weight")
    combination: Annotated[Literal["linear", "cat"], BeforeValidator(lambda value: value or "linear")] = Field(
        "linear", description="how several become one: peft's add_weighted_adapter"
    )
    engine: Annotated[Literal["stream", "peft", "swift"], BeforeValidator(lambda value: value or "stream")] = "stream"
    chat_template: str = Field("", description='"" keeps the adapter\'s or base\'s; "base", "chatml", or Jinja text')
    stream: bool = Field(False, description="from and to the object store without a copy on this machine's disk")

    @model_validator(mode="after")
    def _check(self) -> Spec:
        wrong = []
        if bool(self.adapter) == bool(self.adapters):
            wrong.append("give either adapter or adapters")
        if self.engine == "swift" and self.adapters:
            wrong.append("engine swift merges one adapter without a weight; use stream or peft for several")
        if self.stream and self.engine != "stream":
            wrong.append(f"stream: only the engine stream can do that, not {self.engine}")
        if not any(math.fabs(a.weight) > 0 for a in self.adapters) and self.adapters:
            wrong.append("adapters: all weights are 0")
        if self.chat_template not in TEMPLATES and "{" not in self.chat_template:
            known = ", ".join(name for name in TEMPLATES if name)
            wrong.append(f"chat_template: {self.chat_template!r} is neither {known}, nor the text of a Jinja template")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def inputs(self) -> Mapping[str, str]:
        """Role → artifact: base_model, and adapter or adapters/0, adapters/1, …"""
        if self.adapter:
            return {"base_model": self.base_model, "adapter": self.adapter}
        return {"base_model": self.base_model, **{f"adapters/{i}": a.adapter for i, a in enumerate(self.adapters)}}

    @property
    def adapter_roles(self) -> tuple[str, ...]:
        """The adapters among the inputs, in order."""
        return tuple(role for role in self.inputs if role != "base_model")

    @property
    def weights(self) -> tuple[float, ...] | None:
        """One for each of adapters; None for a single adapter as it is."""
        return tuple(a.weight for a in self.adapters) or None
