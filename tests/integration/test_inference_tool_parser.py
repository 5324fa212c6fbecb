"""Our plug-in within vLLM's own parser: what the serving layer calls for every piece of a stream, at every split point."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

import pytest

from services.inference.tools import render_tools

os.environ.setdefault("VLLM_PLUGINS", "")  # ms-swift's would import torchvision

pytestmark = [pytest.mark.slow, pytest.mark.heavy, pytest.mark.timeout(300)]

CALL = '查一下。\nAction: book 车票\nAction Input: {"to": {"city": "上海 }"}}\n'
TOOLS = [{"type": "function", "function": {"name": "book 车票", "parameters": {"type": "object", "properties": {}}}}]
BODY = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def parser_class() -> Any:
    """The parser that `--tool-call-parser agentfabric` makes."""
    from vllm.parser import ParserManager
    from vllm.tool_parsers import ToolParserManager

    ToolParserManager.import_tool_parser("services.inference.tool_parser")
    return ParserManager.get_parser(tool_parser_name="agentfabric", enable_auto_tools=True)


def make_request(**fields: Any) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return ChatCompletionRequest.model_validate({**BODY, **fields})


def stream(parser_class: Any, request: Any, pieces: Iterable[str]) -> tuple[str, list[tuple[int, str, str]]]:
    """(text, calls) of a streamed answer."""
    parser = parser_class(None, request.tools)
    given = [*pieces, ""]
    deltas = [
        parser.parse_delta(piece, [], request, prompt_token_ids=[1], finished=number == len(given) - 1)
        for number, piece in enumerate(given)
    ]
    told = [delta for delta in deltas if delta is not None]
    calls = [(c.index, c.function.name, c.function.arguments) for delta in told for c in delta.tool_calls]
    assert all(c.id for delta in told for c in delta.tool_calls)
    return "".join(delta.content or "" for delta in told), calls


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "book 车票"}}])
def test_a_streamed_answer_says_the_same_as_a_whole_one_at_every_split_point(parser_class: Any, choice: Any) -> None:
    request = parser_class(None).adjust_request(make_request(tools=TOOLS, tool_choice=choice))
    for answer in (CALL, CALL * 2, "只是文字。\n", CALL[:-4], "Action"):
        parser = parser_class(None, request.tools)
        _, content, calls = parser.parse(answer, request, enable_auto_tools=True)
        told = content or "", [(n, call.name, call.arguments) for n, call in enumerate(calls or ())]
        assert len(told[1]) == answer.count("}}\n")
        assert stream(parser_class, request, answer) == told
        for cut in range(len(answer)):
            assert stream(parser_class, request, [answer[:cut], answer[cut:]]) == told


@pytest.mark.parametrize("after", ["", "\nObservation: <result>made up", "Observation: <result>made up"])
def test_the_stop_word_ends_an_answer_after_a_call_and_not_within_its_arguments(parser_class: Any, after: str) -> None:
    from vllm.v1.engine.detokenizer import check_stop_strings

    stop = render_tools({"tools": TOOLS, "messages": BODY["messages"]})["stop"]
    call = 'Action: book 车票\nAction Input: {"note": "Observation: patient stable"}\n'
    said = ""
    for character in call + after:
        said += character
        if found := check_stop_strings(said, 1, stop, include_in_output=False):
            said = said[: found[1]]
            break
    request = parser_class(None).adjust_request(make_request(tools=TOOLS))
    parser = parser_class(None, request.tools)
    _, content, calls = parser.parse(said, request, enable_auto_tools=True)
    assert not content and [c.arguments for c in calls] == ['{"note": "Observation: patient stable"}']


def test_without_tools_or_with_choice_none_text_is_text(parser_class: Any) -> None:
    for request in (make_request(), make_request(tools=TOOLS, tool_choice="none")):
        assert stream(parser_class, request, CALL) == (CALL, [])
        parser = parser_class(None, request.tools)
        assert parser.parse(CALL, request, enable_auto_tools=True) == (None, CALL, [])


def test_rendered_tools_are_not_shown_to_the_models_own_template(parser_class: Any) -> None:
    from vllm.renderers.params import ChatParams

    for told, shown in (({"tools": []}, None), ({}, TOOLS)):
        params = make_request(tools=TOOLS, chat_template_kwargs=told).build_chat_params(None, "auto")
        assert isinstance(params, ChatParams)
        assert params.with_defaults({"tools": TOOLS}).chat_template_kwargs["tools"] == shown


def test_the_grammar_is_on_unless_request_or_revision_turn_it_off(parser_class: Any) -> None:
    from vllm.parser import ParserManager

    free = ParserManager.get_parser(tool_parser_name="agentfabric-free", enable_auto_tools=True)
    off, on = {"vllm_xargs": {"constrain_tools": 0}}, {"vllm_xargs": {"constrain_tools": 1}}
    for made, fields, constrained in (
        (parser_class, {}, True),
        (parser_class, off, False),
        (parser_class, {**off, "tool_choice": "required"}, True),
        (free, {}, False),
        (free, on, True),
    ):
        request = made(None, []).adjust_request(make_request(tools=TOOLS, **fields))
        assert (request.structured_outputs is not None) == constrained


def test_several_calls_follow_only_where_they_are_asked_for_and_a_format_is_the_other_way_to_answer(
    parser_class: Any,
) -> None:
    def grammar(**fields: Any) -> Any:
        request = parser_class(None, []).adjust_request(make_request(tools=TOOLS, **fields))
        return json.loads(request.structured_outputs.structural_tag)["format"]

    assert grammar()["stop_after_first"] and not grammar(parallel_tool_calls=True)["stop_after_first"]
    calls, output = grammar(response_format={"type": "json_object"})["elements"]
    assert calls["at_least_one"] and output["type"] == "json_schema"
