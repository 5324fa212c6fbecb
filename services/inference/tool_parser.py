"""vLLM's plug-in for AgentFabric's calls: `--tool-parser-plugin services.inference.tool_parser --tool-call-parser agentfabric`.

Before an answer it makes the grammar that keeps calls right: text is free, but after "Action:" only a listed tool can follow,
and after "Action Input:" only arguments that fit its schema. After it, or while it comes, `calls` reads the calls.
`agentfabric-free` is the same without a grammar where the model may choose.

vLLM's required and named tool choice would make it write a JSON list, which no model was trained for: both are grammars
here too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionNamedToolChoiceParam
from vllm.parser.abstract_parser import structured_outputs_to_format
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.renderers.params import ChatParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager

from services.inference.calls import CallReader, FoundCall
from services.inference.grammar import render_grammar


class AgentFabricToolParser(ToolParser):  # type: ignore[misc]
    """Reads `Action:` and `Action Input:`, and constrains what is written there."""

    supports_required_and_named = False
    constrains = True

    def __init__(self, tokenizer: Any, tools: list[Any] | None = None) -> None:
        super().__init__(tokenizer, tools)
        # vLLM 0.32 tells only "engine-based" parsers that a stream has ended, so that held text is not lost. Requests
        # without tools keep the plain path.
        self.engine_based_streaming = bool(tools)
        self._reader: CallReader | None = None
        self._count = 0

    def adjust_request(self, request: Any) -> Any:
        """The request with its grammar. A format that it asks for too is the other thing that the answer may be."""
        if not request.tools or request.tool_choice == "none":
            return request
        named = isinstance(request.tool_choice, ChatCompletionNamedToolChoiceParam)
        forced = named or request.tool_choice == "required"
        told = (request.vllm_xargs or {}).get("constrain_tools", self.constrains)
        if not forced and not told:
            return request
        own = None if forced else request.extract_structured_outputs()
        grammar = render_grammar(
            [tool.function.model_dump() for tool in request.tools],
            only=request.tool_choice.function.name if named else "",
            forced=forced or own is not None,
            # A call's result is what the model was trained to see next: another one in the same turn only if it is asked for.
            several="parallel_tool_calls" in request.model_fields_set and bool(request.parallel_tool_calls),
        )
        if own is not None:
            output = structured_outputs_to_format(own)
            if output is not None:
                grammar["format"] = {"type": "or", "elements": [grammar["format"], output.model_dump()]}
        request.structured_outputs = StructuredOutputsParams(structural_tag=json.dumps(grammar))
        request.response_format = None
        return request

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        """Text and calls of a whole answer."""
        if request.tool_choice == "none":
            return ExtractedToolCallInformation(tools_called=False, tool_calls=[], content=model_output)
        reader = _make_reader(request)
        found = reader.feed(model_output) + reader.finish()
        text = "".join(each for each in found if isinstance(each, str))
        calls = [
            ToolCall(function=FunctionCall(name=each.name, arguments=each.arguments))
            for each in found
            if isinstance(each, FoundCall)
        ]
        return ExtractedToolCallInformation(tools_called=bool(calls), tool_calls=calls, content=text or None)

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> DeltaMessage | None:
        """What the next piece has settled: text at once, a call when it is whole."""
        if request.tool_choice == "none":
            return DeltaMessage(content=delta_text) if delta_text else None
        self._reader = self._reader or _make_reader(request)
        return self._message(self._reader.feed(delta_text))

    def finish_streaming(self) -> DeltaMessage | None:
        """What was held back when the stream ended."""
        return self._message(self._reader.finish()) if self._reader else None

    def _message(self, found: Sequence[str | FoundCall]) -> DeltaMessage | None:
        if not found:
            return None
        text = "".join(each for each in found if isinstance(each, str))
        calls = []
        for each in found:
            if isinstance(each, FoundCall):
                function = DeltaFunctionCall(name=each.name, arguments=each.arguments)
                index = self._count
                calls.append(DeltaToolCall(id=make_tool_call_id(), type="function", index=index, function=function))
                self._count += 1
        return DeltaMessage(**({"content": text} if text else {}), **({"tool_calls": calls} if calls else {}))


class FreeAgentFabricToolParser(AgentFabricToolParser):
    """The same, for revisions whose calls are to be the model's own wherever it may choose."""

    constrains = False


def _make_reader(request: Any) -> CallReader:
    """Under a grammar only the limit of tokens ends a call too early: it is none. Without, it may be text like any other."""
    outputs = request.structured_outputs
    return CallReader(drop_unfinished=outputs is not None and outputs.structural_tag is not None)


def _show_no_tools(params: ChatParams, *defaults: Any, **more: Any) -> ChatParams:
    """`ChatParams.with_defaults` that makes `tools: []` of a request none at all.

    vLLM 0.32: a request's chat_template_kwargs cannot set anything to null, and Llama 3's templates print a preamble for an empty
    list of tools (`tools is not none`), which no row was trained with.
    """
    merged = _with_defaults(params, *defaults, **more)
    kwargs = merged.chat_template_kwargs
    return replace(merged, chat_template_kwargs={**kwargs, "tools": None}) if kwargs.get("tools") == [] else merged


_with_defaults = ChatParams.with_defaults
ChatParams.with_defaults = _show_no_tools
ToolParserManager.register_module("agentfabric", module=AgentFabricToolParser)
ToolParserManager.register_module("agentfabric-free", module=FreeAgentFabricToolParser)
