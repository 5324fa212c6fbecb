"""What a conversion is asked to do. Mirrors fabrictune.v1.ConversionSpec."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from services.common.fabric import ROLES
from services.common.resources import Resources


def _or(default: str) -> BeforeValidator:
    """Protobuf leaves a string that was not set empty."""
    return BeforeValidator(lambda value: value or default)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Model):
    """Rows to convert."""

    uri: str = Field(min_length=1, description="datasets/an-id, or, on one machine, a path")
    files: str = Field("", description="a glob inside a folder; all rows files when it is empty")
    format: Annotated[Literal["ms_agent", "agentfabric", "openai", "chat"], _or("ms_agent")] = "ms_agent"
    layout: Annotated[Literal["split", "inline", "both"], _or("both")] = "both"
    count: int = Field(0, ge=0, description="at most so many rows, chosen by the seed; 0 takes all")
    mix_ratio: float = Field(
        0, ge=0, le=1000, description="at most so many times the rows of the sources that have none; 0: no such limit"
    )
    split: Annotated[Literal["auto", "train", "validation", "test"], _or("auto")] = "auto"


class Split(_Model):
    """Parts of all tools."""

    validation: float = Field(0.05, ge=0, lt=1)
    test: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_sum(self) -> Split:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} and test {self.test} leave nothing to train on")
        return self


# Said in turn, so that no single sentence is learned by heart.
REFUSALS = (
    "I'm sorry, but none of the tools I have fits this question.",
    "I'm sorry, but I can't help with that. My capabilities are limited to the tools provided.",
    "I'm sorry, but I don't have a tool for that. Is there anything else I can help you with?",
    "I'm sorry, but I'm unable to assist with that. None of my tools covers it.",
    "很抱歉，我现有的工具都不适用于这个问题。",
    "很抱歉，我没有能完成这件事的工具。还有什么可以帮您的吗？",
)


class Refusals(_Model):
    """Questions of other rows, asked where their tool is not listed."""

    ratio: float = Field(0.0, ge=0, le=5, description="how many are added for each question of the training rows")
    near: float = Field(0.0, ge=0, le=1, description="part of them that a tool of the same field nearly fits")
    answers: tuple[str, ...] = Field(REFUSALS, description="rotated; those in the question's language first")

    @field_validator("answers", mode="before")
    @classmethod
    def _default_answers(cls, value: Any) -> Any:
        return value or REFUSALS


class Range(_Model):
    """min to max, both included."""

    min: int = Field(0, ge=0, le=100)
    max: int = Field(0, ge=0, le=100)

    @model_validator(mode="after")
    def _check_order(self) -> Range:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


# Rotated, so that no row trains an empty role and no single sentence is learned by heart.
INSTRUCTIONS = tuple(ROLES.values())


EquivalentTools = Annotated[tuple[str, ...], Field(min_length=2)]


class SelfCognition(_Model):
    """Rows in which the model says who it is."""

    count: int = Field(0, ge=0, le=1_000_000, description="how many; the recipe has 3000")
    name: str = Field("", max_length=100, description="what the model is called")
    author: str = Field("", max_length=100, description="who made it")

    @model_validator(mode="after")
    def _check_names(self) -> SelfCognition:
        missing = [field for field in ("name", "author") if not getattr(self, field).strip()]
        if self.count and missing:
            raise ValueError(f"{self.count} rows are asked for, but {' and '.join(missing)} must be told")
        return self


class Spec(_Model):
    """One conversion."""

    sources: tuple[Source, ...] = Field(min_length=1)
    wording: Annotated[Literal["0.7.1", "0.7.2"], _or("0.7.1")] = "0.7.1"
    instructions: tuple[str, ...] = Field(
        INSTRUCTIONS, description="rotated over the rows; those in the row's language first"
    )
    language: Annotated[Literal["auto", "zh", "en"], _or("auto")] = "auto"
    split: Split = Field(default_factory=lambda: Split.model_validate({}))
    distractors: Range = Field(default_factory=lambda: Range.model_validate({}))
    questions: Range = Field(default_factory=lambda: Range(min=1, max=1))
    refusals: Refusals = Field(default_factory=lambda: Refusals.model_validate({}))
    equivalent_tools: tuple[EquivalentTools, ...] = Field(
        (),
        description="groups of tools of which each does what the others do, so that none is wrong where one is right",
    )
    summaries: float = Field(
        1.0, ge=0, le=1, description="part of the rows sharing a prompt whose summary is trained too"
    )
    self_cognition: SelfCognition = Field(default_factory=lambda: SelfCognition.model_validate({}))
    duplicates: Annotated[Literal["exact", "near", "keep"], _or("exact")] = "exact"
    pictures: bool = Field(True, description="pictures of a result are shown in the answer, as the prompt asks")
    tokenizer: str = Field(
        "", description="models/an-id (or, on one machine, a folder): the report tells rows' lengths in its tokens"
    )
    resources: Resources = Field(default_factory=lambda: Resources.model_validate({}))
    seed: int = 42
    max_reject_ratio: float = Field(
        0.5, ge=0, le=1, description="the job fails when a larger part of the rows is refused"
    )
    max_row_bytes: int = Field(1 << 20, ge=1024)
    max_row_characters: int = Field(0, ge=0, description="longer converted rows are refused; 0: no limit")

    @field_validator("instructions", mode="before")
    @classmethod
    def _default_instructions(cls, value: Any) -> Any:
        return value or INSTRUCTIONS

    @field_validator("questions")
    @classmethod
    def _check_questions(cls, value: Range) -> Range:
        if value.min < 1:
            raise ValueError("a prompt has one question or more")
        return value

    @field_validator("resources")
    @classmethod
    def _check_resources(cls, value: Resources) -> Resources:
        if value.gpus:
            raise ValueError("a conversion uses no GPU")
        return value

    @property
    def all_sources(self) -> tuple[Source, ...]:
        """The sources, and self-cognition as one more when there is some."""
        if not self.self_cognition.count:
            return self.sources
        return (*self.sources, Source.model_validate({"uri": "self-cognition", "layout": "split", "split": "train"}))
