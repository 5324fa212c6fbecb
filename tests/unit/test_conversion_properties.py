"""Whatever is written in the grammar of ms_agent is read back as it was: tools of any schema, turns of any text."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.fabric import FORBIDDEN_IN_NAMES, Call, Tool, Turn
from services.conversion.literals import decode_literal, plain_object
from services.conversion.react import LAST_THOUGHT, _parse_apis, _recall_apis, parse_system_prompt, parse_turn
from services.conversion.refusals import Refused
from services.conversion.rows import make_call, make_tool

# What the grammar itself is made of, so that texts are made of it too.
PIECES = st.sampled_from(
    ["Parameters:", "Parameters: [", "Parameters: []", 'Parameters: ["', "Parameters: [{'", "{x}", "[1]", "e.g. v2.0", "..",
     "。", "：", "２．", "\n", "\n\n", "\n1. open", "\n2. close it", "\n3.", " API. ", "What is the x API useful for?", "'", '"',
     "\\", "\\n", "True", "null", ": Call this tool", "Use the following format:", "天气",
     "You have access to the following APIs:", "Thought", "Action", "Observation: ",
     "Final Answer", "<result>", "🙂", "\t", "\u2028", "\0"]
)  # fmt: skip
CHARACTERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=8)
TEXT = st.lists(PIECES | CHARACTERS, max_size=8).map("".join)
HEAD_LINE = re.compile(r"\n[ \t]*[0-9]+\.[^\n]*: Call this tool")
LOST_API = re.compile(r"[\]}][ \t.]*\n\s*[0-9]+\.")
KEYWORD_LINE = re.compile(r"(?:^|\n)[ \t]*(?:Thought|Action|Action Input|Observation|Final Answer)[:：]")

NAMES = (
    st.lists(st.sampled_from(["get_weather", "API", ":", ": ", " ", "_", "天气", "1. ", ".", "useful for?"]) | CHARACTERS)
    .map(lambda parts: "".join(parts).strip())
    .filter(lambda name: name and not FORBIDDEN_IN_NAMES & set(name) and not re.search(": Call this tool|Parameters:", name))
)  # fmt: skip
# A line like an API's, or a number right after a whole list, is refused or begins an API: see test_conversion_react.
DESCRIPTIONS = TEXT.map(str.strip).filter(lambda d: not HEAD_LINE.search(f"\n{d}") and not LOST_API.search(d))

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=8)
KEYS = TEXT.filter(lambda key: key not in ("type", "description", "properties", "required", "name", "schema"))
TYPES = st.sampled_from(["string", "integer", "array", "object", ["string", "null"]])
PROPERTIES = st.builds(
    lambda kind, told, enum, rest: {"type": kind, "description": told} | ({"enum": enum} if enum else {}) | rest,
    TYPES,
    TEXT,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(KEYS, VALUES, max_size=2),
)


@st.composite
def schemas(draw: st.DrawFn) -> dict[str, Any]:
    properties = draw(st.dictionaries(TEXT.filter(bool), PROPERTIES, max_size=4))
    required = [name for name in properties if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required}


NESTED = st.builds(lambda schema, told: schema | {"description": told}, schemas(), TEXT)
TOOLS = st.lists(st.builds(make_tool, NAMES, DESCRIPTIONS, schemas()), max_size=12, unique_by=lambda tool: tool.name)


def render_ms_agent_prompt(tools: Sequence[Tool], parameters: Sequence[str], humans: Sequence[str]) -> str:
    """The system prompt of the published data set, to the byte where the parameters are JSON lists."""
    apis = "".join(
        f"{n}. {tool.name}: Call this tool to interact with the {human} API. What is the {human} API useful for? "
        f"{tool.description}. Parameters: {told}\n\n"
        for n, (tool, told, human) in enumerate(zip(tools, parameters, humans, strict=True), 1)
    )
    names = ", ".join(tool.name for tool in tools)
    return (
        f"Answer the following questions as best you can. You have access to the following APIs:\n{apis}"
        "Use the following format:\n\nThought: you should always think about what to do\n"
        f"Action: the action to take, should be one of the above tools[{names}]\nAction Input: the input to the action\n"
        "Observation: the result of the action\n"
        "... (this Thought/Action/Action Input/Observation can be repeated zero or more times)\n"
        "Thought: I now know the final answer\nFinal Answer: the final answer to the original input question\nBegin!"
    )


def write_value(draw: st.DrawFn, value: Any) -> str:
    """JSON in one line, over several, in ASCII, or a Python repr."""
    ways: list[Callable[[Any], str]] = [
        lambda v: json.dumps(v, ensure_ascii=False),
        json.dumps,
        lambda v: json.dumps(v, indent=2),
        repr,
    ]
    written: str = draw(st.sampled_from(ways))(value)
    return written


def write_parameters(draw: st.DrawFn, tool: Tool) -> str:
    """A list as the data set has it, or the schema itself."""
    schema = json.loads(tool.parameters)
    if draw(st.booleans()):
        return write_value(draw, schema)
    listed = []
    for name, told in schema["properties"].items():
        rest = {key: value for key, value in told.items() if key != "description"}
        if rest["type"] == "string" and draw(st.booleans()):
            del rest["type"]
        item = {"name": name, "description": told["description"]}
        if name in schema["required"]:
            item["required"] = draw(st.sampled_from(["True", True, "true", " True "]))
        elif draw(st.booleans()):
            item["required"] = draw(st.sampled_from(["False", False, "false", None]))
        listed.append(item | rest if draw(st.booleans()) else item | {"schema": rest})
    return write_value(draw, listed)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[Tool], str]:
    tools = draw(TOOLS)
    humans = [draw(st.sampled_from([t.name, t.name.replace("_", ""), t.name.replace("_", " ")])) for t in tools]
    return tools, render_ms_agent_prompt(tools, [write_parameters(draw, tool) for tool in tools], humans)


@settings(deadline=None, max_examples=50)
@given(prompts())
def test_tools_are_read_as_they_were_written(case: tuple[list[Tool], str]) -> None:
    tools, prompt = case
    assert list(parse_system_prompt(prompt)) == tools


@settings(deadline=None)
@given(st.dictionaries(TEXT.filter(bool), NESTED, max_size=3), DESCRIPTIONS)
def test_nested_schemas_are_read_as_they_were_written(properties: dict[str, Any], told: str) -> None:
    ordered = {
        name: {"type": "object", "description": nested["description"]} | nested for name, nested in properties.items()
    }
    tool = make_tool("t", told, {"type": "object", "properties": ordered, "required": []})
    as_list = [{"name": name, **nested} for name, nested in properties.items()]
    as_schema = [
        {"name": name, "description": nested["description"], "schema": nested} for name, nested in properties.items()
    ]
    for written in (as_list, as_schema, {"type": "object", "properties": properties}):
        [read] = parse_system_prompt(render_ms_agent_prompt([tool], [json.dumps(written)], ["t"]))
        assert json.loads(read.parameters) == json.loads(tool.parameters)
        assert read[:2] == tool[:2]


SAID = TEXT.map(str.strip).filter(lambda text: not KEYWORD_LINE.search(text))
ARGUMENTS = st.dictionaries(TEXT, VALUES, max_size=3)


@st.composite
def turns(draw: st.DrawFn) -> tuple[Turn, list[Tool], str]:
    """A turn, its tools, and the turn in the data set's words."""
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    calls: list[Call] = []
    text = lead = draw(SAID)
    if text:
        text += "\n"
    for _ in range(draw(st.integers(0, 3))):
        name, arguments, observation = draw(st.sampled_from(names)), draw(ARGUMENTS), draw(SAID)
        written = write_value(draw, arguments) if arguments else draw(st.sampled_from(["{}", "[]", "", "None"]))
        if draw(st.booleans()):
            text += f"Thought: {draw(SAID)}\n"
        text += f"Action: {name}\nAction Input: {written}\nObservation: {observation}\n"
        calls.append(make_call(name, arguments, observation))
    answer = draw(SAID)
    if answer:
        text += f"Thought: {LAST_THOUGHT}\n" if draw(st.booleans()) else ""
        text += f"Final Answer: {answer}"
    if calls:
        calls[0] = calls[0]._replace(lead=lead)
        return Turn(tuple(calls), answer), [make_tool(name, "", {}) for name in names], text
    return Turn((), "\n".join(filter(None, (lead, answer)))), [], text


@settings(deadline=None)
@given(turns())
def test_a_turn_is_read_as_it_was_written(case: tuple[Turn, list[Tool], str]) -> None:
    turn, tools, text = case
    assert parse_turn(text, tools) == turn
    assert parse_turn(text.replace("\n", "\r\n"), tools) == parse_turn(text, tools)


@given(VALUES)
def test_a_value_is_read_as_it_was_written(value: Any) -> None:
    for text in (repr(value), json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1), f" {value!r}\n"):
        read = decode_literal(text)
        assert (read, repr(read)) == (value, repr(value))  # 1 is True, and 0.0 is -0.0, for ==


TOKENS = st.sampled_from(
    [
        *list("[]{}(),:'\"\\ \n\t+-.0123e_#"),
        "True",
        "False",
        "None",
        "true",
        "false",
        "null",
        "NaN",
        "'a'",
        "'a': ",
        '"b"',
        "u'",
    ]
)


@given(st.lists(TOKENS | CHARACTERS, max_size=12).map("".join))
def test_a_text_that_json_and_python_both_refuse_is_refused_and_any_other_has_their_value(text: str) -> None:
    told = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for decode in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, TypeError):
                told.append(repr(decode(text.strip())))
    with contextlib.suppress(ValueError):
        assert repr(decode_literal(text)) in told


@given(
    st.dictionaries(
        st.text("ab cTrueFalsNo:,{}", max_size=9), st.sampled_from([True, False, None, 1, -2.5, "it", [True]])
    )
)
def test_reprs_without_double_quotes_and_backslashes_are_read_as_python_reads_them(value: dict[str, Any]) -> None:
    assert repr(decode_literal(repr(value))) == repr(ast.literal_eval(repr(value)))


PLAIN = st.sampled_from(
    ["{", "}", "[", "]", "'a'", '"a"', "'b c'", ": ", ", ", ":", ",", "1", "-12", "0", "-0", "01", "1.5", "1e3", "true", "True",
     "null", "'", '"', "\\n", "'x: ', y'", "天", " ", "999999999999999", "9999999999999999"]
)  # fmt: skip
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=4)


@given(st.lists(PLAIN, max_size=12).map("".join).map("{{{}}}".format) | OBJECTS.map(repr) | OBJECTS.map(json.dumps))
@settings(max_examples=500)
def test_a_plain_object_is_the_text_that_its_value_would_be_printed_as(text: str) -> None:
    printed = plain_object(text)
    if printed is not None:
        assert printed == json.dumps(decode_literal(text), ensure_ascii=False)


LINES = st.sampled_from(
    ["\n1. a: Call this tool. Parameters: []", "\n\n2. b: Call this tool to interact with the b API. x. Parameters: []",
     "\n\n1. c: Call this tool. Parameters: [{}]", "\n\n3. d: Call this tool. Parameters: []", "\n2. e: Call this tool.",
     "\n\n", "\n", " ", "\u3000", "prose", " Parameters: []", "\n\n2. Parameters: Call this tool",
     "\n\n02. f: Call this tool. Parameters: []"]
)  # fmt: skip


@given(st.lists(LINES, max_size=7).map("".join))
@settings(max_examples=500)
def test_apis_that_are_recalled_are_what_reading_them_gives(section: str) -> None:
    recalled = _recall_apis(section)
    if recalled is not None:
        assert recalled == _parse_apis(section)
    with contextlib.suppress(Refused):
        _parse_apis(section)
