"""What a pipeline run is asked to do. Mirrors fabrictune.v1.PipelineSpec.

Each stage's spec is checked by the service that does the stage (validate_only, before the run is accepted), so that no
service needs another one's code.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from services.common.resources import ID_PATTERN


def _check_deployment(name: str) -> str:
    if not re.fullmatch(f"deployments/{ID_PATTERN}", name):
        raise ValueError(f"{name!r} must look like deployments/an-id")
    return name


class DeploymentStage(BaseModel):
    """Where the model goes when it has passed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    deployment: Annotated[str, AfterValidator(_check_deployment)]
    spec: dict[str, Any] = Field(default_factory=dict, description="fabrictune.v1.RevisionSpec; model is filled in")


class Spec(BaseModel):
    """One run, from rows to a deployment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    conversion: dict[str, Any] = Field(description="fabrictune.v1.ConversionSpec")
    training: dict[str, Any] = Field(description="fabrictune.v1.TrainingSpec; dataset is filled in")
    merging: dict[str, Any] = Field(
        default_factory=dict, description="fabrictune.v1.MergeSpec; both inputs are filled in"
    )
    evaluation: dict[str, Any] | None = Field(None, description="absent: the model is not asked anything")
    deployment: DeploymentStage | None = Field(None, description="absent: nothing is deployed")
    force: bool = Field(False, description="deploys also when the gate is not met, and writes that down")
