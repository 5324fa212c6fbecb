"""The 36 defects of the recipe's published converter, and that ours has none: a test for each, by number."""

from __future__ import annotations

import json
import time
import tracemalloc
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from services.common.fabric import Tool, render_prefix, render_system, render_tool
from services.conversion.react import parse_system_prompt
from services.conversion.refusals import Refused
from services.conversion.sources import Chunk, read_rows
from tests.unit.test_conversion_worker import convert, lines, write

DEFECTS: Mapping[int, str] = {
    1: "test_a_parameter_name_is_written_as_json_whatever_its_first_letter",
    2: "test_every_parameter_is_kept_and_a_comma_parts_them",
    3: "test_required_is_read_of_each_parameter",
    4: "test_required_need_not_be_the_last_key",
    5: "test_required_may_be_a_bool_text_in_any_case_null_or_absent",
    6: "test_tools_ten_and_later_are_kept",
    7: "test_a_tool_without_parameters_is_kept_and_merges_with_no_other",
    8: "test_a_tool_without_the_question_what_it_is_useful_for_is_described",
    9: "test_a_description_without_an_ascii_period_is_read",
    10: "test_a_description_is_not_cut_at_its_first_period",
    11: "test_a_description_of_several_lines_keeps_them",
    12: "test_a_name_with_blanks_is_the_name_both_times",
    13: "test_a_name_with_a_colon_is_whole",
    14: "test_the_word_api_in_a_description_does_not_change_the_name",
    15: "test_an_escaped_quote_in_a_parameter_description_is_kept",
    16: "test_closing_brackets_in_a_parameter_description_do_not_end_the_list",
    17: "test_a_numbered_list_in_a_description_is_no_api",
    18: "test_the_word_parameters_in_a_description_does_not_bind",
    19: "test_parameters_as_a_python_repr_are_read",
    20: "test_parameters_as_a_json_schema_or_over_several_lines_are_read",
    21: "test_types_enums_schemas_and_nested_names_are_kept",
    22: "test_a_missing_parameter_description_is_empty",
    23: "test_the_list_of_tools_has_commas_only_and_chinese_as_it_is",
    24: "test_a_chinese_tool_line_is_role_plays_to_the_byte",
    25: "test_an_english_tool_line_is_english_even_in_a_chinese_prompt",
    26: "test_the_last_question_gets_the_prefix_that_names_the_tools",
    27: "test_assistant_turns_become_agent_fabrics",
    28: "test_a_first_turn_that_is_not_the_systems_is_refused_and_kept_as_it_is",
    29: "test_a_system_prompt_without_apis_of_this_grammar_is_refused_and_kept_as_it_is",
    30: "test_broken_rows_cost_no_other_row",
    31: "test_malformed_or_missing_parameters_are_refused_and_merge_with_no_neighbour",
    32: "test_equal_duplicates_are_one_tool_and_different_ones_are_refused",
    33: "test_windows_line_ends_lose_no_tool_and_stay_in_no_name",
    34: "test_no_row_trains_an_empty_role",
    35: "test_eight_thousand_numbered_lines_take_eight_times_as_long_as_one_thousand",
    36: "test_rows_are_read_one_by_one_and_no_module_warns",
}
"""Number in the list of defects → the test here that ours has it not."""

HEAD = "Answer the following questions as best you can. You have access to the following APIs:\n"
FORMAT = (
    "\n\nUse the following format:\n\nThought: you should always think about what to do\n"
    "Action: the action to take, should be one of the above tools[a, b]\nAction Input: the input to the action\nBegin!"
)


def api(name: str, parameters: str = "[]", useful: str = "does it", number: int = 1) -> str:
    return (
        f"{number}. {name}: Call this tool to interact with the {name} API. What is the {name} API useful for? "
        f"{useful}. Parameters: {parameters}"
    )


def parse(*apis: str) -> tuple[Tool, ...]:
    return parse_system_prompt(HEAD + "\n\n".join(apis) + FORMAT)


def read(*apis: str) -> tuple[dict[str, Any], str]:
    """The first tool's schema, read back out of the rendered prompt, and the prompt."""
    tools = parse(*apis)
    prompt = render_system(tools, "Be kind.", "zh")
    line = next(line for line in prompt.splitlines() if line.startswith(f"{tools[0].name}: "))
    start = line.index('{"type": "object"')
    schema, end = json.JSONDecoder().raw_decode(line, start)
    assert line[end:] == " Format the arguments as a JSON object."
    return schema, prompt


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(Refused) as refused:
        act()
    return refused.value.code


def row(system: str, user: str = "Hi?", assistant: str = "Hello.", number: int = 1) -> dict[str, Any]:
    turns = (("system", system), ("user", user), ("assistant", assistant))
    return {"id": f"row-{number}", "conversations": [{"from": role, "value": text} for role, text in turns]}


def good(number: int) -> dict[str, Any]:
    return row(HEAD + api(f"tool{number}") + FORMAT, number=number)


def test_all_thirty_six_defects_have_a_test() -> None:
    assert list(DEFECTS) == list(range(1, 37))
    assert all(callable(globals()[name]) for name in DEFECTS.values())
    assert len(set(DEFECTS.values())) == len(DEFECTS)


@pytest.mark.parametrize("name", ["image", "topic", "name", "region", "budget", "file", "u0041", "天气", 'a"b'])
def test_a_parameter_name_is_written_as_json_whatever_its_first_letter(name: str) -> None:
    schema, _ = read(api("t", json.dumps([{"name": name, "description": "d", "required": "True"}])))
    assert list(schema["properties"]) == schema["required"] == [name]


def test_every_parameter_is_kept_and_a_comma_parts_them() -> None:
    told = [{"name": n, "description": f"the {n}", "required": "True"} for n in ("sku", "name", "property")]
    schema, prompt = read(api("t", json.dumps(told)))
    assert {n: p["description"] for n, p in schema["properties"].items()} == {n["name"]: n["description"] for n in told}
    assert '"description": "the sku"}, "name": {' in prompt


def test_required_is_read_of_each_parameter() -> None:
    told = [{"name": n, "description": "d", "required": r} for n, r in (("a", "True"), ("b", "True"), ("c", "False"))]
    assert read(api("t", json.dumps(told)))[0]["required"] == ["a", "b"]


def test_required_need_not_be_the_last_key() -> None:
    schema, _ = read(api("t", '[{"name": "a", "required": "True", "description": "d", "type": "integer"}]'))
    assert schema["required"] == ["a"]
    assert schema["properties"]["a"] == {"type": "integer", "description": "d"}


@pytest.mark.parametrize(
    ("value", "required"),
    [("true", True), ('"True"', True), ('"true"', True), ('" True "', True),
     ("false", False), ('"False"', False), ('"false"', False), ("null", False), (None, False)],
)  # fmt: skip
def test_required_may_be_a_bool_text_in_any_case_null_or_absent(value: str | None, required: bool) -> None:
    told = f', "required": {value}' if value else ""
    schema, _ = read(api("t", f'[{{"name": "a", "description": "d"{told}}}]'))
    assert schema["required"] == (["a"] if required else [])


def test_tools_ten_and_later_are_kept() -> None:
    tools = parse(*(api(f"tool{n}", number=n) for n in range(1, 121)))
    assert [tool.name for tool in tools] == [f"tool{n}" for n in range(1, 121)]
    assert all(f"tool{n}: tool{n} API" in render_system(tools, "", "en") for n in range(1, 121))


def test_a_tool_without_parameters_is_kept_and_merges_with_no_other() -> None:
    fire = '[{"name": "place", "description": "where", "required": "True"}]'
    schema, prompt = read(api("alarm"), api("fire", fire, number=2))
    assert schema == {"type": "object", "properties": {}, "required": []}
    assert prompt.count("Format the arguments as a JSON object.") == 2
    assert 'fire: fire API. does it Parameters: {"type": "object", "properties": {"place": ' in prompt


def test_a_tool_without_the_question_what_it_is_useful_for_is_described() -> None:
    [tool] = parse("1. fire: Call this tool to interact with the fire recognition API. Is there fire? Parameters: []")
    assert render_tool(tool).startswith("fire: fire API. Is there fire? Parameters: {")


def test_a_description_without_an_ascii_period_is_read() -> None:
    told = "1. t: Call this tool to interact with the t API. What is the t API useful for? 查询天气。 Parameters: []"
    assert render_tool(parse(told)[0]).startswith("t: t API。查询天气。 输入参数: {")


def test_a_description_is_not_cut_at_its_first_period() -> None:
    assert "t: t API. Query e.g. v2.0 Parameters: {" in read(api("t", useful="Query e.g. v2.0"))[1]


def test_a_description_of_several_lines_keeps_them() -> None:
    [tool] = parse(api("t", useful="First.\n\nSecond"))
    assert tool.description == "First.\n\nSecond"
    assert "t: t API. First.\n\nSecond Parameters: {" in render_system([tool], "", "en")


def test_a_name_with_blanks_is_the_name_both_times() -> None:
    assert (
        "English to Chinese Translator: English to Chinese Translator API."
        in read(api("English to Chinese Translator"))[1]
    )


def test_a_name_with_a_colon_is_whole() -> None:
    assert "maps: find a way: maps: find a way API. does it" in read(api("maps: find a way"))[1]


def test_the_word_api_in_a_description_does_not_change_the_name() -> None:
    assert (
        "t: t API. asks the other API. of API fame Parameters:"
        in read(api("t", useful="asks the other API. of API fame"))[1]
    )


def test_an_escaped_quote_in_a_parameter_description_is_kept() -> None:
    schema, _ = read(api("t", r'[{"name": "a", "description": "say \"hi\" and \\", "required": "True"}]'))
    assert schema["properties"]["a"]["description"] == 'say "hi" and \\'


def test_closing_brackets_in_a_parameter_description_do_not_end_the_list() -> None:
    schema, prompt = read(api("t", '[{"name": "a", "description": "as [{x}]"}, {"name": "b"}]'), api("other", number=2))
    assert schema["properties"]["a"]["description"] == "as [{x}]"
    assert list(schema["properties"]) == ["a", "b"]
    assert "other: other API." in prompt


def test_a_numbered_list_in_a_description_is_no_api() -> None:
    told = "does this:\n1. open\n2. close\n3. wait"
    assert [tool.description for tool in parse(api("t", useful=told), api("u", number=2))] == [told, "does it"]


def test_the_word_parameters_in_a_description_does_not_bind() -> None:
    schema, prompt = read(
        api("t", '[{"name": "a", "description": "Parameters: []"}]', "Takes Parameters: [a] and Parameters: none")
    )
    assert "t: t API. Takes Parameters: [a] and Parameters: none Parameters: {" in prompt
    assert schema["properties"]["a"]["description"] == "Parameters: []"


def test_parameters_as_a_python_repr_are_read() -> None:
    schema, _ = read(api("t", """[{'name': 'a', 'description': "it's", 'required': True, 'default': None}]"""))
    assert schema["properties"]["a"] == {"type": "string", "description": "it's", "default": None}
    assert schema["required"] == ["a"]


@pytest.mark.parametrize(
    "parameters",
    [
        '{"type": "object", "properties": {"a": {"type": "string", "description": "d"}}, "required": ["a"]}',
        '[\n  {\n    "name": "a",\n    "description": "d",\n    "required": "True"\n  }\n]',
    ],
)
def test_parameters_as_a_json_schema_or_over_several_lines_are_read(parameters: str) -> None:
    wanted = {"type": "object", "properties": {"a": {"type": "string", "description": "d"}}, "required": ["a"]}
    assert read(api("t", parameters), api("u", number=2))[0] == wanted


def test_types_enums_schemas_and_nested_names_are_kept() -> None:
    address = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    told = [
        {"name": "count", "description": "c", "type": "integer", "minimum": 1},
        {"name": "size", "description": "s", "enum": ["S", "L"]},
        {"name": "address", "description": "where", "schema": address},
    ]
    properties = read(api("t", json.dumps(told)))[0]["properties"]
    assert properties["count"] == {"type": "integer", "description": "c", "minimum": 1}
    assert properties["size"] == {"type": "string", "description": "s", "enum": ["S", "L"]}
    assert properties["address"] == {"type": "object", "description": "where", **address}


def test_a_missing_parameter_description_is_empty() -> None:
    assert read(api("t", '[{"name": "a"}]'))[0]["properties"]["a"] == {"type": "string", "description": ""}


def test_the_list_of_tools_has_commas_only_and_chinese_as_it_is() -> None:
    tools = parse(api("天气"), api("b", number=2))
    assert "必须是[天气,b]之一" in render_system(tools, "", "zh")
    assert render_prefix(tools, "zh") == "(。你可以使用工具：[天气,b])"


def test_a_chinese_tool_line_is_role_plays_to_the_byte() -> None:
    [tool] = parse(api("画图", '[{"name": "描述", "description": "画面", "required": "True"}]', "根据描述画图。"))
    assert render_tool(tool) == (
        '画图: 画图 API。根据描述画图。 输入参数: {"type": "object", "properties": {"描述": {"type": "string", '
        '"description": "画面"}}, "required": ["描述"]} Format the arguments as a JSON object.'
    )


def test_an_english_tool_line_is_english_even_in_a_chinese_prompt() -> None:
    prompt = render_system(parse(api("a", useful="Does it"), api("b", useful="做", number=2)), "", "zh")
    assert "a: a API. Does it Parameters: {" in prompt
    assert "b: b API。做 输入参数: {" in prompt


def test_the_last_question_gets_the_prefix_that_names_the_tools(tmp_path: Path) -> None:
    told = row(HEAD + api("a") + "\n\n" + api("b", number=2) + FORMAT, "朝阳区天气怎样？", "很好。")
    told["conversations"] += [{"from": "user", "value": "谢谢"}, {"from": "assistant", "value": "不客气。"}]
    output, _ = convert(tmp_path, write(tmp_path / "a.jsonl", told))
    asked = [[m["content"] for m in r["messages"] if m["role"] == "user"] for r in lines(output / "train.jsonl")]
    prefix = "(。你可以使用工具：[a,b])"
    assert asked == [[f"{prefix}朝阳区天气怎样？"], ["朝阳区天气怎样？", f"{prefix}谢谢"]]


def test_assistant_turns_become_agent_fabrics(tmp_path: Path) -> None:
    turn = (
        "Thought: I look\nAction: a\nAction Input: {'x': '它', 'y': True}\nObservation: [{'z': 1}]\n"
        "Thought: I now know the final answer\nFinal Answer: It is.\n\nReally."
    )
    source = write(tmp_path / "a.jsonl", row(HEAD + api("a") + FORMAT, assistant=turn))
    output, _ = convert(tmp_path, source, sources=[{"uri": "a", "layout": "inline"}])
    [told] = lines(output / "train.jsonl")
    assert "".join(m["content"] for m in told["messages"] if m["role"] == "assistant") == (
        'Action: a\nAction Input: {"x": "它", "y": true}\n\nObservation: <result>[{\'z\': 1}]</result>\n'
        "Answer: It is.\n\nReally."
    )


def test_a_first_turn_that_is_not_the_systems_is_refused_and_kept_as_it_is(tmp_path: Path) -> None:
    told = {"id": "x", "conversations": good(1)["conversations"][1:]}
    output, _ = convert(tmp_path, write(tmp_path / "a.jsonl", good(1), told))
    [refused] = lines(output / "rejects.jsonl")
    assert (refused["code"], json.loads(refused["row"])) == ("NO_SYSTEM_TURN", told)


@pytest.mark.parametrize("system", ["You are kind.", '<|startofthink|>```JSON\n{"api_name": "t"}\n```<|endofthink|>'])
def test_a_system_prompt_without_apis_of_this_grammar_is_refused_and_kept_as_it_is(system: str, tmp_path: Path) -> None:
    output, _ = convert(tmp_path, write(tmp_path / "a.jsonl", good(1), row(system)))
    [refused] = lines(output / "rejects.jsonl")
    assert (refused["code"], json.loads(refused["row"])) == ("NOT_REACT_PROMPT", row(system))


def test_broken_rows_cost_no_other_row(tmp_path: Path) -> None:
    as_text = good(2) | {"conversations": repr(good(2)["conversations"])}
    broken = ['{"id": "half', '{"id": 1, "conversations": []}', '{"id": 2}', "", "[]", '{"conversations": "[open("}']
    source = write(tmp_path / "a.jsonl", good(1), *broken, as_text, good(3))
    output, metadata = convert(tmp_path, source, split={"test": 0, "validation": 0}, max_reject_ratio=1)
    assert {r["id"] for r in lines(output / "train.jsonl")} == {"row-1", "row-2", "row-3"}
    assert [(r["line"], r["code"]) for r in lines(output / "rejects.jsonl")] == [
        (2, "INVALID_JSON"), (3, "EMPTY_CONVERSATIONS"), (4, "EMPTY_CONVERSATIONS"), (6, "INVALID_JSON"),
        (7, "EMPTY_CONVERSATIONS"),
    ]  # fmt: skip
    assert (metadata["rows_in"], metadata["rows_converted"], metadata["rows_rejected"]) == (8, 3, 5)


@pytest.mark.parametrize(
    ("apis", "code"),
    [
        ((api("a", '[{"name": "q"]'), api("b", number=2)), "INVALID_PARAMETERS"),
        ((api("a"), api("b", '[{"name": "q"', number=2)), "INVALID_PARAMETERS"),
        ((api("a", '"text"'), api("b", number=2)), "INVALID_PARAMETERS"),
        ((api("a", "[1]"),), "INVALID_PARAMETERS"),
        ((api("a").partition("Parameters:")[0], api("b", number=2)), "MISSING_PARAMETERS"),
        ((api("a"), "2. b: a tool of another kind. Parameters: []", api("c", number=3)), "INVALID_APIS"),
    ],
)
def test_malformed_or_missing_parameters_are_refused_and_merge_with_no_neighbour(
    apis: tuple[str, ...], code: str
) -> None:
    assert refusal(lambda: parse(*apis)) == code


def test_equal_duplicates_are_one_tool_and_different_ones_are_refused() -> None:
    tools = parse(api("a"), api("b", number=2), api("a", number=3))
    assert [tool.name for tool in tools] == ["a", "b"]
    assert render_system(tools, "", "zh").count("a: a API.") == 1
    assert refusal(lambda: parse(api("a"), api("a", '[{"name": "q"}]', number=2))) == "DUPLICATE_TOOL"


def test_windows_line_ends_lose_no_tool_and_stay_in_no_name(tmp_path: Path) -> None:
    turn = "Action: b\nAction Input: {}\nObservation: x\nThought: I now know the final answer\nFinal Answer: y"
    told = row(HEAD + api("a") + "\n\n" + api("b", number=2) + FORMAT, assistant=turn)
    windows = json.loads(json.dumps(told).replace("\\n", "\\r\\n"))
    written = [
        convert(tmp_path, write(tmp_path / f"{name}.jsonl", r), folder=name)[0] / "train.jsonl"
        for name, r in (("unix", told), ("windows", windows))
    ]
    first, second = ([r["messages"] for r in lines(file)] for file in written)
    assert first == second
    assert len(first) == 2
    assert "[a,b]" in first[0][0]["content"]


def test_no_row_trains_an_empty_role(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *(good(n) for n in range(40)))
    roles = ["You are Ann.", "You are Ben."]
    for folder, wanted, settings in (("default", None, {}), ("own", roles, {"instructions": roles})):
        output, _ = convert(tmp_path, source, folder=folder, **settings)
        systems = [r["messages"][0]["content"] for r in lines(output / "train.jsonl")]
        told = {system.partition("\n#Instructions\n\n")[2].partition("\n\nNote:")[0] for system in systems}
        assert all(told)
        assert wanted is None or told == set(wanted)


def test_eight_thousand_numbered_lines_take_eight_times_as_long_as_one_thousand() -> None:
    def took(count: int) -> float:
        prompts = [HEAD + api("a", useful="\n1. x" * count + str(n)) + FORMAT for n in range(3)]
        times = []
        for prompt in prompts:
            start = time.perf_counter()
            assert len(parse_system_prompt(prompt)) == 1
            times.append(time.perf_counter() - start)
        return min(times)

    assert took(8000) <= 25 * took(1000)


def test_rows_are_read_one_by_one_and_no_module_warns(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *[json.dumps(good(1)) + " " * 10_000] * 2000)
    tracemalloc.start()
    assert sum(1 for _ in read_rows(Chunk(0, 0, str(file), file.name), 1 << 20)) == 2000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20 < file.stat().st_size / 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in Path(__file__).parents[2].glob("services/conversion/**/*.py"):
            compile(module.read_text(encoding="utf-8"), str(module), "exec")
