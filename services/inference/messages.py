"""Deployments and revisions as the API tells them."""

from __future__ import annotations

from google.protobuf import json_format

from fabrictune.v1 import inference_pb2
from services.inference.revisions import CanaryRun, Deployment, Revision


def tell_deployment(deployment: Deployment, address: str) -> inference_pb2.Deployment:
    """A deployment with its revisions. address: the gateway's OpenAI base address."""
    message = inference_pb2.Deployment(
        name=f"deployments/{deployment.id}",
        traffic=deployment.traffic,
        revisions=[tell_revision(r, address) for r in deployment.revisions.values()],
        address=address,
        served_model=deployment.id,
    )
    message.create_time.FromMilliseconds(int(deployment.create_time * 1000))
    if deployment.canary is not None:
        message.canary.CopyFrom(_tell_canary(deployment.canary))
    return message


def tell_revision(revision: Revision, address: str) -> inference_pb2.Revision:
    """One revision."""
    message = inference_pb2.Revision(
        name=revision.name,
        state=revision.state.value,
        served_model=revision.served_model,
        address=address,
        message=revision.message,
        start_seconds=revision.seconds,
    )
    for adapter_id, digest in sorted(revision.adapters.items()):
        served = f"{revision.deployment}:{adapter_id}"
        message.adapters.add(name=f"adapters/{adapter_id}", digest=digest, served_model=served)
    json_format.ParseDict(revision.spec.model_dump(mode="json", exclude_unset=True), message.spec)
    if revision.error:
        json_format.ParseDict(revision.error, message.error)
    if revision.parity:
        json_format.ParseDict(revision.parity, message.parity)
    message.create_time.FromMilliseconds(int(revision.create_time * 1000))
    if revision.ready_time:
        message.ready_time.FromMilliseconds(int(revision.ready_time * 1000))
    return message


def _tell_canary(run: CanaryRun) -> inference_pb2.CanaryRun:
    message = inference_pb2.CanaryRun(
        candidate=run.candidate, state=run.state.value, percent=run.percent, reason=run.reason
    )
    json_format.ParseDict(run.policy.model_dump(mode="json"), message.policy)
    message.create_time.FromMilliseconds(int(run.create_time * 1000))
    for who, into in (("candidate", message.candidate_figures), ("stable", message.stable_figures)):
        told = run.figures.get(who, {})
        into.answers, into.failures = told.get("answers", 0), told.get("failures", 0)
        into.p95_seconds = told.get("p95", 0.0)
    return message
