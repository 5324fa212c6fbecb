"""What a training job is asked to do. Mirrors fabrictune.v1.TrainingSpec."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from services.common.errors import InvalidSpec
from services.common.resources import ID_PATTERN, Resources
from services.training.presets import (
    OWN,
    TUNERS,
    check_arguments,
    check_preset,
    check_together,
    fit_accumulation,
    load_preset,
    tuner_of,
)

DEFAULT_SEED = 42


def _name_in(collection: str) -> AfterValidator:
    def check(name: str) -> str:
        if not re.fullmatch(f"{collection}/{ID_PATTERN}", name):
            raise ValueError(f"{name!r} must look like {collection}/an-id")
        return name

    return AfterValidator(check)


def _whole_numbers(value: Any) -> Any:
    """JSON through google.protobuf.Value knows doubles only: 8.0 meant 8, and argparse refuses "8.0" for an int."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return value


class Spec(BaseModel):
    """One fine-tuning run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Annotated[str, _name_in("datasets")]
    base_model: Annotated[str, _name_in("models")]
    preset: str = Field("agentfabric-lora", description="a named set of ms-swift arguments")
    arguments: Annotated[dict[str, Any], BeforeValidator(_whole_numbers)] = Field(
        default_factory=dict,
        description=f"ms-swift arguments that override the preset's; {', '.join(OWN)}",
    )
    resources: Resources = Field(default_factory=lambda: Resources.model_validate({}))
    checkpoint: Literal["best", "last", "mean"] | None = Field(
        None,
        description="best by validation loss, last, or mean: of the weights over the second half of the steps; when absent, "
        "the preset's",
    )
    seed: int | None = Field(None, ge=0, lt=2**32, description=f"{DEFAULT_SEED} when absent")

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, name: str) -> str:
        if wrong := check_preset(name):
            raise ValueError(wrong[0].description)
        return name

    @field_validator("arguments")
    @classmethod
    def _known_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if wrong := check_arguments(arguments):
            raise ValueError("; ".join(f"{v.field.removeprefix('spec.arguments.')}: {v.description}" for v in wrong))
        return arguments

    @model_validator(mode="after")
    def _fits_together(self) -> Spec:
        preset = load_preset(self.preset)
        arguments = {**preset.arguments, **self.arguments}
        if wrong := check_together(arguments, self.chosen_checkpoint):
            raise ValueError("; ".join(f"{v.field.removeprefix('spec.')}: {v.description}" for v in wrong))
        batch = arguments.get("effective_batch_size", preset.effective_batch_size)
        world_size = max(self.resources.gpus, 1) * self.resources.nodes
        if batch is not None:
            try:
                fit_accumulation(int(batch), int(arguments.get("per_device_train_batch_size", 1)), world_size)
            except InvalidSpec as error:
                raise ValueError(error.violations[0].description) from None
        return self

    @property
    def chosen_checkpoint(self) -> str:
        """Which weights become the adapter: the spec's word, else the preset's."""
        return self.checkpoint or load_preset(self.preset).checkpoint

    @property
    def output(self) -> tuple[str, str]:
        """Kind and collection of what is made: an adapter, or with tuner_type full a model."""
        return TUNERS[tuner_of(load_preset(self.preset), self.arguments)]
