"""The readers of AgentFabric's own rows, of OpenAI's tools and of plain chat: what they make of a row, and what they refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.common.fabric import (
    FORBIDDEN_IN_NAMES,
    INSTRUCTIONS,
    Round,
    Tool,
    Turn,
    language_of,
    render_prefix,
    render_rows,
    render_system,
)
from services.conversion.fabric_grammar import parse_prompt, parse_transcript, split_prefix
from services.conversion.readers import READERS
from services.conversion.refusals import (
    DUPLICATE_TOOL,
    EMPTY_CONVERSATIONS,
    INCOMPLETE_TURN,
    INVALID_ACTION_INPUT,
    INVALID_PARAMETERS,
    INVALID_TOOL_NAME,
    INVALID_TOOLS,
    NO_SYSTEM_TURN,
    NOT_FABRIC_PROMPT,
    RESULT_TAG_IN_RESULT,
    ROLE_ORDER,
    UNEXPECTED_TOOL_CALL,
    UNKNOWN_TOOL,
    Refused,
)
from services.conversion.rows import Conversation, make_call, make_tool

CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "名"}}, "required": ["city"]}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "required": []}
WEATHER = make_tool("amap_weather", "获取对应城市的天气数据", CITY)
DRAW = make_tool("image_gen", "Draws.", NOTHING)
SYSTEM = render_system(
    [WEATHER, DRAW], "你扮演AI-Agent，你的名字是小天。\n你具有下列具体功能：查天气\n下面你将开始扮演小天", "zh"
)
KNOWLEDGE = "\n\n# 知识库\n\n北京是首都。\n\n# 工具\n\n"
CALL_TEXT = 'Action: amap_weather\nAction Input: {"city": "北京"}\n'
RESULT = "\nObservation: <result>晴</result>\nAnswer:"
CALL = make_call("amap_weather", {"city": "北京"}, "晴")
PREFIX = "(你正在扮演小天。你可以使用工具：[amap_weather,image_gen])"


def fabric_row(*turns: str, system: str = SYSTEM) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    told = [{"from": role, "value": text} for role, text in zip(roles, turns, strict=False)]
    return {"id": "r", "conversations": [{"from": "system", "value": system}, *told]}


def read_fabric(*turns: str, system: str = SYSTEM) -> Conversation:
    return READERS["agentfabric"](fabric_row(*turns, system=system))


def refusal(format: str, row: dict[str, Any]) -> str:
    with pytest.raises(Refused) as refused:
        READERS[format](row)
    return refused.value.code


# AgentFabric's own rows


def test_a_captured_conversation_keeps_its_prompt_word_for_word() -> None:
    got = read_fabric(PREFIX + "北京天气？", f"{CALL_TEXT}{RESULT} 北京是晴天。")
    wanted = Round("北京天气？", Turn((CALL,), "北京是晴天。"), PREFIX)
    assert got == Conversation("r", (WEATHER, DRAW), (wanted,), SYSTEM)


def test_messages_and_line_ends_of_windows_read_alike() -> None:
    row = fabric_row(PREFIX + "北京天气？", f"{CALL_TEXT}{RESULT} 晴。")
    messages = [{"role": t["from"], "content": t["value"].replace("\n", "\r\n")} for t in row["conversations"]]
    got = READERS["agentfabric"]({"id": "r", "messages": messages})
    assert got._replace(system=SYSTEM) == READERS["agentfabric"](row)


def test_a_turn_calls_several_times_with_words_in_between() -> None:
    again = CALL_TEXT.replace("北京", "上海")
    text = f"我来查。\n工具调用\n{CALL_TEXT}{RESULT} 北京是晴天，再查上海。\n\n{again}{RESULT.replace('晴', '雨')} 上海有雨。"
    [(_, turn, _)] = read_fabric(PREFIX + "天气？", text).rounds
    second = make_call("amap_weather", {"city": "上海"}, "雨")._replace(lead="北京是晴天，再查上海。")
    assert turn == Turn((CALL._replace(lead="我来查。\n工具调用"), second), "上海有雨。")


@pytest.mark.parametrize(
    "text",
    [
        'Action: amap_weather\nAction Input: {"city": "北京"}\nObservation: <result>晴</result>\nAnswer: 晴天',
        'Action:amap_weather \nAction Input:\n{"city":\n "北京"}\n\nObservation: <result>晴</result>\n\nAnswer:晴天\n',
        "Action: amap_weather\nAction Input: {'city': '北京'}\nObservation:\nObservation: <result>晴</result>\nAnswer: 晴天",
    ],
    ids=["without a blank line", "as older versions took it", "with the stop word kept"],
)
def test_arguments_become_strict_json(text: str) -> None:
    [(_, turn, _)] = read_fabric(PREFIX + "天气？", text).rounds
    assert turn == Turn((CALL,), "晴天")


def test_a_result_is_kept_to_the_last_blank() -> None:
    result = " {'a': 1}\n\nAction: x\nAction Input: y \n"
    [(_, turn, _)] = read_fabric(
        PREFIX + "q", f"{CALL_TEXT}\nObservation: <result>{result}</result>\nAnswer: ok"
    ).rounds
    assert turn.calls[0].observation == result


@pytest.mark.parametrize(
    "prefix",
    [
        "(。你可以使用工具：[amap_weather,image_gen])",
        PREFIX,
        PREFIX[:-1] + "。请查看前面的知识库)",
        PREFIX + '[上传文件 "a.txt,b (1).png"]',
    ],
)
def test_the_prefix_is_kept_word_for_word(prefix: str) -> None:
    assert read_fabric(f"{prefix}(1) 画什么？", "画猫。").rounds == (
        Round("(1) 画什么？", Turn(answer="画猫。"), prefix),
    )


def test_a_role_with_brackets_in_its_name_ends_where_the_prompt_says() -> None:
    system = INSTRUCTIONS["en"].replace("{role}", "x\nNow you will start playing asTim (T)) Tam")
    got = read_fabric('(You are playing as Tim (T)) Tam)[Upload file "a"]hi) there', "Hello.", system=system)
    assert got.rounds == (
        Round("hi) there", Turn(answer="Hello."), '(You are playing as Tim (T)) Tam)[Upload file "a"]'),
    )


def test_an_earlier_question_has_the_prefix_that_it_had_when_it_was_the_newest() -> None:
    got = read_fabric("你好", "你好！", f'{PREFIX}[上传文件 "a.png"]画猫', "画好了。")
    assert [each.prefix for each in got.rounds] == [PREFIX, f'{PREFIX}[上传文件 "a.png"]']


def test_a_question_without_a_prefix_gets_what_agentfabric_puts_there() -> None:
    assert read_fabric("你好", "你好！").rounds[0].prefix == render_prefix([WEATHER, DRAW], "zh")
    assert read_fabric("hi", "Hi!", system=INSTRUCTIONS["en"]).rounds[0].prefix == ""


def test_a_prompt_without_a_tool_section_has_no_tools() -> None:
    for language in ("zh", "en"):
        got = read_fabric("你好", "你好！", system=INSTRUCTIONS[language].replace("{role}", "Be kind."))
        assert got.tools == ()
        assert got.system == INSTRUCTIONS[language].replace("{role}", "Be kind.")


@pytest.mark.parametrize("system", [KNOWLEDGE + SYSTEM, SYSTEM.strip(), "\n\n# 知识库\n\nx\n\n" + SYSTEM])
def test_knowledge_may_come_first_and_blank_lines_may_be_gone(system: str) -> None:
    got = read_fabric(PREFIX + "你好", "你好！", system=system)
    assert (got.tools, got.system) == ((WEATHER, DRAW), system)


def test_knowledge_without_tools() -> None:
    system = f"{KNOWLEDGE}\n\n{INSTRUCTIONS['zh'].replace('{role}', '友善')}"
    got = read_fabric("(。请查看前面的知识库)你好", "你好！", system=system)
    assert (got.tools, got.rounds[0].prefix) == ((), "(。请查看前面的知识库)")


def test_parameters_that_roleplay_prints_as_a_list_become_a_schema() -> None:
    schema = json.dumps(CITY, ensure_ascii=False)
    listed = '[{"name": "city", "description": "名", "required": true}]'
    assert parse_prompt(SYSTEM.replace(schema, listed)).tools == (WEATHER, DRAW)
    assert parse_prompt(SYSTEM.replace(', "required": ["city"]', "")).tools[0].parameters.endswith('"required": []}')


# RolePlay's wire


def test_the_two_parts_of_a_turn_on_the_wire_are_put_together() -> None:
    inline = read_fabric(PREFIX + "北京天气？", f"{CALL_TEXT}{RESULT} 晴天。")
    assert read_fabric(f"{PREFIX}北京天气？{CALL_TEXT}{RESULT}", "晴天。") == inline


def test_on_the_wire_a_turn_may_go_on_with_another_call() -> None:
    again = CALL_TEXT.replace("北京", "上海")
    got = read_fabric("早", "早！", f"{PREFIX}哪里晴？{CALL_TEXT}{RESULT}", f"北京晴。\n\n{again}").rounds[1].turn
    assert got == Turn((CALL, make_call("amap_weather", {"city": "上海"})._replace(lead="北京晴。")))


@pytest.mark.parametrize(
    "turns",
    [
        (f"天气？{CALL_TEXT}{RESULT}", "晴。", "谢谢", "不客气"),
        (f"天气？我来查。\n{CALL_TEXT}{RESULT}", "晴。"),
        (f"{PREFIX}{CALL_TEXT}{RESULT}", "晴。"),
        (f"天气？{RESULT}", "晴。"),
    ],
    ids=["before the last turn", "prose after the question", "no question", "no call"],
)
def test_a_wire_row_that_cannot_be_put_together_is_refused(turns: tuple[str, ...]) -> None:
    assert refusal("agentfabric", fabric_row(*turns)) == INCOMPLETE_TURN


@pytest.mark.parametrize("layout", ["split", "inline"])
def test_what_fabric_renders_is_read_back(layout: str) -> None:
    second = make_call("image_gen", {}, "![IMAGEGEN](https://a.cn/1.png)")._replace(lead="晴天，画下来。")
    wanted = (
        Round("你好", Turn(answer="你好！"), PREFIX),
        Round("画北京的天气", Turn((CALL, second), "![图片](https://a.cn/1.png)"), PREFIX),
    )
    examples = list(render_rows(layout, SYSTEM, [WEATHER, DRAW], wanted, "zh"))
    messages: list[dict[str, Any]] = []
    for message in examples[-1].messages:
        if messages and messages[-1]["role"] == message["role"]:
            messages[-1]["content"] += message["content"]
        else:
            messages.append({"role": message["role"], "content": message["content"]})
    assert READERS["agentfabric"]({"messages": messages}).rounds == wanted


# What is refused of AgentFabric's rows


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Action: other\nAction Input: {}\n" + RESULT, UNKNOWN_TOOL),
        (CALL_TEXT.replace('{"city": "北京"}', "北京") + RESULT, INVALID_ACTION_INPUT),
        (f"{CALL_TEXT}\n{CALL_TEXT}{RESULT} 晴", INCOMPLETE_TURN),
        (f"{CALL_TEXT}\nObservation: <result>晴", INCOMPLETE_TURN),
        (f"{CALL_TEXT}\nObservation: <result>晴</result> 晴天", INCOMPLETE_TURN),
        (f"{CALL_TEXT}\nObservation: <result>a</result>b</result>\nAnswer: c", RESULT_TAG_IN_RESULT),
        (f"{CALL_TEXT}\nObservation: <result>a</result>\nAnswer: b</result>\nAnswer: c", RESULT_TAG_IN_RESULT),
        ("好\nObservation: <result>晴</result>\nAnswer: 晴", RESULT_TAG_IN_RESULT),
        ("好\nAction Input: {}", INCOMPLETE_TURN),
        ("好\nAction: amap_weather", INCOMPLETE_TURN),
        ("", INCOMPLETE_TURN),
    ],
)
def test_a_broken_turn_is_refused(text: str, code: str) -> None:
    assert refusal("agentfabric", fabric_row(PREFIX + "天气？", text)) == code


def test_a_call_without_a_result_ends_the_conversation() -> None:
    assert read_fabric(PREFIX + "天气？", CALL_TEXT).rounds[0].turn == Turn((CALL._replace(observation=None),))
    assert refusal("agentfabric", fabric_row("天气？", CALL_TEXT, "谢谢", "不客气")) == INCOMPLETE_TURN


@pytest.mark.parametrize(
    ("system", "code"),
    [
        ("You are a helpful assistant.", NOT_FABRIC_PROMPT),
        ("Answer. You have access to the following APIs:\n\nUse the following format:\n", NOT_FABRIC_PROMPT),
        ("你好" + SYSTEM, NOT_FABRIC_PROMPT),
        (SYSTEM.partition("\n# 指令")[0], NOT_FABRIC_PROMPT),
        (SYSTEM.replace("必须是[amap_weather,image_gen]", "必须是[amap_weather]"), INVALID_PARAMETERS),
        (SYSTEM.replace("必须是[amap_weather,image_gen]", "必须是[amap_weather,image_gen,]"), NOT_FABRIC_PROMPT),
        (SYSTEM.replace("必须是[amap_weather,image_gen]", "必须是[amap_weather,other]"), NOT_FABRIC_PROMPT),
        (SYSTEM.replace("必须是[amap_weather,image_gen]", "必须是[]"), NOT_FABRIC_PROMPT),
        (SYSTEM.replace("工具调用\n", ""), NOT_FABRIC_PROMPT),
        (SYSTEM.replace('{"type"', "{type", 1), INVALID_PARAMETERS),
        (SYSTEM.replace('{"type": "object"', '{"type": NaN', 1), INVALID_PARAMETERS),
        (SYSTEM.replace(json.dumps(CITY, ensure_ascii=False), "[" * 100_000), INVALID_PARAMETERS),
        (SYSTEM.replace(json.dumps(CITY, ensure_ascii=False), '"city"'), INVALID_PARAMETERS),
        (render_system([WEATHER, WEATHER._replace(description="x")], "", "zh"), DUPLICATE_TOOL),
    ],
)
def test_another_prompt_is_refused(system: str, code: str) -> None:
    assert refusal("agentfabric", fabric_row("你好", "你好！", system=system)) == code


def test_a_prefix_of_other_tools_is_refused() -> None:
    assert refusal("agentfabric", fabric_row("(。你可以使用工具：[x])你好", "你好！")) == NOT_FABRIC_PROMPT


def test_a_row_without_a_prompt_is_refused() -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert refusal("agentfabric", row) == NO_SYSTEM_TURN


# Any tools that can be printed can be read back


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
LINE_END = " Format the arguments as a JSON object."
PIECES = st.sampled_from(
    [
        *(
            " 输入参数: ",
            " Parameters: ",
            "{}",
            '{"a": 1}',
            LINE_END,
            "\n\n",
            "\n",
            "a: a API。",
            "a: a API. ",
            "天",
            "。",
            ". ",
            ",",
        ),
        *(
            "## 当你需要调用工具时",
            "工具调用\nAction: 工具的名称，必须是[",
            "]之一\n",
            "\n# 指令\n\n",
            "\n# 工具\n\n",
            '"',
            "\\",
        ),
    ]
)
TEXT = st.text() | st.lists(PIECES | st.text(max_size=3), max_size=8).map("".join)
NAME = (
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="".join(FORBIDDEN_IN_NAMES)), min_size=1)
    | st.lists(st.sampled_from(["a", "b", ",", ": ", " API", "。", "]之一", "天", " 输入参数: "]), min_size=1).map(
        "".join
    )
).filter(lambda name: name == name.strip() and bool(name))
SCHEMA = st.builds(
    lambda properties, required, rest: {**rest, "type": "object", "properties": properties, "required": required},
    st.dictionaries(TEXT, JSON, max_size=3),
    st.lists(TEXT, max_size=2),
    st.dictionaries(TEXT, JSON, max_size=2),
)
ENCODABLE = st.builds(Tool, NAME, TEXT, SCHEMA.map(lambda schema: json.dumps(schema, ensure_ascii=False)))
ANY_TOOLS = st.lists(ENCODABLE, max_size=4, unique_by=lambda tool: tool.name)


@given(ANY_TOOLS, st.sampled_from(["zh", "en"]), st.sampled_from(["0.7.1", "0.7.2"]), st.text())
def test_tools_that_are_rendered_are_read_back(tools: list[Tool], language: str, wording: str, role: str) -> None:
    # Where a description itself holds the end of a line and then the next one's beginning, two lists print the same text.
    if any(f"{LINE_END}\n\n{tool.name}: " in other.description for tool in tools for other in tools):
        return
    prompt = parse_prompt(render_system(tools, role, language, wording))
    assert list(prompt.tools) == tools
    assert prompt.language == language


@given(ANY_TOOLS, st.sampled_from(["zh", "en"]), TEXT.filter(lambda text: not text.startswith(("(", "["))))
def test_a_prefix_that_is_rendered_is_split_off(tools: list[Tool], language: str, query: str) -> None:
    prompt = parse_prompt(render_system([], "r", language))._replace(names=",".join(t.name for t in tools))
    prefix = render_prefix(tools, language)
    assert split_prefix(prefix + query, prompt) == (prefix, "", query)


@given(TEXT)
@example("\n# 工具\n\n## 你拥有如下工具：\n\n")
def test_any_prompt_and_any_turn_is_read_or_refused(text: str) -> None:
    start = SYSTEM[: SYSTEM.index("amap_weather")]
    for parse in (
        parse_prompt,
        lambda t: parse_prompt(f"{start}{t}{INSTRUCTIONS['zh']}"),
        lambda t: parse_transcript(t, {"a"}),
    ):
        try:
            parse(text)
        except Refused as refused:
            assert refused.code


@pytest.mark.parametrize(
    "piece",
    [
        "Action: a\nAction Input: {",
        "Action:",
        "\n\n",
        f"{LINE_END}\n\namap_weather: ",
        " 输入参数: [",
        "(",
        "</result>",
    ],
)
def test_time_is_bounded_by_the_length(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    for parse in (
        lambda: parse_transcript(text, {"a", "amap_weather"}),
        lambda: parse_prompt(SYSTEM.replace("获取对应城市的天气数据", text)),
        lambda: split_prefix(text, parse_prompt(SYSTEM)),
    ):
        try:
            parse()  # pytest's timeout judges
        except Refused as refused:
            assert refused.code


@pytest.mark.parametrize("literal", [r"'\ud800'", "b'x'", "{1}", "1j", "["])
def test_turns_in_a_python_literal_that_hold_no_text_are_refused(literal: str) -> None:
    turns = f"[{{'from': 'user', 'value': {literal}}}, {{'from': 'assistant', 'value': 'b'}}]"
    assert refusal("chat", {"conversations": turns}) == EMPTY_CONVERSATIONS


# OpenAI's tools


FUNCTION = {"name": "amap_weather", "description": "获取对应城市的天气数据", "parameters": CITY}
TOOLS = [{"type": "function", "function": FUNCTION}]


def asked(*calls: tuple[str, str, Any], content: Any = None) -> dict[str, Any]:
    told = [{"id": i, "type": "function", "function": {"name": name, "arguments": a}} for i, name, a in calls]
    return {"role": "assistant", "content": content, "tool_calls": told}


def result(identity: Any, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identity, "content": content}


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def read_openai(*messages: dict[str, Any], tools: Any = TOOLS) -> Conversation:
    return READERS["openai"]({"id": 7, "tools": tools, "messages": list(messages)})


BEIJING, SHANGHAI = ("1", "amap_weather", '{"city": "北京"}'), ("2", "amap_weather", {"city": "上海"})


def test_a_call_and_its_result_become_a_turn() -> None:
    got = read_openai(said("user", "天气？"), asked(BEIJING), result("1", "晴"), said("assistant", "晴天。"))
    assert got == Conversation("7", (WEATHER,), (Round("天气？", Turn((CALL,), "晴天。")),))


@pytest.mark.parametrize(
    "tools",
    [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])], [FUNCTION], json.dumps([FUNCTION]), [TOOLS[0], FUNCTION]],
    ids=["list", "text", "list of texts", "bare", "bare text", "twice the same"],
)
def test_tools_come_in_several_forms(tools: Any) -> None:
    assert read_openai(said("user", "a"), said("assistant", "b"), tools=tools).tools == (WEATHER,)


@pytest.mark.parametrize("tools", [None, [], "[]", ""])
def test_a_row_may_have_no_tools(tools: Any) -> None:
    assert read_openai(said("user", "a"), said("assistant", "b"), tools=tools).tools == ()


def test_what_a_schema_lacks_is_added_and_what_it_has_is_kept() -> None:
    parameters = {
        "properties": {"a": {"enum": [1]}},
        "type": "object",
        "$defs": {"x": {}},
        "additionalProperties": False,
    }
    [tool, bare] = read_openai(
        said("user", "a"), said("assistant", "b"), tools=[{"name": "t", "parameters": parameters}, {"name": "u"}]
    ).tools
    assert tool == Tool(
        "t",
        "",
        '{"type": "object", "properties": {"a": {"type": "string", "description": "", "enum": [1]}}, "required": [], '
        '"$defs": {"x": {}}, "additionalProperties": false}',
    )
    assert bare.parameters == '{"type": "object", "properties": {}, "required": []}'


def test_several_calls_of_one_message_have_each_their_own_result() -> None:
    got = read_openai(
        said("user", "天气？"),
        asked(BEIJING, SHANGHAI, content="我来查。"),
        result("2", [{"type": "text", "text": "有"}, {"type": "text", "text": "雨"}]),
        result("1", "晴"),
        asked(("1", "amap_weather", ""), content="再查一次。"),
        result(None, "?"),
        said("assistant", "好了。"),
    )
    calls = (
        CALL._replace(lead="我来查。"),
        make_call("amap_weather", {"city": "上海"}, "有雨"),
        make_call("amap_weather", {}, "?")._replace(lead="再查一次。"),
    )
    assert got.rounds == (Round("天气？", Turn(calls, "好了。")),)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_systems_text_becomes_the_instruction(role: str) -> None:
    got = read_openai(
        said(role, "Be kind."), said("user", "a"), said("assistant", "b"), said("user", "c"), asked(BEIJING)
    )
    assert (got.instruction, got.system) == ("Be kind.", None)
    assert [r.turn for r in got.rounds] == [Turn(answer="b"), Turn((CALL._replace(observation=None),))]


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([], EMPTY_CONVERSATIONS),
        (["x"], EMPTY_CONVERSATIONS),
        ([said("user", [{"type": "image_url"}]), said("assistant", "b")], EMPTY_CONVERSATIONS),
        ([said("user", None), said("assistant", "b")], EMPTY_CONVERSATIONS),
        ([said("system", "x")], ROLE_ORDER),
        ([said("assistant", "b")], ROLE_ORDER),
        ([said("user", "a")], ROLE_ORDER),
        ([said("user", "a"), said("function", "x"), said("assistant", "b")], ROLE_ORDER),
        ([said("user", "a"), asked(BEIJING), result("1", "晴")], ROLE_ORDER),
        ([said("user", "a"), asked(BEIJING), said("assistant", "b")], ROLE_ORDER),
        ([said("user", "a"), said("assistant", "b"), said("assistant", "c")], ROLE_ORDER),
        ([said("user", "a"), said("user", "a"), said("assistant", "c")], INCOMPLETE_TURN),
        ([said("user", "a"), said("assistant", "")], INCOMPLETE_TURN),
        ([said("user", "a"), asked(BEIJING), said("user", "b"), said("assistant", "c")], INCOMPLETE_TURN),
        (
            [said("user", "a"), asked(BEIJING, SHANGHAI), result("2", "雨"), said("user", "b"), said("assistant", "c")],
            INCOMPLETE_TURN,
        ),
        ([said("user", "a"), asked(BEIJING, BEIJING)], INCOMPLETE_TURN),
        ([said("user", "a"), asked(BEIJING), result("9", "晴"), said("assistant", "c")], INCOMPLETE_TURN),
        ([said("user", "a"), asked(BEIJING), result(["1"], "晴"), said("assistant", "c")], INCOMPLETE_TURN),
        ([said("user", "a"), {"role": "assistant", "tool_calls": ["x"]}], INCOMPLETE_TURN),
        ([said("user", "a"), {"role": "assistant", "tool_calls": "x"}], INCOMPLETE_TURN),
        ([said("user", "a"), {"role": "assistant", "function_call": {"name": "x"}}], INCOMPLETE_TURN),
        ([said("user", "a"), asked(("1", "other", "{}"))], UNKNOWN_TOOL),
        ([said("user", "a"), asked(("1", "amap_weather", "北京"))], INVALID_ACTION_INPUT),
        ([said("user", "a"), asked(("1", "amap_weather", 3))], INVALID_ACTION_INPUT),
        ([said("user", "a"), asked(BEIJING), result("1", "</result>"), said("assistant", "c")], RESULT_TAG_IN_RESULT),
    ],
)
def test_openai_messages_that_are_refused(messages: list[Any], code: str) -> None:
    assert refusal("openai", {"tools": TOOLS, "messages": messages}) == code


@pytest.mark.parametrize(
    ("tools", "code"),
    [
        ("x", INVALID_TOOLS),
        ({"name": "t"}, INVALID_TOOLS),
        ([3], INVALID_TOOLS),
        (["["], INVALID_TOOLS),
        ([{"type": "retrieval"}], INVALID_TOOLS),
        ([{"name": 3}], INVALID_TOOLS),
        ([{"name": "a\nb"}], INVALID_TOOL_NAME),
        ([{"name": "t", "parameters": {"properties": 3}}], INVALID_PARAMETERS),
        ([{"name": "t", "parameters": "x"}], INVALID_PARAMETERS),
        ([FUNCTION, {**FUNCTION, "description": "x"}], DUPLICATE_TOOL),
    ],
)
def test_openai_tools_that_are_refused(tools: Any, code: str) -> None:
    assert refusal("openai", {"tools": tools, "messages": [said("user", "a"), said("assistant", "b")]}) == code


@given(JSON, JSON)
def test_any_openai_row_is_read_or_refused(tools: Any, messages: Any) -> None:
    for told in (messages, [said("user", "a"), {"role": "assistant", "tool_calls": messages}, result(messages, tools)]):
        try:
            READERS["openai"]({"tools": tools, "messages": told})
        except Refused as refused:
            assert refused.code


# Plain chat


def test_plain_chat_is_kept_as_it_is() -> None:
    turns = [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "Hello."}]
    got = READERS["chat"]({"id": "c", "conversations": turns})
    assert got == Conversation("c", (), (Round("hi", Turn(answer="Hello."), ""),), "")
    system = {"from": "system", "value": "Be kind."}
    assert READERS["chat"]({"conversations": [system, *turns]}).system == "Be kind."


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"messages": []}, EMPTY_CONVERSATIONS),
        ({"messages": [said("user", "a"), said("assistant", "  ")]}, INCOMPLETE_TURN),
        ({"messages": [said("user", "a")]}, ROLE_ORDER),
        ({"messages": [said("user", "a"), said("assistant", "b")], "tools": TOOLS}, UNEXPECTED_TOOL_CALL),
        ({"messages": [said("user", "a"), asked(BEIJING)]}, UNEXPECTED_TOOL_CALL),
        ({"messages": [said("user", "a"), said("tool", "x"), said("assistant", "b")]}, UNEXPECTED_TOOL_CALL),
        ({"messages": [said("system", SYSTEM), said("user", "a"), said("assistant", "b")]}, UNEXPECTED_TOOL_CALL),
        (
            {"messages": [said("system", INSTRUCTIONS["en"]), said("user", "a"), said("assistant", "b")]},
            UNEXPECTED_TOOL_CALL,
        ),
        (
            {
                "messages": [
                    said("system", "You have access to the following APIs:\n\nUse the following format:"),
                    said("user", "a"),
                    said("assistant", "b"),
                ]
            },
            UNEXPECTED_TOOL_CALL,
        ),
        ({"messages": [said("user", "a"), said("assistant", CALL_TEXT)]}, UNEXPECTED_TOOL_CALL),
        ({"messages": [said("user", "a"), said("assistant", "<|startofthink|>")]}, UNEXPECTED_TOOL_CALL),
    ],
)
def test_a_row_that_is_no_plain_chat_is_refused(row: dict[str, Any], code: str) -> None:
    assert refusal("chat", row) == code


def test_the_language_of_a_tools_line_is_that_of_its_description() -> None:
    assert (language_of(WEATHER.description), language_of(DRAW.description)) == ("zh", "en")
    assert parse_prompt(SYSTEM).tools == (WEATHER, DRAW)
