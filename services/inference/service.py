"""The inference service: deployments, revisions and Generate, between gRPC and the rollout."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from google.protobuf import empty_pb2

from fabrictune.v1 import inference_pb2, inference_pb2_grpc
from services.common.artifacts import Artifacts as StoredArtifacts
from services.common.errors import FailedPrecondition, InvalidSpec, Violation
from services.common.job_api import spec_dict
from services.common.resources import check_id, split_name
from services.common.store import Store
from services.inference.adapters import Adapter, bases_of, check_base, read_rank
from services.inference.chat import read_chat
from services.inference.engine import Model
from services.inference.generate import generate
from services.inference.messages import tell_deployment, tell_revision
from services.inference.prepare import MODEL_FOLDER
from services.inference.recorder import Recorder
from services.inference.revisions import Deployment, Revision
from services.inference.rollout import Rollout
from services.inference.routes import RouteTable
from services.inference.spec import RevisionSpec, parse_canary, parse_spec
from services.inference.traffic import list_records

FLUSH_SECONDS = 10.0


@dataclass(frozen=True)
class Traffic:
    """Where recorded traffic is, and who records it now."""

    store: Store | None = None
    """None: the recorder writes into a folder."""
    recorder: Recorder | None = None


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Serves fabrictune.v1.InferenceService. address: the gateway's OpenAI base address."""

    def __init__(
        self, rollout: Rollout, routes: RouteTable, artifacts: StoredArtifacts, address: str,
        traffic: Traffic = Traffic(),
    ) -> None:  # fmt: skip
        self._rollout, self._routes, self._artifacts, self._address = rollout, routes, artifacts, address
        self._traffic = traffic

    async def CreateDeployment(
        self, request: inference_pb2.CreateDeploymentRequest, context: Any
    ) -> inference_pb2.Deployment:
        """Make a deployment; with a spec, start its first revision, which takes the traffic when it is ready."""
        deployment_id = check_id(request.deployment_id, "deployment_id")
        wanted = request.deployment
        if not wanted.HasField("spec"):
            return self._message(await self._rollout.create(deployment_id))
        spec = await self._check(wanted.spec)
        revision_id = await self._revision_id(spec)
        if request.validate_only:
            planned = Deployment(deployment_id, revisions={revision_id: Revision(deployment_id, revision_id, spec)})
            return self._message(planned)
        await self._rollout.create_revision(deployment_id, revision_id, spec, take_traffic=True)
        return self._message(self._rollout.get(deployment_id))

    async def GetDeployment(
        self, request: inference_pb2.GetDeploymentRequest, context: Any
    ) -> inference_pb2.Deployment:
        """One deployment with its revisions."""
        return self._message(self._rollout.get(_deployment_id(request.name)))

    async def ListDeployments(
        self, request: inference_pb2.ListDeploymentsRequest, context: Any
    ) -> inference_pb2.ListDeploymentsResponse:
        """A page of deployments, by id."""
        found, token = _page(self._rollout.list(), lambda d: d.id, request.page_size, request.page_token)
        return inference_pb2.ListDeploymentsResponse(deployments=map(self._message, found), next_page_token=token)

    async def DeleteDeployment(self, request: inference_pb2.DeleteDeploymentRequest, context: Any) -> empty_pb2.Empty:
        """Stop all revisions and forget it."""
        await self._rollout.delete(_deployment_id(request.name))
        return empty_pb2.Empty()

    async def WatchDeployment(
        self, request: inference_pb2.WatchDeploymentRequest, context: Any
    ) -> AsyncIterator[inference_pb2.DeploymentEvent]:
        """The present state, then each change. The token names no position: the state now is always told first."""
        number = 0
        async for deployment in self._rollout.watch(_deployment_id(request.name)):
            number += 1
            yield inference_pb2.DeploymentEvent(resume_token=str(number), deployment=self._message(deployment))

    async def CreateRevision(
        self, request: inference_pb2.CreateRevisionRequest, context: Any
    ) -> inference_pb2.Revision:
        """Start a revision without traffic, or find the one that is there."""
        deployment_id = _deployment_id(request.parent)
        if not request.revision.HasField("spec"):
            raise InvalidSpec("the request carries no revision.spec")
        spec = await self._check(request.revision.spec)
        revision_id = request.revision_id and check_id(request.revision_id, "revision_id")
        if not revision_id and request.request_id:
            revision_id = "r-" + hashlib.sha256(request.request_id.encode()).hexdigest()[:16]
        revision_id = revision_id or f"r-{secrets.token_hex(5)}"
        return self._revision(await self._rollout.create_revision(deployment_id, revision_id, spec))

    async def GetRevision(self, request: inference_pb2.GetRevisionRequest, context: Any) -> inference_pb2.Revision:
        """One revision."""
        return self._revision(self._rollout.get_revision(*_revision_ids(request.name)))

    async def ListRevisions(
        self, request: inference_pb2.ListRevisionsRequest, context: Any
    ) -> inference_pb2.ListRevisionsResponse:
        """A page of revisions, by id."""
        there = self._rollout.get(_deployment_id(request.parent)).revisions
        ordered = [there[r] for r in sorted(there)]
        found, token = _page(ordered, lambda r: r.revision, request.page_size, request.page_token)
        return inference_pb2.ListRevisionsResponse(revisions=map(self._revision, found), next_page_token=token)

    async def UpdateRevision(
        self, request: inference_pb2.UpdateRevisionRequest, context: Any
    ) -> inference_pb2.Revision:
        """Change the adapters of a running revision."""
        deployment_id, revision_id = _revision_ids(request.revision.name)
        known = self._rollout.get_revision(deployment_id, revision_id).spec
        told = spec_dict(request.revision.spec)
        if other := sorted(told.keys() - {"adapters", "model"}):
            bad = [Violation(f"revision.spec.{f}", "only adapters can change; make a new revision") for f in other]
            raise InvalidSpec("a revision's spec cannot change", violations=bad)
        # Checked as a spec of its own, with room for all; whether this engine has the room is the rollout's to say.
        wanted = parse_spec({"model": known.model, "adapters": told.get("adapters", [])})
        await asyncio.to_thread(self._check_adapters, wanted)
        return self._revision(await self._rollout.change_adapters(deployment_id, revision_id, wanted.adapters))

    async def DeleteRevision(self, request: inference_pb2.DeleteRevisionRequest, context: Any) -> empty_pb2.Empty:
        """Drain, stop and forget a revision that takes no traffic."""
        await self._rollout.delete_revision(*_revision_ids(request.name))
        return empty_pb2.Empty()

    async def UpdateTraffic(
        self, request: inference_pb2.UpdateTrafficRequest, context: Any
    ) -> inference_pb2.Deployment:
        """Move traffic in one step, or begin a canary."""
        deployment_id, traffic = _deployment_id(request.name), dict(request.traffic)
        if not request.HasField("canary"):
            return self._message(await self._rollout.set_traffic(deployment_id, traffic))
        policy = parse_canary(spec_dict(request.canary))
        return self._message(await self._rollout.start_canary(deployment_id, traffic, policy))

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Answer a conversation in pieces; a client that goes away stops the engine's work on it."""
        model = request.deployment.removeprefix("deployments/")
        messages, rest = read_chat(request)
        recorder = self._traffic.recorder
        stream = generate(self._routes, self._rollout.session, model, messages, rest, recorder=recorder)
        async with aclosing(stream):  # a client that goes away in mid-piece, too, ends the engine's work now
            async for piece in stream:
                calls = [inference_pb2.ToolCall(**asdict(call)) for call in piece.tool_calls]
                answer = inference_pb2.GenerateResponse(
                    text=piece.text, finish_reason=piece.finish_reason, tool_calls=calls
                )
                if piece.prompt_tokens:
                    answer.usage.prompt_tokens = piece.prompt_tokens
                    answer.usage.completion_tokens = piece.completion_tokens
                yield answer

    async def ExportTraffic(
        self, request: inference_pb2.ExportTrafficRequest, context: Any
    ) -> inference_pb2.ExportTrafficResponse:
        """A page of what was recorded; what is not written yet is written first."""
        store, recorder = self._traffic.store, self._traffic.recorder
        if store is None:
            raise FailedPrecondition(
                "traffic is recorded into files on this server (FABRICTUNE_RECORD_FOLDER); read them there: "
                "`fabrictune datasets from-traffic --folder …`"
            )
        deployment_id = _deployment_id(request.name)
        since = request.start_time.ToDatetime().date() if request.HasField("start_time") else None
        if recorder is not None and not request.page_token:
            await asyncio.to_thread(recorder.flush, FLUSH_SECONDS)

        def list_page() -> inference_pb2.ExportTrafficResponse:
            size = min(request.page_size or 500, 1000)
            keys = list(islice(list_records(store, deployment_id, since, request.page_token), size))
            files = [inference_pb2.TrafficFile(key=key, address=store.presign("GET", key)) for key in keys]
            return inference_pb2.ExportTrafficResponse(
                files=files, next_page_token=keys[-1] if len(keys) == size else ""
            )

        return await asyncio.to_thread(list_page)

    async def _check(self, spec: inference_pb2.RevisionSpec) -> RevisionSpec:
        parsed = parse_spec(spec_dict(spec))
        await asyncio.to_thread(self._check_adapters, parsed)
        return parsed

    def _check_adapters(self, spec: RevisionSpec) -> None:
        model = self._artifacts.get(spec.model)
        bare = Model(model.name, model.digest, MODEL_FOLDER, {}, 0)
        for name in spec.adapters:
            found = self._artifacts.get(name)
            rank = read_rank(self._artifacts.read(found, "adapter_config.json"), name)
            check_base(Adapter(name, found.digest, MODEL_FOLDER, rank, bases_of(found.created_by), {}), bare)

    async def _revision_id(self, spec: RevisionSpec) -> str:
        found = [await asyncio.to_thread(self._artifacts.get, name) for name in (spec.model, *spec.adapters)]
        told = json.dumps([*(f.digest for f in found), spec.model_dump(mode="json")], sort_keys=True)
        return f"r-{hashlib.sha256(told.encode()).hexdigest()[:10]}"

    def _message(self, deployment: Deployment) -> inference_pb2.Deployment:
        return tell_deployment(deployment, self._address)

    def _revision(self, revision: Revision) -> inference_pb2.Revision:
        return tell_revision(revision, self._address)


def _deployment_id(name: str) -> str:
    return split_name(name, "deployments")[0]


def _revision_ids(name: str) -> tuple[str, str]:
    deployment_id, revision_id = split_name(name, "deployments", "revisions")
    return deployment_id, revision_id


def _page(rows: list[Any], key: Callable[[Any], str], size: int, token: str) -> tuple[list[Any], str]:
    size = min(size or 50, 1000)
    after = [row for row in rows if key(row) > token]
    return after[:size], key(after[size - 1]) if len(after) > size else ""
