"""The grammar of ms_agent's rows: every vector, and what real rows hold beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.tool_schemas import make_schema
from services.conversion.react import parse_arguments, parse_system_prompt, parse_turn
from services.conversion.readers import READERS
from services.conversion.refusals import (
    DUPLICATE_TOOL,
    EMPTY_CONVERSATIONS,
    INCOMPLETE_TURN,
    INVALID_ACTION_INPUT,
    INVALID_APIS,
    INVALID_JSON,
    INVALID_PARAMETERS,
    INVALID_TOOL_NAME,
    MISSING_PARAMETERS,
    NO_SYSTEM_TURN,
    NOT_REACT_PROMPT,
    RESULT_TAG_IN_RESULT,
    UNKNOWN_TOOL,
    Refused,
)
from services.conversion.rows import make_call, make_tool
from services.conversion.sources import decode_row

VECTORS_FILE = Path(__file__).parent.parent / "data/vectors.jsonl"
VECTORS = [json.loads(line) for line in VECTORS_FILE.read_text(encoding="utf-8").splitlines()]
CODES = {
    "not a ReAct system prompt": NOT_REACT_PROMPT,
    "no system turn": NO_SYSTEM_TURN,
    "invalid Parameters JSON": INVALID_PARAMETERS,
    "missing Parameters": MISSING_PARAMETERS,
    "duplicate tool name": DUPLICATE_TOOL,
    "empty conversations": EMPTY_CONVERSATIONS,
    "invalid JSON": INVALID_JSON,
}
WEATHER = make_tool("weather", "Query the weather", {"type": "object", "properties": {"city": {"type": "string"}}})


def prompt(apis: str) -> str:
    return (
        "Answer the following questions as best you can. You have access to the following APIs:\n" + apis + "\n\n"
        "Use the following format:\n\nThought: you should always think about what to do\nAction: the action to take\n"
    )


def api(number: int, name: str, parameters: str, useful: str = "does it.") -> str:
    return (
        f"{number}. {name}: Call this tool to interact with the {name} API. What is the {name} API useful for? "
        f"{useful} Parameters: {parameters}"
    )


@pytest.mark.parametrize("vector", VECTORS, ids=[v["name"] for v in VECTORS])
def test_vectors(vector: dict[str, Any]) -> None:
    row, wanted = vector["input_row"], vector["expect"]
    line = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
    if wanted["error"]:
        with pytest.raises(Refused) as refused:
            READERS["ms_agent"](decode_row(line.encode(), 1 << 20))
        assert refused.value.code == CODES[wanted["error"]]
        return
    tools = READERS["ms_agent"](decode_row(line.encode(), 1 << 20)).tools
    got = [{"name": t.name, "description": t.description, "parameters": json.loads(t.parameters)} for t in tools]
    assert json.dumps(got, ensure_ascii=False) == json.dumps(wanted["tools"], ensure_ascii=False)  # order counts


def test_names_with_blanks_colons_and_braces_in_descriptions() -> None:
    tools = parse_system_prompt(
        prompt(
            api(1, "My Tool: v2", '[{"name": "a", "description": "Parameters: {not these}", "required": true}]')
            + "\n"
            + api(2, "other", "[]", "1. first it does this. 2. then that.")
        )
    )
    assert [t.name for t in tools] == ["My Tool: v2", "other"]
    assert json.loads(tools[0].parameters)["required"] == ["a"]
    assert tools[1].description == "1. first it does this. 2. then that"


def test_crlf_reads_like_lf() -> None:
    text = prompt(api(1, "t", '[{"name": "a"}]') + "\n" + api(2, "u", "[]"))
    assert parse_system_prompt(text.replace("\n", "\r\n")) == parse_system_prompt(text)


def test_conflicting_duplicates_are_refused() -> None:
    with pytest.raises(Refused) as refused:
        parse_system_prompt(prompt(api(1, "t", "[]") + "\n" + api(2, "t", '[{"name": "a"}]')))
    assert refused.value.code == DUPLICATE_TOOL


def test_a_prompt_without_apis_has_no_tools() -> None:
    assert parse_system_prompt(prompt("")) == ()


def test_a_missing_parameters_section_is_refused() -> None:
    with pytest.raises(Refused) as refused:
        parse_system_prompt(prompt("1. t: Call this tool to interact with the t API. What is the t API useful for? x."))
    assert refused.value.code == MISSING_PARAMETERS


def test_a_turn_with_a_call_and_an_answer() -> None:
    turn = parse_turn(
        'Thought: I look it up\nAction: weather\nAction Input: {"city": "Paris"}\nObservation: sunny\n'
        "Thought: I now know the final answer\nFinal Answer: It is sunny.",
        [WEATHER],
    )
    assert [(c.name, c.arguments, c.observation) for c in turn.calls] == [("weather", '{"city": "Paris"}', "sunny")]
    assert turn.answer == "It is sunny."


def test_a_turn_without_a_call() -> None:
    assert parse_turn("Thought: I now know the final answer\nFinal Answer: Hello.", []).answer == "Hello."
    assert parse_turn("Just words.", []).answer == "Just words."
    assert parse_turn("Thought: it is noon", []).answer == "it is noon"


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"a": 1}', {"a": 1}),
        ("{'a': 'it''s'}", {"a": "its"}),
        ("{'a': \"it's\", 'b': True, 'c': None}", {"a": "it's", "b": True, "c": None}),
        ("[]", {}),
        ("", {}),
    ],
)
def test_action_inputs(text: str, arguments: dict[str, Any]) -> None:
    assert parse_arguments(text) == arguments


@pytest.mark.parametrize(
    "text", ["paris", "{'a': open('x')}", '{"a": 1', "[1, 2]", "3", '[{"a": 1}]', "{1: 2}", '{"a": NaN}']
)
def test_action_inputs_that_are_no_object_are_refused(text: str) -> None:
    with pytest.raises(Refused) as refused:
        make_call("weather", parse_arguments(text))
    assert refused.value.code == INVALID_ACTION_INPUT


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Action: other\nAction Input: {}\nObservation: x\nFinal Answer: y", UNKNOWN_TOOL),
        ("Action: weather\nObservation: x", INCOMPLETE_TURN),
    ],
)
def test_broken_turns_are_refused(text: str, code: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_turn(text, [WEATHER])
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("apis", "code"),
    [
        ("- weather: says how it is. Parameters: []", INVALID_APIS),
        ("1. weather: Use this tool to look. Parameters: []\n\n" + api(2, "other", "[]"), INVALID_APIS),
        (api(2, "weather", "[]"), INVALID_APIS),
        (api(1, "weather", "[]") + "\n\n2. other: Use this tool. Parameters: []", INVALID_APIS),
        (api(1, "weather", "[]") + "\n\n2. x: Use this. Parameters: []\n\n" + api(3, "other", "[]"), INVALID_APIS),
        (api(1, "weather", "[]") + "\n\n" + api(3, "other", "[]"), INVALID_APIS),
        (api(1, "weather", "[]") + "\nAnd then\nParameters: []\nmore.", INVALID_PARAMETERS),
        (api(1, "weather", "[" * 101 + "]" * 101), INVALID_PARAMETERS),
        (api(1, "weather", '[{"a": ' * 50 + "1" + "}]" * 50), INVALID_PARAMETERS),
        (api(1, "weather", '[{"name": "a", "description": ' + "1" * 5000 + "}]"), INVALID_PARAMETERS),
        (api(1, "weather", "[{'name': 'a', 'description': {[]: 1}}]"), INVALID_PARAMETERS),
        (api(1, "weather", "[\0]"), INVALID_PARAMETERS),
        (api(1, "weather", "[open('x')]"), INVALID_PARAMETERS),
        (api(1, " ", "[]"), INVALID_TOOL_NAME),
    ],
)
def test_a_list_of_apis_in_which_one_could_be_lost_or_misread_is_refused(apis: str, code: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_system_prompt(prompt(apis))
    assert refused.value.code == code


def test_a_line_like_the_next_api_within_a_description_begins_that_api_so_the_one_before_lacks_parameters() -> None:
    told = api(1, "a", "[]", "First.\n2. x: Call this tool later.") + "\n\n" + api(2, "b", "[]")
    with pytest.raises(Refused) as refused:
        parse_system_prompt(prompt(told))
    assert refused.value.code == MISSING_PARAMETERS


def test_a_line_like_an_api_with_another_number_within_a_description_is_part_of_it() -> None:
    told = (
        api(1, "a", "[]", "First.\n1. x: Call this tool now.\n7. y: Call this tool later.") + "\n\n" + api(2, "b", "[]")
    )
    first, second = parse_system_prompt(prompt(told))
    assert first.description == "First.\n1. x: Call this tool now.\n7. y: Call this tool later"
    assert second.name == "b"


def test_full_width_digits_and_colons_are_text() -> None:
    told = "第一。\n２．画图：Call this tool\n２. x: Call this tool。Parameters：[]"
    first, second = parse_system_prompt(prompt(api(1, "a", "[]", f"{told}.") + "\n\n" + api(2, "b", "[]")))
    assert (first.description, second.name) == (told, "b")


def test_prose_after_the_last_api_is_left_out_and_may_hold_a_numbered_list() -> None:
    told = api(1, "a", '[{"name": "q"}]') + "\n\nPlease note:\n1. Parameters: see above\n2. Be polite."
    [tool] = parse_system_prompt(prompt(told))
    assert json.loads(tool.parameters)["required"] == []
    assert tool.description == "does it"


@pytest.mark.parametrize(
    "parameters",
    [
        '[{"name": "a", "description": "Parameters: [{\\"name\\": 1}]"}]',
        '[\n  {\n    "name": "a",\n\n    "description": "Parameters: [{\\"name\\": 1}]"\n  }\n]',
        "[{'name': 'a', 'description': 'Parameters: [{\"name\": 1}]'}]",
        "[{'name': 'a',\n\n 'description': 'Parameters: [{\"name\": 1}]',}]",
        '{"type": "object", "properties": {"a": {"description": "Parameters: [{\\"name\\": 1}]"}}}',
    ],
)
@pytest.mark.parametrize("after", ["", ".", "\n\nSome prose.", "\nUse the following"])
def test_parameters_are_read_in_every_form(parameters: str, after: str) -> None:
    [tool] = parse_system_prompt(prompt(api(1, "t", parameters, "Takes Parameters: [see below].") + after))
    assert json.loads(tool.parameters)["properties"] == {
        "a": {"type": "string", "description": 'Parameters: [{"name": 1}]'}
    }
    assert tool.description == "Takes Parameters: [see below]"


def test_the_format_block_may_follow_after_one_line_end_and_apis_without_a_blank_line() -> None:
    text = prompt(api(1, "a", "[]") + "\n" + api(2, "b", "[]")).replace("\n\nUse", "\nUse")
    assert [tool.name for tool in parse_system_prompt(text)] == ["a", "b"]


@pytest.mark.parametrize(
    ("told", "description"),
    [
        (" to interact with the My_API. x API. What is the My_API. x API useful for? Useful for? Yes.", "Useful for? Yes"),
        (" to interact with the human name API. What is the human name API useful for? It. API. Ends.", "It. API. Ends"),
        (" to interact with the police calling API. This API calls. What is it useful for? All.",
         "This API calls. What is it useful for? All"),
        (" if you need the weather API. Or more.", "if you need the weather API. Or more"),
        (" to interact with the My_API. x API. What is the My_API. x API useful for? .", ""),
        (" to interact with the My_API. x API. What is the My_API. x API useful for? ..", "."),
        (".", ""),
    ],
)  # fmt: skip
def test_the_description_is_what_follows_the_question_or_the_sentence_before_it(told: str, description: str) -> None:
    [tool] = parse_system_prompt(prompt(f"1. My_API. x: Call this tool{told} Parameters: []"))
    assert tool.description == description


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Action: weather\nAction Input: {'city': 'Paris'\nObservation: x\nFinal Answer: y", INVALID_ACTION_INPUT),
        ("Action Input: {}\nObservation: x", INCOMPLETE_TURN),
        ("Action: weather\nThought: hm\nAction Input: {}\nObservation: x", INCOMPLETE_TURN),
        ("Action: weather\nAction Input: {}\nObservation: x\nObservation: y", INCOMPLETE_TURN),
        ("Final Answer: y\nAction: weather\nAction Input: {}\nObservation: x", INCOMPLETE_TURN),
        ("Action: weather\nAction Input: {}\nObservation: press\nAction: button\nFinal Answer: y", UNKNOWN_TOOL),
        ("Action: weather\nAction Input: {}\nObservation: a</result>\nFinal Answer: y", RESULT_TAG_IN_RESULT),
        ("Action: weather\nAction Input: " + '{"a": ' * 101 + "1" + "}" * 101, INVALID_ACTION_INPUT),
        ("Action: weather\nAction Input: {'a': " + "9" * 5000 + "}", INVALID_ACTION_INPUT),
        ("Action: weather\nAction Input: {'a': '\ud800'}", INVALID_ACTION_INPUT),
    ],
)
def test_turns_that_could_be_misread_are_refused(text: str, code: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_turn(text, [WEATHER])
    assert refused.value.code == code


def test_a_turn_with_several_calls_thoughts_between_them_and_an_answer_of_several_paragraphs() -> None:
    turn = parse_turn(
        "Let me see.\nThought: first\nAction: weather\nAction Input: {\n  'city': 'Paris',\n\n  'days': [1, 2]\n}\n"
        "Observation: {'a': 1}\nwind: none\n\nThought: then\nit rains\nAction: weather\nAction Input: []\nObservation:\n"
        "Thought: I now know the final answer\nFinal Answer: One.\n\nTwo: Thought: no.\n\nObservation: three.\n",
        [WEATHER],
    )
    assert [(c.arguments, c.observation, c.lead) for c in turn.calls] == [
        ('{"city": "Paris", "days": [1, 2]}', "{'a': 1}\nwind: none", "Let me see."),
        ("{}", "", ""),
    ]
    assert turn.answer == "One.\n\nTwo: Thought: no.\n\nObservation: three."


def test_a_line_like_a_thought_within_a_result_ends_the_result() -> None:
    turn = parse_turn("Action: weather\nAction Input: {}\nObservation: log\nThought: noted\nFinal Answer: y", [WEATHER])
    assert turn.calls[0].observation == "log"


def test_keywords_with_full_width_colons_and_any_line_ends_are_keywords() -> None:
    text = "Action：weather\r\nAction Input：{'city': '北京：朝阳'}\r\nObservation：晴\rFinal Answer：晴。"
    [call] = parse_turn(text, [WEATHER]).calls
    assert (call.name, call.arguments, call.observation) == ("weather", '{"city": "北京：朝阳"}', "晴")


def test_numbers_keep_their_digits() -> None:
    exact = "123456789012345678901234567890"
    turn = parse_turn(f"Action: weather\nAction Input: {{'a': {exact}, 'b': 0.1, 'c': -0.0}}", [WEATHER])
    assert turn.calls[0].arguments == f'{{"a": {exact}, "b": 0.1, "c": -0.0}}'


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for parse in (parse_system_prompt, parse_arguments, lambda t: parse_turn(t, [WEATHER])):
        try:
            parse(text)
        except Refused as refused:
            assert refused.code


@given(st.text(min_size=1).map(lambda s: f"You have access to the following APIs:\n1. t: Call this tool {s}"))
def test_any_prompt_is_parsed_or_refused(text: str) -> None:
    try:
        parse_system_prompt(text)
    except Refused as refused:
        assert refused.code


def schema_of(raw: Any) -> Any:
    [tool] = parse_system_prompt(prompt(api(1, "t", json.dumps(raw))))
    return json.loads(tool.parameters)


def test_required_is_in_the_order_of_the_declaration() -> None:
    properties = {"b": {"type": "string"}, "a": {"type": "string"}}
    told = schema_of({"type": "object", "properties": properties, "required": ["a", "x", "b", 3, {}]})
    assert told["required"] == ["b", "a"]


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({}, "string"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, ["integer", "null"]),
        ({"oneOf": [{"type": "number"}, {"type": "number"}]}, "number"),
        ({"anyOf": "broken"}, "string"),
        ({"$ref": "#/$defs/day"}, "integer"),
        ({"$ref": "#/$defs/away"}, "string"),
        ({"$ref": 3}, "string"),
        ({"anyOf": [{"$ref": "#/$defs/day"}, {"type": "null"}]}, ["integer", "null"]),
        ({"allOf": [{"$ref": "#/$defs/day"}]}, "integer"),
        ({"anyOf": [{"type": ["number", "null"]}, {"type": 3}]}, ["number", "null"]),
        ({"$ref": "#/$defs/circle"}, "string"),
        ({"enum": [1, 2]}, "string"),
    ],
)
def test_a_property_without_a_type_has_that_of_what_it_points_at(schema: dict[str, Any], kind: Any) -> None:
    defined = {"day": {"type": "integer"}, "circle": {"anyOf": [{"$ref": "#/$defs/circle"}] * 9}}
    told = schema_of({"type": "object", "properties": {"p": schema}, "$defs": defined})
    assert told["properties"]["p"]["type"] == kind


def test_a_part_that_many_properties_refer_to_is_looked_at_once() -> None:
    looked = []

    class Part(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            looked.append(key)
            return super().get(key, default)

    part = Part(anyOf=[{"type": "integer"}, {"type": "null"}])
    properties = {f"p{number}": {"$ref": "#/$defs/part"} for number in range(50)}
    told = make_schema({"type": "object", "properties": properties, "$defs": {"part": part}}, "tool")
    assert {tuple(each["type"]) for each in told["properties"].values()} == {("integer", "null")}
    assert looked.count("anyOf") == 1
