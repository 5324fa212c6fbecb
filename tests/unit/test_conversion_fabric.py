"""AgentFabric's prompt to the byte, in both languages, and both layouts of a conversation."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest

from services.common.fabric import (
    Round,
    Turn,
    render_prefix,
    render_rows,
    render_system,
    render_together,
)
from services.common.fabric_json import render_system_json
from services.conversion.rows import make_call, make_tool

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "name"}}, "required": ["city"]}
WEATHER = make_tool("weather", "Query the weather.", PARAMETERS)
DRAW = make_tool("画图", "根据描述画图。", {"type": "object", "properties": {}, "required": []})

ENGLISH = """
# Tools

## You have the following tools:

weather: weather API. Query the weather. Parameters: {"type": "object", "properties": {"city": {"type": "string", \
"description": "name"}}, "required": ["city"]} Format the arguments as a JSON object.

画图: 画图 API。根据描述画图。 输入参数: {"type": "object", "properties": {}, "required": []} Format the arguments as a \
JSON object.

## When you need to call a tool, please intersperse the following tool command in your reply. You can call zero or more \
times according to your needs:

Tool Invocation
Action: The name of the tool, must be one of [weather,画图]
Action Input: Tool input
Observation: <result>Tool returns result</result>
Answer: Summarize the results of this tool call based on Observation. If the result contains url, please display it in \
the following format:![Image](URL)


#Instructions

Be kind.

Note: you have the ability to display images and videos, as well as the ability to run code. Don't say you can't do it.
"""

CHINESE = """
# 工具

## 你拥有如下工具：

weather: weather API. Query the weather. Parameters: {"type": "object", "properties": {"city": {"type": "string", \
"description": "name"}}, "required": ["city"]} Format the arguments as a JSON object.

## 当你需要调用工具时，请在你的回复中穿插如下的工具调用命令，可以根据需求调用零次或多次：

工具调用
Action: 工具的名称，必须是[weather]之一
Action Input: 工具的输入
Observation: <result>工具返回的结果</result>
Answer: 根据Observation总结本次工具调用返回的结果，如果结果中出现url，请使用如下格式展示出来：![图片](url)


# 指令

你很友善。

请注意：你具有图像和视频的展示能力，也具有运行代码的能力，不要在回复中说你做不到。
"""

CALL = make_call("weather", {"city": "Paris"}, "sunny")
CALL_TEXT = 'Action: weather\nAction Input: {"city": "Paris"}\n'
RESULT = "\nObservation: <result>sunny</result>\nAnswer:"
TURN = Turn((CALL,), "It is sunny.")


def rows(layout: str, *rounds: tuple[str, Turn]) -> list[tuple[list[dict[str, Any]], Any]]:
    found = render_rows(layout, "S", [WEATHER], [Round(*r) for r in rounds], "en")
    return [([dict(m) for m in e.messages], e.expected) for e in found]


def test_english_prompt_to_the_byte() -> None:
    assert render_system([WEATHER, DRAW], "Be kind.", "en") == ENGLISH


def test_chinese_prompt_to_the_byte() -> None:
    assert render_system([WEATHER], "你很友善。", "zh") == CHINESE


def test_wording_of_0_7_2() -> None:
    assert "结果。如果结果中出现url，请严格遵循Observation中url的格式进行展示。\n" in render_system(
        [WEATHER], "", "zh", "0.7.2"
    )
    assert "based on Observation.\n" in render_system([WEATHER], "", "en", "0.7.2")


@pytest.mark.parametrize(
    ("language", "wanted"),
    [("en", "(. you can use tools: [weather,画图])"), ("zh", "(。你可以使用工具：[weather,画图])")],
)
def test_prefix(language: str, wanted: str) -> None:
    assert render_prefix([WEATHER, DRAW], language) == wanted


def test_split_layout_returns_the_result_in_the_user_turn() -> None:
    asked = "(. you can use tools: [weather])How is Paris?"
    system = {"role": "system", "content": "S"}
    assert rows("split", ("How is Paris?", TURN)) == [
        ([system, {"role": "user", "content": asked}, {"role": "assistant", "content": CALL_TEXT}], (CALL,)),
        (
            [
                system,
                {"role": "user", "content": asked + CALL_TEXT + RESULT},
                {"role": "assistant", "content": "It is sunny."},
            ],
            None,
        ),
    ]


def test_inline_layout_masks_the_result() -> None:
    [(messages, expected)] = rows("inline", ("How is Paris?", TURN))
    assert messages[2:] == [
        {"role": "assistant", "content": CALL_TEXT, "loss": True},
        {"role": "assistant", "content": RESULT, "loss": False},
        {"role": "assistant", "content": " It is sunny.", "loss": True},
    ]
    assert expected == (CALL,)


def test_later_rounds_keep_the_earlier_ones_as_history_that_is_not_trained() -> None:
    found = rows("split", ("How is Paris?", TURN), ("Thanks!", Turn(answer="You are welcome.")))
    messages, expected = found[-1]
    assert messages[1:3] == [
        {"role": "user", "content": "How is Paris?"},
        {"role": "assistant", "content": CALL_TEXT + RESULT + " It is sunny.", "loss": False},
    ]
    assert messages[3]["content"].startswith("(. you can use tools: [weather])Thanks!")
    assert expected == ()


def test_arguments_are_strict_json_in_one_line() -> None:
    call = make_call("weather", {"city": "Zürich\n第", "deep": {"a": [1, None, True]}})
    [(messages, _)] = rows("split", ("q", Turn((call,))))
    wanted = 'Action: weather\nAction Input: {"city": "Zürich\\n第", "deep": {"a": [1, null, true]}}\n'
    assert messages[-1]["content"] == wanted


def test_several_questions_in_one_row() -> None:
    messages = render_together("S", [WEATHER], [Round("a", TURN), Round("b", Turn(answer="no"))], "en")
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[2]["content"] == CALL_TEXT
    assert messages[4]["content"] == "no"


def test_a_second_call_comes_after_what_is_said_of_the_first_result() -> None:
    second = make_call("weather", {"city": "Rome"}, "rain")._replace(lead="Paris is sunny.")
    turn = Turn((CALL, second), "Go to Paris.")
    again = CALL_TEXT.replace("Paris", "Rome")
    found = [messages[1:] for messages, _ in rows("split", ("Where to?", turn))]
    asked = "(. you can use tools: [weather])Where to?"
    assert [m[-1]["content"] for m in found] == [CALL_TEXT, f"Paris is sunny.\n\n{again}", "Go to Paris."]
    # RolePlay appends what the model said and the result, as they are.
    seen = asked + CALL_TEXT + RESULT + f"Paris is sunny.\n\n{again}" + RESULT.replace("sunny", "rain")
    assert found[2][0]["content"] == seen
    [(inline, _)] = rows("inline", ("Where to?", turn))
    text = "".join(m["content"] for m in inline[2:])
    assert text == f"{CALL_TEXT}{RESULT} Paris is sunny.\n\n{again}{RESULT.replace('sunny', 'rain')} Go to Paris."


@pytest.mark.parametrize("wording", ["0.7.1", "0.7.2"])
@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_prompt_that_is_put_together_as_json_is_the_json_of_the_prompt(language: str, wording: str) -> None:
    odd = make_tool('a"{names}\\,', 'Say "\\n"\t{role}\x01🙂.', PARAMETERS)
    for tools in ((), (WEATHER,), (WEATHER, odd, DRAW)):
        asked = tools, 'Be "kind"\n{descs}.', language, wording
        assert json.loads(orjson.dumps(render_system_json(*asked))) == render_system(*asked)
