"""What a revision is asked to be: which model, how it is computed, how close it must come to its reference.

Mirrors fabrictune.v1.RevisionSpec. `engine_args` go to vLLM as they are; the few flags that fabrictune sets from other
fields are refused there by name, since vLLM would let the later of two win without a word.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from services.common.errors import InvalidSpec
from services.common.resources import ID_PATTERN, Resources
from services.common.validation import violations_of

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

OWNED_FLAGS = {
    "--model": "set spec.model",
    "--tokenizer": "the tokenizer is part of spec.model",
    "--served-model-name": "clients use the deployment's id",
    "--host": "the engine listens on loopback; clients use the gateway",
    "--port": "the cluster picks it",
    "--uds": "the gateway reaches the engine by TCP",
    "--root-path": "the gateway expects /v1",
    "--dtype": "set spec.dtype",
    "--max-model-len": "set spec.max_model_len",
    "--max-num-seqs": "set spec.max_concurrency",
    "--tensor-parallel-size": "set spec.resources.gpus",
    "-tp": "set spec.resources.gpus",
    "--config": "it would override flags unseen; name them here instead",
    "--api-key": "arguments can be read by every user of the machine; the gateway checks tokens",
    "--hf-token": "arguments can be read by every user of the machine; models come from the artifact store",
    "--ssl-keyfile": "TLS ends at the gateway",
    "--ssl-certfile": "TLS ends at the gateway",
}
"""Flags of vLLM that may not stand in engine_args, and what to do instead."""


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
        flag = arg.partition("=")[0].replace("_", "-")
        # argparse also takes any unambiguous beginning of a flag, so --max-model is --max-model-len.
        owned = next((o for o in OWNED_FLAGS if flag.startswith("-") and len(flag) > 2 and o.startswith(flag)), "")
        if owned:
            raise ValueError(f"{flag} is set by fabrictune and cannot be given here: {OWNED_FLAGS[owned]}")
    return args


class Parity(BaseModel):
    """How close the engine must come to the reference."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_agreement: float = Field(
        default=0.99, gt=0, le=1, description="least part of positions at which the top tokens agree"
    )
    max_logprob_difference: float | None = Field(
        default=None, gt=0, description="largest mean difference, nats; absent: from the dtype"
    )


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
    engine_args: Annotated[tuple[str, ...], AfterValidator(_check_engine_args)] = ()
    resources: Resources = Field(default_factory=lambda: Resources.model_validate({}))
    parity: Parity = Field(default_factory=lambda: Parity.model_validate({}))


def parse_spec(plain: dict[str, Any]) -> RevisionSpec:
    """A spec from a proto's JSON form (names preserved). Raises InvalidSpec naming every bad field at once."""
    try:
        return RevisionSpec.model_validate({k: v for k, v in plain.items() if not (k == "dtype" and v == "")})
    except ValidationError as error:
        raise InvalidSpec("the revision's spec is wrong", violations=violations_of(error, "spec")) from None
