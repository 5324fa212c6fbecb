"""A GenerateRequest as the fields of an OpenAI chat request. What is wrong with tools, `tools` says, in OpenAI's words."""

from __future__ import annotations

from typing import Any

import orjson
from google.protobuf import json_format

from fabrictune.v1 import inference_pb2
from services.common.errors import InvalidSpec, Violation

CHOICES = ("auto", "none", "required")


def read_chat(request: inference_pb2.GenerateRequest) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(messages, the rest: sampling and tools). Raises InvalidSpec when parameters are no JSON."""
    rest: dict[str, Any] = json_format.MessageToDict(request.sampling, preserving_proto_field_name=True)
    if "seed" in rest:
        rest["seed"] = int(rest["seed"])  # protobuf's JSON writes 64-bit numbers as text
    if request.tools:
        rest["tools"] = _read_tools(request)
        rest |= {
            switch: getattr(request, switch)
            for switch in ("parallel_tool_calls", "constrain_tools")
            if request.HasField(switch)
        }
    if choice := request.tool_choice:
        rest["tool_choice"] = choice if choice in CHOICES else {"type": "function", "function": {"name": choice}}
    return [_read_message(message) for message in request.messages], rest


def _read_message(message: inference_pb2.Message) -> dict[str, Any]:
    read: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        read["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        read["tool_call_id"] = message.tool_call_id
    return read


def _read_tools(request: inference_pb2.GenerateRequest) -> list[dict[str, Any]]:
    bad: list[Violation] = []
    tools = []
    for number, tool in enumerate(request.tools):
        function: dict[str, Any] = {"name": tool.name, "description": tool.description}
        try:
            function["parameters"] = orjson.loads(tool.parameters) if tool.parameters else None
        except orjson.JSONDecodeError as error:
            bad.append(Violation(f"tools[{number}].parameters", f"must be a JSON schema as JSON text: {error}"))
        if tool.HasField("strict"):
            function["strict"] = tool.strict
        tools.append({"type": "function", "function": function})
    if bad:
        raise InvalidSpec("the request's tools cannot be used", violations=bad)
    return tools
