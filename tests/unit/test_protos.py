"""The API and what the services make of it are one: spec fields, roles of every RPC, and servicers without gaps."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from pydantic import BaseModel

from fabrictune.v1 import (
    artifact_pb2,
    conversion_pb2,
    evaluation_pb2,
    inference_pb2,
    job_pb2,
    merging_pb2,
    pipeline_pb2,
    training_pb2,
)
from services.common.auth import RULES
from services.conversion.spec import Spec as ConversionSpec
from services.evaluation.spec import Spec as EvaluationSpec
from services.inference.spec import RevisionSpec
from services.merging.spec import Spec as MergeSpec
from services.pipeline.spec import Spec as PipelineSpec
from services.training.spec import Spec as TrainingSpec

MODULES = (
    artifact_pb2, conversion_pb2, evaluation_pb2, inference_pb2, job_pb2, merging_pb2, pipeline_pb2, training_pb2,
)  # fmt: skip
RPCS = [(s.name, m.name) for f in MODULES for s in f.DESCRIPTOR.services_by_name.values() for m in s.methods]


def fields_of(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Field → its model when it is one (or a tuple of one)."""
    found: dict[str, type[BaseModel] | None] = {}
    for name, field in model.model_fields.items():
        inner: Any = field.annotation
        while getattr(inner, "__args__", None):
            inner = inner.__args__[0]
        found[name] = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
    return found


def compare(message: Descriptor, model: type[BaseModel], path: str) -> list[str]:
    fields: dict[str, FieldDescriptor] = dict(message.fields_by_name)
    known = fields_of(model)
    wrong = [f"{path}.{name} is in one only" for name in set(fields) ^ set(known)]
    for name in set(fields) & set(known):
        inner, nested = known[name], fields[name].message_type
        if inner is not None and nested is not None and not nested.full_name.startswith("google."):
            wrong += compare(nested, inner, f"{path}.{name}")
    return wrong


@pytest.mark.parametrize(
    ("message", "model"),
    [
        (conversion_pb2.ConversionSpec, ConversionSpec),
        (training_pb2.TrainingSpec, TrainingSpec),
        (merging_pb2.MergeSpec, MergeSpec),
        (evaluation_pb2.EvaluationSpec, EvaluationSpec),
        (inference_pb2.RevisionSpec, RevisionSpec),
    ],
)
def test_specs_have_the_fields_of_their_messages(message: Any, model: type[BaseModel]) -> None:
    assert compare(message.DESCRIPTOR, model, message.DESCRIPTOR.name) == []


def test_the_pipeline_takes_every_stage() -> None:
    assert set(pipeline_pb2.PipelineSpec.DESCRIPTOR.fields_by_name) == set(PipelineSpec.model_fields)


@pytest.mark.parametrize(("service", "method"), RPCS)
def test_every_rpc_has_a_role(service: str, method: str) -> None:
    assert any(pattern.fullmatch(f"/fabrictune.v1.{service}/{method}") for pattern, _ in RULES)


@pytest.mark.parametrize(
    ("service", "module"),
    [
        ("ConversionService", "services.conversion.service"),
        ("TrainingService", "services.training.service"),
        ("MergingService", "services.merging.service"),
        ("EvaluationService", "services.evaluation.service"),
        ("InferenceService", "services.inference.service"),
        ("PipelineService", "services.pipeline.service"),
        ("ArtifactService", "services.pipeline.artifacts"),
    ],
)
def test_every_rpc_is_implemented(service: str, module: str) -> None:
    made = getattr(importlib.import_module(module), service)
    missing = [m for s, m in RPCS if s == service and m not in vars(made)]
    assert missing == []


def test_every_service_starts_on_its_own() -> None:
    services = Path(__file__).parents[2] / "services"
    for name in ("conversion", "training", "merging", "evaluation", "inference", "pipeline"):
        assert (services / name / "__main__.py").is_file()
