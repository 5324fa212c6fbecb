"""A request with tools is asked with the very prompt that conversion trains, and what is wrong with it is named at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabrictune.v1 import inference_pb2
from services.common.errors import InvalidSpec
from services.common.fabric import FORBIDDEN_IN_NAMES
from services.conversion.readers import openai_tools
from services.conversion.rendering import Renderer
from services.conversion.spec import Spec
from services.conversion.spill import Row
from services.inference.chat import read_chat
from services.inference.grammar import render_grammar
from services.inference.tools import render_tools

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<\r"), max_size=20)
NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="".join(FORBIDDEN_IN_NAMES), exclude_categories=["Cc", "Zs"]),
    min_size=1,
    max_size=8,
).map(str.strip)
PROPERTY = st.one_of(
    st.fixed_dictionaries({"type": st.sampled_from(["string", "integer", "boolean"])}, optional={"description": WORDS}),
    st.fixed_dictionaries({"enum": st.lists(WORDS, min_size=1, max_size=3)}),
    st.just({"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}),
    st.just({"$ref": "#/$defs/Point"}),
    st.just(
        {"description": "first", "type": "array", "items": {"type": "object", "properties": {"x": {"type": "number"}}}}
    ),
)
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | WORDS, lambda inner: st.lists(inner, max_size=2))


@st.composite
def tool_sets(draw: st.DrawFn) -> list[dict[str, Any]]:
    """OpenAI tools: names with blanks and Chinese, schemas as clients write them."""
    tools = []
    for name in draw(st.lists(NAMES.filter(bool), min_size=1, max_size=4, unique=True)):
        function: dict[str, Any] = {"name": draw(st.sampled_from(["", "查 ", "get "])) + name}
        if draw(st.booleans()):
            function["description"] = draw(WORDS)
        if draw(st.booleans()):
            properties = draw(st.dictionaries(NAMES.filter(bool), PROPERTY, max_size=4))
            function["parameters"] = {
                "$defs": {"Point": {"type": "object", "properties": {"x": {"type": "number"}}}},
                "properties": properties,
                "type": "object",
                "required": [key for key in properties if draw(st.booleans())],
                "additionalProperties": False,
            }
        tools.append({"type": "function", "function": function})
    return tools


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """A row in OpenAI's form: rounds of a question, calls with their results, and an answer."""
    tools = draw(tool_sets())
    names = [tool["function"]["name"] for tool in tools]
    said = WORDS.filter(lambda text: text.strip() != "")
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": draw(st.sampled_from(["system", "developer"])), "content": draw(said)})
    mark = draw(st.sampled_from(["?", "天气"]))  # AgentFabric speaks the language of the question that it is asked now
    ids = (f"call-{number}" for number in range(100))
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": f"{draw(st.text('abc <>', max_size=9))}{mark}"})
        for _ in range(draw(st.integers(0, 3))):
            calls = []
            for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
                arguments = json.dumps(
                    draw(st.dictionaries(NAMES, VALUES, max_size=3)), ensure_ascii=draw(st.booleans())
                )
                function = {"name": draw(st.sampled_from(names)), "arguments": arguments}
                calls.append({"id": next(ids), "type": "function", "function": function})
            messages.append({"role": "assistant", "content": draw(st.none() | WORDS), "tool_calls": calls})
            results = [{"role": "tool", "tool_call_id": call["id"], "content": draw(WORDS)} for call in calls]
            messages += draw(st.permutations(results))
        messages.append({"role": "assistant", "content": draw(said)})
    return {"tools": tools, "messages": messages}


def trained_prompts(row: dict[str, Any]) -> list[Any]:
    """What stands before the turn that each "split" row of a conversion with the default spec trains."""
    read = openai_tools.read(row)
    spec = Spec.model_validate({"sources": [{"uri": "x", "format": "openai"}], "split": {"validation": 0, "test": 0}})
    stored = Row("", "x", 0, 0, read.tools, read.rounds, read.system, read.instruction)
    return [example.messages[:-1] for _, example in Renderer(spec).alone(stored, read.tools, only="split")]


def plain(messages: Any) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


@settings(max_examples=60, deadline=None)
@given(conversations())
def test_every_turn_is_asked_with_the_prompt_that_it_was_trained_with(row: dict[str, Any]) -> None:
    asked: list[list[dict[str, str]] | None] = []
    for number, message in enumerate(row["messages"]):
        before = row["messages"][:number]
        if message["role"] == "assistant":
            asked.append(plain(render_tools({"tools": row["tools"], "messages": before})["messages"]))
            # A row trains one call; of several calls in one message the later ones follow results not known yet.
            asked += [None] * (len(message.get("tool_calls") or ()) - 1)
    trained = [plain(prompt) for prompt in trained_prompts(row)]
    assert len(asked) == len(trained)
    assert [a for a in asked if a is not None] == [t for a, t in zip(asked, trained, strict=True) if a is not None]


PARAMETERS = {
    "type": "object",
    "properties": {"location": {"type": "string", "description": "城市"}},
    "required": ["location"],
}
FUNCTION: dict[str, Any] = {"name": "amap_weather", "description": "查天气", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
QUESTION = {"role": "user", "content": "朝阳区天气怎样？"}
CALL = {"id": "c1", "type": "function", "function": {"name": "amap_weather", "arguments": '{"location":"朝阳区"}'}}


def test_a_result_stands_in_the_users_turn_as_roleplay_sends_it() -> None:
    called = {"role": "assistant", "content": "我来查询一下。", "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "晴"}]}
    sent = render_tools({"model": "m", "tools": [TOOL], "messages": [QUESTION, called, result], "stop": "X"})
    assert sent["messages"][-1] == {
        "role": "user",
        "content": "(。你可以使用工具：[amap_weather])朝阳区天气怎样？我来查询一下。\nAction: amap_weather\n"
        'Action Input: {"location": "朝阳区"}\n\nObservation: <result>晴</result>\nAnswer:',
    }
    assert "amap_weather: amap_weather API。查天气 输入参数: " in sent["messages"][0]["content"]
    assert sent["stop"] == ["X", "\nObservation:"] and sent["model"] == "m" and sent["tool_choice"] == "auto"
    assert sent["chat_template_kwargs"] == {"tools": []} and sent["tools"] == [TOOL]


def test_all_system_messages_are_the_role_and_without_one_it_is_that_of_training() -> None:
    system = {"role": "system", "content": "你扮演一个天气预报助手"}
    body = {"tools": [TOOL], "messages": [system, QUESTION, {"role": "developer", "content": "Be short."}]}
    assert "# 指令\n\n你扮演一个天气预报助手\n\nBe short.\n\n请注意" in render_tools(body)["messages"][0]["content"]
    alone = render_tools({"tools": [TOOL], "messages": [QUESTION]})["messages"][0]["content"]
    assert "# 指令\n\n你是一个乐于助人的助手。" in alone


def test_the_engine_is_told_whether_to_constrain_and_that_none_means_no_call() -> None:
    body: dict[str, Any] = {"tools": [TOOL], "messages": [QUESTION]}
    assert "vllm_xargs" not in render_tools(body)
    free = render_tools({**body, "constrain_tools": False, "vllm_xargs": {"a": 1}})
    assert free["vllm_xargs"] == {"a": 1, "constrain_tools": 0} and "constrain_tools" not in free
    none = render_tools({**body, "tool_choice": "none"})
    assert json.loads(none["structured_outputs"]["structural_tag"])["format"]["excludes"] == ["Action:"]
    assert "structured_outputs" not in render_tools({**body, "tool_choice": "none", "constrain_tools": False})


def test_the_grammar_has_the_clients_own_schemas_and_the_named_tool_alone() -> None:
    tools = [FUNCTION, {"name": "free", "strict": False, "parameters": {"type": "object", "properties": {}}}]
    grammar = render_grammar(tools, only="", forced=False, several=False)["format"]
    assert [tag["begin"] for tag in grammar["tags"]] == [
        f"Action: {n}\nAction Input: " for n in ("amap_weather", "free")
    ]
    assert grammar["tags"][0]["content"]["json_schema"] == PARAMETERS
    assert grammar["tags"][1]["content"]["json_schema"]["additionalProperties"] is True
    assert (grammar["at_least_one"], grammar["stop_after_first"]) == (False, True)
    named = render_grammar(tools, only="free", forced=True, several=True)["format"]
    assert len(named["tags"]) == 1 and (named["at_least_one"], named["stop_after_first"]) == (True, False)


def test_arguments_are_an_object_whatever_a_schema_combines_at_its_top() -> None:
    a, b = {"properties": {"a": {"type": "string"}}}, {"required": ["b"]}
    base = {"properties": {"b": {"type": "integer"}}, "required": []}

    def schema(**parameters: Any) -> Any:
        tools = [{"name": "f", "parameters": parameters}]
        return render_grammar(tools, only="", forced=False, several=False)["format"]["tags"][0]["content"][
            "json_schema"
        ]

    both = {"type": "object", "properties": {**base["properties"], **a["properties"]}}  # type: ignore[dict-item]
    assert schema(**base, allOf=[a, b]) == {**both, "required": ["b"]}
    chosen = schema(**base, anyOf=[a, b], **{"$defs": {"x": {}}})
    assert [(part["type"], part["required"]) for part in chosen["anyOf"]] == [("object", []), ("object", ["b"])]
    assert chosen["$defs"] == {"x": {}} and "type" not in chosen
    assert schema(allOf=[True]) == {"type": "object", "required": []}


def function(**told: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **told}}


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no list": ({"tools": {"a": 1}}, ["tools"]),
    "too many": (
        {"tools": [function()] * 1025, "tool_choice": {"type": "function", "function": {"name": "f"}}}, ["tools"]
    ),
    "no function": ({"tools": ["f", {"type": "web_search"}]}, ["tools[0]", "tools[1]"]),
    "names": (
        {"tools": [function(name=name) for name in ("a\nb", "a\u2028b", "", 3, " a", "x", "x")]},
        [f"tools[{n}].function.name" for n in (0, 1, 2, 3, 4, 6)],
    ),
    "words": ({"tools": [function(description=3, strict="yes")]}, ["tools[0].function.description", "tools[0].function.strict"]),
    "no schema": (
        {"tools": [function(parameters="x"), function(name="g", parameters={"type": "array"})]},
        ["tools[0].function.parameters", "tools[1].function.parameters"],
    ),
    "inside schemas": (
        {
            "tools": [
                function(
                    parameters={
                        "type": "object",
                        "required": "a",
                        "properties": {
                            "a": {"type": "strin", "enum": []},
                            "b": {"type": "array", "items": {"anyOf": [{"type": "object", "properties": 3}]}},
                            "c": "string",
                            "d": {"$ref": "#/$defs/none"},
                        },
                    }
                )
            ]
        },
        [
            "tools[0].function.parameters.required",
            "tools[0].function.parameters.properties.a.type",
            "tools[0].function.parameters.properties.a.enum",
            "tools[0].function.parameters.properties.b.items.anyOf[0].properties",
            "tools[0].function.parameters.properties.c",
            "tools[0].function.parameters.properties.d.$ref",
        ],
    ),
    "choices": ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, ["tool_choice.function.name"]),
    "no choice": ({"tool_choice": "any", "constrain_tools": "no"}, ["tool_choice", "constrain_tools"]),
    "no messages": ({"messages": []}, ["messages"]),
    "roles": (
        {"messages": [{"role": "tool", "content": "x"}, {"role": "judge"}, "x"]},
        ["messages[0]", "messages[1].role", "messages[2].role", "messages"],
    ),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        ["messages[0].content"],
    ),
    "calls": (
        {
            "messages": [
                QUESTION,
                {"role": "assistant", "tool_calls": [
                    {**CALL, "function": {"name": "f", "arguments": "{"}}, {"id": "c2", "function": {"name": "f"}}, {"id": "c3"}
                ]},
                {"role": "tool", "tool_call_id": "c9", "content": "x"},
                {"role": "tool", "tool_call_id": "c1", "content": "x"},
            ]
        },
        [
            "messages[1].tool_calls[0].function.arguments",
            "messages[1].tool_calls[2]",
            "messages[2].tool_call_id",
            "messages[1].tool_calls[1]",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("told", "fields"), WRONG.values(), ids=WRONG.keys())
def test_all_that_is_wrong_is_named_at_once(told: dict[str, Any], fields: list[str]) -> None:
    with pytest.raises(InvalidSpec) as caught:
        render_tools({"tools": [function()], "messages": [QUESTION], **told})
    assert [violation.field for violation in caught.value.violations] == fields


def test_half_a_surrogate_pair_in_a_call_of_the_history_stays_as_the_model_wrote_it() -> None:
    function = {"name": "amap_weather", "arguments": '{"a": "\\ud83d", "b": "\\ud83c\\udf24"}'}
    called = {"role": "assistant", "tool_calls": [{**CALL, "function": function}]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "晴"}
    sent = render_tools({"tools": [TOOL], "messages": [QUESTION, called, result]})
    assert 'Action Input: {"a": "\\ud83d", "b": "🌤"}\n' in sent["messages"][-1]["content"]
    sent["messages"][-1]["content"].encode()


def long_history(size: int) -> dict[str, Any]:
    said = {"role": "assistant", "content": "a" * 10}
    return {"tools": [TOOL], "messages": [QUESTION, *[said] * size]}


def many_properties(size: int) -> dict[str, Any]:
    names = [f"p{number}" for number in range(size // 2)]
    parameters = {"type": "object", "properties": {name: {} for name in names}, "required": names}
    return {"tools": [function(parameters=parameters)], "messages": [QUESTION]}


@pytest.mark.parametrize("make", [long_history, many_properties])
def test_a_large_request_is_rendered_in_linear_time(make: Callable[[int], dict[str, Any]]) -> None:
    small, large = (min(seconds_to_render(make(size)) for _ in range(3)) for size in (4000, 40_000))
    assert large <= 50 * max(small, 0.001), f"{small:.4f} s, then {large:.4f} s for ten times as much"


def seconds_to_render(body: dict[str, Any]) -> float:
    begin = time.thread_time()
    render_tools(body)
    return time.thread_time() - begin


def test_names_with_blanks_and_chinese_are_fine() -> None:
    tools = [function(name="English to Chinese Translator"), function(name="查询 天气")]
    system = render_tools({"tools": tools, "messages": [QUESTION]})["messages"][0]["content"]
    assert "[English to Chinese Translator,查询 天气]" in system


def test_a_generate_request_says_the_same_as_an_openai_one() -> None:
    request = inference_pb2.GenerateRequest(
        messages=[
            inference_pb2.Message(role="user", content=QUESTION["content"]),
            inference_pb2.Message(
                role="assistant",
                tool_calls=[inference_pb2.ToolCall(id="c1", name="amap_weather", arguments='{"location":"朝阳区"}')],
            ),
            inference_pb2.Message(role="tool", content="晴", tool_call_id="c1"),
        ],
        tools=[inference_pb2.Tool(name="amap_weather", description="查天气", parameters=json.dumps(PARAMETERS))],
        tool_choice="amap_weather",
        constrain_tools=False,
        sampling=inference_pb2.Sampling(seed=7),
    )
    messages, rest = read_chat(request)
    told = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert messages == [*told, {"role": "tool", "content": "晴", "tool_call_id": "c1"}]
    choice = {"type": "function", "function": {"name": "amap_weather"}}
    assert rest == {"seed": 7, "tools": [TOOL], "tool_choice": choice, "constrain_tools": False}
    request.tools[0].parameters = "{"
    with pytest.raises(InvalidSpec, match=r"tools\[0\]\.parameters"):
        read_chat(request)
