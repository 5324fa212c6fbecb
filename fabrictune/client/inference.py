"""Deployments, their revisions and what they answer."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from fabrictune.client.calls import Calls, fill
from fabrictune.v1 import inference_pb2, inference_pb2_grpc


class Inference:
    """Deployments and their revisions."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._stub = calls.stub(inference_pb2_grpc.InferenceServiceStub)

    def deploy(
        self, deployment_id: str, spec: Mapping[str, Any], validate_only: bool = False
    ) -> inference_pb2.Deployment:
        """Make a deployment with a first revision."""
        wanted = inference_pb2.Deployment()
        fill(wanted.spec, spec, "the revision's spec")
        request = inference_pb2.CreateDeploymentRequest(
            deployment=wanted, deployment_id=deployment_id, validate_only=validate_only
        )
        deployment: inference_pb2.Deployment = self._calls.call(self._stub.CreateDeployment, request)
        return deployment

    def get(self, name: str) -> inference_pb2.Deployment:
        """One deployment."""
        deployment: inference_pb2.Deployment = self._calls.call(
            self._stub.GetDeployment, inference_pb2.GetDeploymentRequest(name=name)
        )
        return deployment

    def list(self) -> builtins.list[inference_pb2.Deployment]:
        """All deployments."""
        return list(self._calls.call(self._stub.ListDeployments, inference_pb2.ListDeploymentsRequest()).deployments)

    def delete(self, name: str) -> None:
        """Stop a deployment and forget it."""
        self._calls.call(self._stub.DeleteDeployment, inference_pb2.DeleteDeploymentRequest(name=name))

    def update_traffic(
        self, name: str, traffic: Mapping[str, int], canary: Mapping[str, Any] | None = None
    ) -> inference_pb2.Deployment:
        """Move traffic between ready revisions. canary: by steps, with these limits ({} takes the defaults)."""
        request = inference_pb2.UpdateTrafficRequest(name=name, traffic=traffic)
        if canary is not None:
            fill(request.canary, canary, "the canary")
            request.canary.SetInParent()
        deployment: inference_pb2.Deployment = self._calls.call(self._stub.UpdateTraffic, request)
        return deployment

    def update_adapters(self, revision: str, adapters: Sequence[str]) -> inference_pb2.Revision:
        """Load and unload adapters in a running revision: these are what it serves from then on."""
        wanted = inference_pb2.Revision(name=revision, spec=inference_pb2.RevisionSpec(adapters=adapters))
        request = inference_pb2.UpdateRevisionRequest(revision=wanted)
        found: inference_pb2.Revision = self._calls.call(self._stub.UpdateRevision, request)
        return found

    def export_traffic(self, name: str, since: datetime | None = None) -> Iterator[inference_pb2.TrafficFile]:
        """The files of what was recorded of a deployment since a day, page by page."""
        request = inference_pb2.ExportTrafficRequest(name=name)
        if since is not None:
            request.start_time.FromDatetime(since)
        while True:
            page = self._calls.call(self._stub.ExportTraffic, request)
            yield from page.files
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    def watch(self, name: str) -> Iterator[inference_pb2.Deployment]:
        """The deployment now, and at every change."""
        request = inference_pb2.WatchDeploymentRequest(name=name)
        for event in self._calls.stream(self._stub.WatchDeployment, request):
            yield event.deployment

    def generate(
        self,
        deployment: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str = "",
        constrain_tools: bool | None = None,
        **sampling: Any,
    ) -> Iterator[inference_pb2.GenerateResponse]:
        """Answer a conversation in pieces. sampling: temperature, top_p, max_tokens, stop, seed.

        messages and tools: OpenAI's objects. tool_choice: auto, none, required, or a tool's name.
        """
        request = inference_pb2.GenerateRequest(
            deployment=deployment,
            messages=[_chat_message(m) for m in messages],
            sampling=inference_pb2.Sampling(**sampling),
            tools=[_tool(tool) for tool in tools],
            tool_choice=tool_choice,
        )
        if constrain_tools is not None:
            request.constrain_tools = constrain_tools
        yield from self._calls.stream(self._stub.Generate, request)


def _chat_message(told: Mapping[str, Any]) -> inference_pb2.Message:
    calls = [
        inference_pb2.ToolCall(
            id=call["id"], name=call["function"]["name"], arguments=call["function"].get("arguments") or "{}"
        )
        for call in told.get("tool_calls") or ()
    ]
    content, identity = told.get("content") or "", told.get("tool_call_id") or ""
    return inference_pb2.Message(role=told["role"], content=content, tool_calls=calls, tool_call_id=identity)


def _tool(told: Mapping[str, Any]) -> inference_pb2.Tool:
    """Its schema goes as text: a message of JSON would lose the order of the properties, which the prompt keeps."""
    function = told.get("function", told)
    parameters = function.get("parameters")
    return inference_pb2.Tool(
        name=function["name"],
        description=function.get("description") or "",
        parameters=json.dumps(parameters, ensure_ascii=False) if parameters else "",
        strict=function.get("strict"),
    )
