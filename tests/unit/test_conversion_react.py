"""The grammar of ms_agent's rows: every vector, and what real rows hold beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.conversion.react import parse_arguments, parse_system_prompt, parse_turn
from services.conversion.readers import READERS
from services.conversion.refusals import (
    DUPLICATE_TOOL,
    EMPTY_CONVERSATIONS,
    INCOMPLETE_TURN,
    INVALID_ACTION_INPUT,
    INVALID_JSON,
    INVALID_PARAMETERS,
    MISSING_PARAMETERS,
    NO_SYSTEM_TURN,
    NOT_REACT_PROMPT,
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
