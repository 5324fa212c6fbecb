"""What an evaluation is asked to do. Mirrors fabrictune.v1.EvaluationSpec."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from services.common.resources import ID_PATTERN
from services.evaluation.metrics import METRICS


def _check_gate(gate: dict[str, float]) -> dict[str, float]:
    unknown = sorted(set(gate) - set(METRICS))
    if unknown:
        raise ValueError(f"there is no metric {', '.join(unknown)}; there are {', '.join(METRICS)}")
    outside = [metric for metric, least in gate.items() if not 0 <= least <= 1]
    if outside:
        raise ValueError(f"{', '.join(outside)}: thresholds are parts from 0 to 1, such as 0.95")
    return gate


def _named(pattern: str, looks: str) -> AfterValidator:
    def check(name: str) -> str:
        if name and not re.fullmatch(pattern, name):
            raise ValueError(f"{name!r} must look like {looks}")
        return name

    return AfterValidator(check)


class Target(BaseModel):
    """Who is asked: a revision of ours, or any OpenAI-compatible address."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str = Field("", description="column name in the report; made from the model when it is empty")
    revision: Annotated[
        str, _named(f"deployments/{ID_PATTERN}/revisions/{ID_PATTERN}", "deployments/an-id/revisions/an-id")
    ] = ""
    address: Annotated[str, _named(r"https?://\S+", "http://host:port/v1")] = ""
    model: str = ""
    api_key_variable: str = Field("", description="the worker's environment variable that holds the address's API key")

    @model_validator(mode="after")
    def _check_one(self) -> Target:
        if bool(self.revision) == bool(self.address):
            raise ValueError("give either a revision of ours or an address")
        if self.address and not self.model:
            raise ValueError("an address needs the name of its model")
        return self


class Spec(BaseModel):
    """One evaluation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Annotated[str, _named(f"datasets/{ID_PATTERN}", "datasets/an-id")]
    split: Annotated[Literal["test", "validation", "train"], BeforeValidator(lambda value: value or "test")] = "test"
    target: Target
    baseline: Annotated[str, _named(f"reports/{ID_PATTERN}", "reports/an-id")] = ""
    limit: int = Field(0, ge=0, description="at most so many prompts; 0 takes all")
    concurrency: int = Field(8, ge=1, le=1024)
    max_tokens: int = Field(200, ge=1, le=32768)
    temperature: float = Field(0.0, ge=0, le=2)
    gate: Annotated[dict[str, float], AfterValidator(_check_gate)] = Field(default_factory=dict)
