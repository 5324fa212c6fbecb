"""What an evaluation is asked to do. Mirrors fabrictune.v1.EvaluationSpec."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import httpx
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from services.common.resources import ID_PATTERN
from services.evaluation.metrics import METRICS

BASELINE = "baseline"
API_KEY_VARIABLE = r"(?!FABRICTUNE_|AWS_)[A-Za-z0-9_]*_API_KEY"
"""Whoever may start an evaluation chooses the address, too: no other secret of the worker may be named, above all no store's."""
REPORT, REVISION = f"reports/{ID_PATTERN}", f"deployments/{ID_PATTERN}/revisions/{ID_PATTERN}"
Suite = Literal["held_out", "multi_turn", "latency"]


def _check_parts(parts: dict[str, float]) -> dict[str, float]:
    unknown = sorted(set(parts) - set(METRICS))
    if unknown:
        raise ValueError(f"there is no metric {', '.join(unknown)}; there are {', '.join(METRICS)}")
    outside = [metric for metric, least in parts.items() if not 0 <= least <= 1]
    if outside:
        raise ValueError(f"{', '.join(outside)}: values are parts from 0 to 1, such as 0.95")
    return parts


def _named(pattern: str, looks: str) -> AfterValidator:
    def check(name: str) -> str:
        if name and not re.fullmatch(pattern, name):
            raise ValueError(f"{name!r} must look like {looks}")
        return name

    return AfterValidator(check)


def _check_address(address: str) -> str:
    try:
        httpx.URL(address)
    except httpx.InvalidURL as error:
        raise ValueError(f"{address!r} is no address: {error}") from None
    return address


class Target(BaseModel):
    """Who is asked: a revision of ours, or any OpenAI-compatible address."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str = Field("", description="column name in the report; made from the model when it is empty")
    revision: Annotated[str, _named(REVISION, "deployments/an-id/revisions/an-id")] = ""
    address: Annotated[str, _named(r"https?://\S+", "http://127.0.0.1:8000/v1"), AfterValidator(_check_address)] = ""
    model: str = ""
    api_key_variable: Annotated[
        str, _named(API_KEY_VARIABLE, "OPENAI_API_KEY: a variable's name that ends in _API_KEY, never the key itself")
    ] = Field("", description="the worker's environment variable (…_API_KEY) that holds the address's API key")
    tools: bool = Field(False, description="asked with OpenAI's `tools` and answered with tool_calls")

    @model_validator(mode="after")
    def _check_one(self) -> Target:
        if bool(self.revision) == bool(self.address):
            raise ValueError("give either a revision of ours or an address")
        if self.address and not self.model:
            raise ValueError("an address needs the name of its model")
        return self


class Comparison(BaseModel):
    """What the target may not be worse than."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    than: str = Field(description='"baseline", the label of a target, a report, or a revision, which is asked, too')
    by: Annotated[dict[str, float], AfterValidator(_check_parts)] = Field(
        min_length=1, description="metric → by how much it may be worse, on the same rows"
    )

    @property
    def report(self) -> str:
        """The report that it names, or ""."""
        return self.than if re.fullmatch(REPORT, self.than) else ""

    @property
    def revision(self) -> str:
        """The revision that it names, or ""."""
        return self.than if re.fullmatch(REVISION, self.than) else ""


class Spec(BaseModel):
    """One evaluation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Annotated[str, _named(f"datasets/{ID_PATTERN}", "datasets/an-id")] = ""
    split: Annotated[Literal["test", "validation", "train"], BeforeValidator(lambda value: value or "test")] = "test"
    target: Target
    targets: tuple[Target, ...] = Field((), description="more models that are asked the same; a column each")
    constrained: bool = Field(False, description="the target is asked once more with `tools`, as one more column")
    baseline: Annotated[str, _named(REPORT, "reports/an-id")] = ""
    suites: tuple[Suite, ...] = Field((), description="of the data set's rows; held_out when it is empty")
    bfcl: Annotated[str, _named(f"datasets/{ID_PATTERN}", "datasets/an-id")] = Field(
        "", description="an artifact with files in BFCL's format, asked beside the data set or without one"
    )
    limit: int = Field(0, ge=0, description="at most so many prompts of the data set, and of BFCL's; 0 takes all")
    concurrency: int = Field(8, ge=1, le=1024)
    max_tokens: int = Field(200, ge=1, le=32768)
    temperature: float = Field(0.0, ge=0, le=2)
    gate: Annotated[dict[str, float], AfterValidator(_check_parts)] = Field(
        default_factory=dict, description="metric → least value, or the most where less is better"
    )
    not_worse: tuple[Comparison, ...] = ()

    @model_validator(mode="after")
    def _check_whole(self) -> Spec:
        if not self.dataset and not self.bfcl:
            raise ValueError("give a dataset, an artifact of BFCL files, or both")
        labels = {target.label for target in self.targets if target.label}
        for comparison in self.not_worse:
            # A baseline need not be named yet: a pipeline run fills it in.
            if not (comparison.report or comparison.revision or comparison.than in {BASELINE, *labels}):
                raise ValueError(
                    f"not_worse.than: {comparison.than!r} is neither {BASELINE}, nor the label of a target, nor "
                    "reports/an-id, nor deployments/an-id/revisions/an-id"
                )
        return self

    @property
    def follows_up(self) -> bool:
        """Whether rows are asked on after their tools' results."""
        return "multi_turn" in self.suites
