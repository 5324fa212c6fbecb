"""What a revision is asked to be: which model, how it is computed, how close it must come to its reference.

Mirrors fabrictune.v1.RevisionSpec. `engine_args` go to the engine as they are; the few flags that fabrictune sets from
other fields are refused there by name (`engines`), since engines let the later of two win without a word.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from services.common.errors import InvalidSpec
from services.common.resources import ID_PATTERN, Resources, Seconds
from services.common.validation import violations_of
from services.inference.engines import ENGINES, Engine, EngineName

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _check_model(name: str) -> str:
    if not re.fullmatch(f"models/{ID_PATTERN}", name):
        raise ValueError(f"{name!r} must look like models/an-id; `fabrictune models list` shows which there are")
    return name


def _check_engine_args(args: tuple[str, ...]) -> tuple[str, ...]:
    if args and not args[0].startswith("-"):
        raise ValueError(f"must begin with a flag such as --swap-space, not {args[0]!r}")
    for arg in args:
        if "\0" in arg or "{port}" in arg:
            raise ValueError(f"{arg!r} holds what an argument cannot hold")
    return args


def _owned_flag(arg: str, engine: Engine) -> str:
    """What to do instead of naming a flag that fabrictune sets; empty when it may be named."""
    flag = arg.partition("=")[0].replace("_", "-")
    if not flag.startswith("-") or len(flag) <= 2:
        return ""
    if flag in engine.owned:
        return f"{flag} is set by fabrictune and cannot be given here: {engine.owned[flag]}"
    # argparse also takes any unambiguous beginning of a flag, so --max-model is --max-model-len.
    owned = next((o for o in engine.owned if o.startswith(flag)), "")
    return f"{flag} is set by fabrictune and cannot be given here: {engine.owned[owned]}" if owned else ""


def _check_adapters(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if not re.fullmatch(f"adapters/{ID_PATTERN}", name):
            raise ValueError(f"{name!r} must look like adapters/an-id")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"{', '.join(twice)} stands there twice")
    return names


class Parity(BaseModel):
    """How close the engine must come to the reference."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_agreement: float = Field(
        default=0.99, gt=0, le=1, description="least part of positions at which the top tokens agree"
    )
    max_logprob_difference: float | None = Field(
        default=None, gt=0, description="largest mean difference, nats; absent: from the dtype"
    )


class Lora(BaseModel):
    """Room for adapters, set aside when the engine starts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_adapters: int | None = Field(
        default=None, ge=0, le=64, description="adapters loaded at a time; absent: as many as spec.adapters names"
    )
    max_rank: int | None = Field(
        default=None, ge=1, le=512, description="largest rank; absent: the largest of spec.adapters, at least 16"
    )


class RequestLimits(BaseModel):
    """When a request is refused at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_queued: int = Field(default=256, ge=0, description="requests that wait beyond max_concurrency")
    max_prompt_characters: int | None = Field(
        default=None, ge=1, description="of prompt or messages; absent: only max_model_len (tokens) counts"
    )


class Canary(BaseModel):
    """By which steps a revision takes traffic, and what takes it back."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: tuple[Annotated[int, Field(ge=1, le=99)], ...] = Field(default=(10, 50), description="percent, growing")
    observe: Seconds = Field(default=60, description="how long each step lasts at least")
    max_error_rate: float = Field(default=0.02, ge=0, le=1, description="part of its answers that may fail")
    max_p95_ratio: float = Field(default=2, gt=0, description="p95 of the first byte, times the old revisions'")
    max_p95_seconds: float | None = Field(default=None, gt=0, description="p95 of the first byte; absent: no limit")
    min_answers: int = Field(default=20, ge=0, description="fewer say nothing of a revision")

    @field_validator("steps")
    @classmethod
    def _grow(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if not steps or list(steps) != sorted(set(steps)):
            raise ValueError("must be percentages that grow, such as 10, 50")
        return steps


class RevisionSpec(BaseModel):
    """One revision of a deployment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, AfterValidator(_check_model)]
    dtype: Dtype = Field(default="auto", description="auto: what this machine computes right and fast")
    max_model_len: int | None = Field(
        default=None,
        ge=32,
        description="tokens of prompt and answer; absent: what the model can, at most 8192 on a CPU",
    )
    max_concurrency: int = Field(default=16, ge=1, le=4096, description="answers that the engine writes side by side")
    engine: EngineName = Field(default="vllm", description="vllm, or swift: `swift deploy`, ms-swift's server")
    engine_args: Annotated[tuple[str, ...], AfterValidator(_check_engine_args)] = ()
    resources: Resources = Field(default_factory=lambda: Resources.model_validate({}))
    parity: Parity = Field(default_factory=lambda: Parity.model_validate({}))
    adapters: Annotated[tuple[str, ...], AfterValidator(_check_adapters)] = ()
    lora: Lora = Field(default_factory=lambda: Lora.model_validate({}))
    limits: RequestLimits = Field(default_factory=lambda: RequestLimits.model_validate({}))

    @field_validator("engine", mode="before")
    @classmethod
    def _default_engine(cls, engine: Any) -> Any:
        return engine or "vllm"

    @field_validator("engine_args")
    @classmethod
    def _leave_owned_flags(cls, args: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        engine = ENGINES[info.data.get("engine", "vllm")]
        if refused := next(filter(None, (_owned_flag(arg, engine) for arg in args)), ""):
            raise ValueError(refused)
        return args

    @field_validator("adapters")
    @classmethod
    def _loads_adapters(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if names and not ENGINES[info.data.get("engine", "vllm")].adapters:
            raise ValueError("this engine loads no adapters while it runs: merge them, or use engine: vllm")
        return names

    @property
    def max_adapters(self) -> int:
        """Adapters that there is room for."""
        if not ENGINES[self.engine].adapters:
            return 0
        return len(self.adapters) if self.lora.max_adapters is None else self.lora.max_adapters

    @property
    def max_in_flight(self) -> int:
        """Requests that the gateway lets to the engine at a time; it writes max_concurrency of them side by side."""
        return self.max_concurrency + self.limits.max_queued

    @model_validator(mode="after")
    def _fits(self) -> RevisionSpec:
        if len(self.adapters) > self.max_adapters:
            raise ValueError(f"{len(self.adapters)} adapters, but lora.max_adapters is {self.max_adapters}")
        return self


def parse_spec(plain: dict[str, Any]) -> RevisionSpec:
    """A spec from a proto's JSON form (names preserved). Raises InvalidSpec naming every bad field at once."""
    try:
        return RevisionSpec.model_validate({k: v for k, v in plain.items() if not (k == "dtype" and v == "")})
    except ValidationError as error:
        raise InvalidSpec("the revision's spec is wrong", violations=violations_of(error, "spec")) from None


def parse_canary(plain: dict[str, Any]) -> Canary:
    """A canary's policy from a proto's JSON form (names preserved). Raises InvalidSpec naming every bad field at once."""
    try:
        return Canary.model_validate({k: v for k, v in plain.items() if not (k == "steps" and not v)})
    except ValidationError as error:
        raise InvalidSpec("the canary is wrong", violations=violations_of(error, "canary")) from None
