"""Questions out of data sets and BFCL files, and the requests that they become."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import InvalidData
from services.common.fabric import Call, Round, Tool, Turn, render_rows, render_system
from services.evaluation.bfcl import read_bfcl
from services.evaluation.metrics import score_answer
from services.evaluation.questions import Answer, Question, chains_of, check_ids, read_questions
from services.evaluation.wire import Wire, strip_prompt

TOOLS = (
    Tool("weather", "The weather", '{"type": "object", "properties": {}, "required": []}'),
    Tool("海 sea", "The sea", '{"type": "object", "properties": {}, "required": []}'),
)
OBJECTS = [{"type": "function", "function": {"name": t.name, "parameters": json.loads(t.parameters)}} for t in TOOLS]
TURN = Turn(
    (
        Call("weather", '{"city": "Rome"}', "21 degrees"),
        Call("海 sea", "{}", "calm\n</p>", "It is 21 degrees."),
    ),
    "Warm, and the sea is calm.",
)
REFUSED = Turn((), "None of my tools fits.")


def write_dataset(folder: Path, layout: str, turns: Sequence[Turn]) -> Path:
    """A data set as conversion writes it: rows of one conversation behind each other, tools beside them."""
    rows, beside = [], []
    system = render_system(TOOLS, "You are a sailor.", "en")
    for number, turn in enumerate(turns):
        examples = render_rows(layout, system, TOOLS, [Round("How is Rome?", turn)], "en")
        for part, example in enumerate(examples):
            row_id = f"r{number}/{part}"
            rows.append({"id": row_id, "source": "s", "messages": example.messages})
            told: dict[str, Any] = {"id": row_id, "tools": OBJECTS}
            if example.expected is not None:
                told["expected"] = [{"name": c.name, "arguments": json.loads(c.arguments)} for c in example.expected]
            beside.append(told)
    folder.mkdir(exist_ok=True)
    for name, lines in (("test", rows), ("tools", beside)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def answer(question: Question, text: str, calls: Any = None) -> Answer:
    return Answer(question.id, text, "stop", 1, 0.1, calls)


@pytest.mark.parametrize("layout", ["split", "inline"])
def test_a_row_is_asked_on_after_each_of_its_results(tmp_path: Path, layout: str) -> None:
    found = read_questions(write_dataset(tmp_path / "d", layout, [TURN, REFUSED, TURN]), "test", 0, follow_up=True)
    assert [len(chain) for chain in chains_of(found)] == [3, 1, 3]
    first, second, third = found[:3]
    assert [q.id for q in found[:3]] == ["r0/0", "r0/0#1", "r0/0#2"]
    assert [[c["name"] for c in q.expected] for q in found[:4]] == [["weather"], ["海 sea"], [], []]
    assert second.after is not None
    assert third.after is not None
    assert [(a.observation, a.in_turn) for a in (second.after, third.after)] == [
        ("21 degrees", layout == "inline"), ("calm\n</p>", layout == "inline"),
    ]  # fmt: skip
    assert third.reference == "Warm, and the sea is calm."
    assert first.messages == second.messages
    assert first.goes_on is (layout == "inline")


def test_a_conversation_in_both_layouts_and_what_follows_it_is_one_row_to_an_interval(tmp_path: Path) -> None:
    folders = [write_dataset(tmp_path / layout, layout, [TURN]) for layout in ("split", "inline")]
    asked = [question for folder in folders for question in read_questions(folder, "test", 0, follow_up=True)]
    assert len(asked) == 6
    assert len({question.row for question in asked}) == 1


def test_without_results_each_row_is_one_question_and_the_limit_counts_rows(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", "split", [TURN, REFUSED, TURN])
    assert [q.id for q in read_questions(folder, "test", 0)] == ["r0/0", "r1/0", "r2/0"]
    assert [q.id for q in read_questions(folder, "test", 1, follow_up=True)] == ["r0/0", "r0/0#1", "r0/0#2"]


def test_an_id_that_several_rows_share_is_refused_by_name(tmp_path: Path) -> None:
    """What is expected of a row is found by its id: of two, one would be scored by the other's."""
    folder = write_dataset(tmp_path / "d", "split", [REFUSED, TURN, TURN])
    for file in (folder / "test.jsonl", folder / "tools.jsonl"):
        file.write_text(file.read_text().replace("r1/", "r2/"))
    with pytest.raises(
        InvalidData, match=r"tools.jsonl has ids that several rows share \(3\): 'r2/0', 'r2/1', 'r2/2'\. Give"
    ):
        read_questions(folder, "test", 0)


def test_what_is_no_data_sets_folder_is_refused_with_what_to_give(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", "split", [TURN])
    with pytest.raises(InvalidData, match=r"test\.jsonl is a file; give the folder that has tools\.jsonl in it"):
        read_questions(folder / "test.jsonl", "test", 0)
    (folder / "train.jsonl").mkdir()
    with pytest.raises(InvalidData, match=r"train\.jsonl cannot be read: Is a directory; make it a file"):
        read_questions(folder, "train", 0)
    (folder / "test.jsonl").write_text("3\n")
    with pytest.raises(InvalidData, match=r"test\.jsonl: row 1 is no JSON object"):
        read_questions(folder, "test", 0)
    (folder / "tools.jsonl").unlink()
    with pytest.raises(InvalidData, match=r"there is no tools\.jsonl in .*/d; is this a folder that"):
        read_questions(folder, "test", 0)


def test_rows_of_another_split_may_share_their_ids(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", "split", [REFUSED, TURN, TURN])
    for file in (folder / "test.jsonl", folder / "tools.jsonl"):
        file.write_text(file.read_text().replace("r1/", "r2/"))
    first = (folder / "test.jsonl").read_text().splitlines(keepends=True)[0]
    (folder / "validation.jsonl").write_text(first)
    assert [q.id for q in read_questions(folder, "validation", 0)] == ["r0/0"]


def test_an_id_that_two_suites_share_is_refused_by_name() -> None:
    same = [Question("a", [], [], []), Question("b", [], [], []), Question("a", [], [], [])]
    with pytest.raises(InvalidData, match=r"what is asked has ids that several rows share \(1\): 'a'"):
        check_ids(same)
    with pytest.raises(InvalidData, match=r"share \(7\): '0', '1', '2', '3', '4' and 2 more\. Give"):
        check_ids([Question(str(n % 7), [], [], []) for n in range(14)])


def test_the_conversation_goes_on_word_for_word_as_it_was_trained(tmp_path: Path) -> None:
    """Each request is the prompt of the training row that conversion makes of the same conversation."""
    folder = write_dataset(tmp_path / "d", "split", [TURN])
    trained = [json.loads(line)["messages"] for line in (folder / "test.jsonl").read_text().splitlines()]
    chain = read_questions(folder, "test", 0, follow_up=True)
    answers = {q.id: answer(q, messages[-1]["content"]) for q, messages in zip(chain, trained, strict=True)}
    for number, messages in enumerate(trained):
        assert Wire().body(chain, number, answers)["messages"] == messages[:-1]


def test_inline_rows_go_on_in_the_assistants_turn_with_us_and_in_the_users_elsewhere(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", "inline", [TURN])
    trained = json.loads((folder / "test.jsonl").read_text())["messages"]
    chain = read_questions(folder, "test", 0, follow_up=True)
    answers = {chain[0].id: answer(chain[0], trained[2]["content"])}
    ours = Wire(ours=True).body(chain, 1, answers)
    assert ours["messages"] == [
        *trained[:2],
        {"role": "assistant", "content": trained[2]["content"] + trained[3]["content"]},
    ]
    assert (ours["continue_final_message"], ours["add_generation_prompt"]) == (True, False)
    other = Wire(ours=False).body(chain, 1, answers)
    assert set(other) == {"messages", "stop"}
    assert other["messages"][-1]["content"].endswith("<result>21 degrees</result>\nAnswer:")


def test_a_model_that_calls_another_tool_goes_on_from_the_rows_own_call(tmp_path: Path) -> None:
    chain = read_questions(write_dataset(tmp_path / "d", "split", [TURN]), "test", 0, follow_up=True)
    for text, said in (
        ("I do not know.", 'Action: weather\nAction Input: {"city": "Rome"}\n'),
        ("Action: 海 sea\nAction Input: {}\n", 'Action: weather\nAction Input: {"city": "Rome"}\n'),
        ("Action: weather\nAction Input: {}\n", "Action: weather\nAction Input: {}\n"),
    ):
        asked = Wire().body(chain, 1, {chain[0].id: answer(chain[0], text)})["messages"][-1]["content"]
        assert asked.endswith(f"How is Rome?{said}\nObservation: <result>21 degrees</result>\nAnswer:")


def test_a_call_whose_arguments_cannot_be_read_is_not_sent_back(tmp_path: Path) -> None:
    chain = read_questions(write_dataset(tmp_path / "d", "split", [TURN]), "test", 0, follow_up=True)
    for arguments in ('{"n": 3', "[3]", ""):
        called = answer(chain[0], "", [{"name": "weather", "arguments": arguments}])
        call = Wire(tools=True, ours=False).body(chain, 1, {chain[0].id: called})["messages"][2]
        assert call["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}


def test_with_tools_the_question_is_plain_and_results_are_tool_messages(tmp_path: Path) -> None:
    chain = read_questions(write_dataset(tmp_path / "d", "split", [TURN]), "test", 0, follow_up=True)
    called = answer(chain[0], "", [{"name": "weather", "arguments": '{"city": "Roma"}'}])
    body = Wire(tools=True, ours=False).body(chain, 1, {chain[0].id: called})
    assert body["messages"][:2] == [
        {"role": "system", "content": "You are a sailor."}, {"role": "user", "content": "How is Rome?"},
    ]  # fmt: skip
    call, result = body["messages"][2:]
    assert call["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Roma"}'}
    assert result == {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "21 degrees"}
    # OpenAI's own API takes no other letters in names; ours does.
    assert [t["function"]["name"] for t in body["tools"]] == ["weather", "__sea"]
    assert Wire(tools=True, ours=False).read_name(chain[0], "__sea") == "海 sea"
    ours = Wire(tools=True).body(chain, 0, {})["tools"]
    assert [t["function"]["name"] for t in ours] == ["weather", "海 sea"]
    assert "stop" not in body


def test_names_that_would_be_the_same_on_the_wire_are_numbered_and_are_themselves_again() -> None:
    long = "a" * 64
    own = ["天气预报", "股票查询", "____", f"{long}b", f"{long}c", long, "a b"]
    question = Question(
        "q",
        [{"role": "user", "content": "How?"}],
        [{"type": "function", "function": {"name": name, "parameters": {}}} for name in own],
        [],
    )
    wire = Wire(tools=True, ours=False)
    sent = [t["function"]["name"] for t in wire.body([question], 0, {})["tools"]]
    assert sent == ["_____2", "_____3", "____", "a" * 62 + "_2", "a" * 62 + "_3", long, "a_b"]
    assert [wire.read_name(question, name) for name in sent] == own
    assert wire.read_name(question, "other") == "other"


def test_prompts_of_other_forms_stay_as_they_are() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "(really) how?"}]
    assert strip_prompt(Question("a", messages, OBJECTS, [])) == messages
    known = [
        {"role": "user", "content": "(你正在扮演小天。你可以使用工具：[weather,海 sea]。请查看前面的知识库)天气怎样？"}
    ]
    assert strip_prompt(Question("a", known, OBJECTS, []))[0]["content"] == "天气怎样？"


BFCL_ROW = {
    "id": "simple_python_0",
    "question": [[{"role": "user", "content": "Find the area of a triangle with base 10 and height 5."}]],
    "function": [
        {
            "name": "math.triangle_area",
            "description": "Area of a triangle.",
            "parameters": {
                "type": "dict",
                "properties": {
                    "base": {"type": "float", "description": "The base."},
                    "height": {"type": "integer", "description": "The height."},
                    "unit": {"type": "string", "description": "The unit."},
                },
                "required": ["base", "height"],
            },
        }
    ],
}
TRUTH = [{"math.triangle_area": {"base": [10.0], "height": [5], "unit": ["units", ""]}}]


def write_bfcl(folder: Path, *rows: dict[str, Any], truth: Any = None) -> Path:
    (folder / "possible_answer").mkdir(parents=True)
    (folder / "BFCL_v4_x.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if truth:
        (folder / "possible_answer/BFCL_v4_x.json").write_text(json.dumps(truth))
    return folder


@pytest.mark.parametrize("inline", [True, False])
def test_a_bfcl_row_is_prompted_as_agentfabric_does_and_scored_by_its_possible_answers(
    tmp_path: Path, inline: bool
) -> None:
    row = {**BFCL_ROW, **({"ground_truth": TRUTH} if inline else {})}
    folder = write_bfcl(tmp_path, row, truth=None if inline else {"id": BFCL_ROW["id"], "ground_truth": TRUTH})
    (question,), left_out = read_bfcl(folder, 0)
    assert not left_out
    assert (question.id, question.category) == ("bfcl/simple_python_0", "simple_python")
    system, asked = (m["content"] for m in question.messages)
    assert 'math.triangle_area: math.triangle_area API. Area of a triangle. Parameters: {"type": "object"' in system
    assert asked.startswith("(. you can use tools: [math.triangle_area])Find the area")
    assert question.tools[0]["function"]["parameters"]["properties"]["base"]["type"] == "number"
    for arguments, right in (
        ('{"base": 10, "height": 5}', True),
        ('{"base": 10, "height": 5, "unit": "Units"}', True),
        ('{"base": 10, "height": 5.0}', False),
        ('{"base": 10}', False),
    ):
        told = answer(question, f"Action: math.triangle_area\nAction Input: {arguments}\n")
        assert score_answer(question, told).marks["exact_arguments"] is right


def test_irrelevance_wants_no_call_and_what_cannot_be_scored_is_counted(tmp_path: Path) -> None:
    rows = [
        {**BFCL_ROW, "id": "irrelevance_0"},
        {**BFCL_ROW, "id": "live_relevance_3-3-0"},
        {**BFCL_ROW, "id": "simple_java_1", "ground_truth": TRUTH},
        {**BFCL_ROW, "id": "multi_turn_base_1"},
        {**BFCL_ROW, "id": "simple_python_9"},
    ]
    questions, left_out = read_bfcl(write_bfcl(tmp_path, *rows), 0)
    assert [(q.category, q.expected) for q in questions] == [("irrelevance", [])]
    assert left_out == {
        "any call is right": 1, "values in Java's notation": 1, "several turns against a simulated system": 1,
        "no ground_truth": 1,
    }  # fmt: skip


USER = [[{"role": "user", "content": "How are you?"}]]
TEXT_TRUTH = ["calc_binomial_probability(n=20, k=5, p=0.6)"]
TOOL_ALONE = {"name": "absolute_value", "description": "Of a number.", "parameters": {"type": "dict", "properties": {}}}
OFFICIAL: dict[str, str | list[dict[str, Any]]] = {
    # The folder `data` of bfcl-eval 2026.3.23, a row or two of each kind of file.
    "BFCL_v4_format_sensitivity.json": '{\n    "simple_python": ["simple_python_58"],\n    "parallel": ["parallel_191"]\n}\n',
    "BFCL_v4_irrelevance.json": [{**BFCL_ROW, "id": f"irrelevance_{n}"} for n in range(9)],
    "BFCL_v4_live_irrelevance.json": [{"id": "live_irrelevance_120-9-0", "question": USER, "function": []}],
    "BFCL_v4_live_relevance.json": [{**BFCL_ROW, "id": "live_relevance_0-0-0"}],
    "BFCL_v4_live_simple.json": [{**BFCL_ROW, "id": f"live_simple_{n}-{n}-0"} for n in range(2)],
    "BFCL_v4_memory.json": [
        {"id": "memory_0-customer-0", "question": USER, "involved_classes": ["MemoryAPI"], "scenario": "customer"}
    ],
    "BFCL_v4_multi_turn_miss_func.json": [
        {
            "id": "multi_turn_miss_func_0",
            "question": [*USER, [], *USER],
            "initial_config": {},
            "path": [],
            "missed_function": {},
        }
    ],
    "BFCL_v4_simple_java.json": [{**BFCL_ROW, "id": "simple_java_0"}],
    "BFCL_v4_simple_javascript.json": [{**BFCL_ROW, "id": f"simple_javascript_{n}"} for n in range(2)],
    "BFCL_v4_simple_python.json": [{**BFCL_ROW, "id": f"simple_python_{n}"} for n in range(4)],
    "BFCL_v4_web_search.json": [{"id": "web_search_0", "question": USER, "involved_classes": ["WebSearchAPI"]}],
    "memory_prereq_conversation/memory_customer.json": [
        {"id": "memory_prereq_0-customer-0", "topic": "First", "question": [*USER, *USER], "scenario": "customer"}
    ],
    "multi_turn_func_doc/math_api.json": [TOOL_ALONE],
    "possible_answer/BFCL_v4_memory.json": [
        {"id": "memory_0-customer-0", "ground_truth": ["Michael"], "source": "My name…"}
    ],
    "possible_answer/BFCL_v4_multi_turn_miss_func.json": [
        {"id": "multi_turn_miss_func_0", "ground_truth": [["cd(folder='document')"], [], ["sort('final_report.pdf')"]]}
    ],
    "possible_answer/BFCL_v4_live_simple.json": [
        {"id": "live_simple_0-0-0", "ground_truth": TRUTH},
        # As live_simple_106-63-0: nothing is allowed.
        {"id": "live_simple_1-1-0", "ground_truth": [{"math.triangle_area": {"base": [], "height": [5]}}]},
    ],
    "possible_answer/BFCL_v4_simple_python.json": [
        {"id": f"simple_python_{n}", "ground_truth": TRUTH} for n in range(4)
    ],
    "unused_datasets/question/BFCL_v4_chatable.json": [{"question": "Find the area.", "function": ""}],
    "unused_datasets/question/BFCL_v4_exec_simple.json": [{**BFCL_ROW, "id": "exec_simple_0"}],
    "unused_datasets/possible_answer/BFCL_v4_exec_simple.json": [{"id": "exec_simple_0", "ground_truth": TEXT_TRUTH}],
}


def write_official(folder: Path) -> Path:
    for name, rows in OFFICIAL.items():
        text = rows if isinstance(rows, str) else "\n".join(json.dumps(row) for row in rows)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_bfcls_own_folder_is_read_as_it_is(tmp_path: Path) -> None:
    questions, left_out = read_bfcl(write_official(tmp_path), 0)
    assert Counter(q.category for q in questions) == {
        "irrelevance": 9, "live_irrelevance": 1, "live_simple": 2, "simple_python": 4,
    }  # fmt: skip
    assert left_out == {
        "any call is right": 1, "needs BFCL's memory": 1, "several turns against a simulated system": 1,
        "values in Java's notation": 1, "values in JavaScript's notation": 2, "needs the web": 1,
    }  # fmt: skip


def test_a_limit_takes_the_first_ones_of_each_category_in_turn(tmp_path: Path) -> None:
    questions, left_out = read_bfcl(write_official(tmp_path), 9)
    assert [q.id.removeprefix("bfcl/") for q in questions] == [
        "irrelevance_0", "irrelevance_1", "irrelevance_2", "live_irrelevance_120-9-0", "live_simple_0-0-0", "live_simple_1-1-0",
        "simple_python_0", "simple_python_1", "simple_python_2",
    ]  # fmt: skip
    assert left_out.total() == 7


def test_rows_of_v3_that_cannot_be_scored_are_left_out_too(tmp_path: Path) -> None:
    ids = ("java_0", "javascript_0", "exec_parallel_multiple_0", "rest_0", "chatable_0", "simple_0")
    rows = [{**BFCL_ROW, "id": row_id, "ground_truth": TEXT_TRUTH} for row_id in ids]
    rows[4] = {"id": "chatable_0", "question": USER, "function": ""}
    rows[5]["ground_truth"] = TRUTH
    questions, left_out = read_bfcl(write_bfcl(tmp_path, *rows), 0)
    assert [q.category for q in questions] == ["simple"]
    assert left_out == {
        "values in Java's notation": 1, "values in JavaScript's notation": 1, "calls are to be run": 2, "no ground_truth": 1,
    }  # fmt: skip


def test_a_row_may_hold_ends_of_lines_that_json_does_not_know_and_be_a_text_or_messages(tmp_path: Path) -> None:
    asked = "one\u2028two\x85three"
    texts: list[Any] = [asked, [{"role": "user", "content": asked}], [[{"role": "user", "content": asked}]]]
    rows = [{**BFCL_ROW, "id": f"simple_{n}", "question": text, "ground_truth": TRUTH} for n, text in enumerate(texts)]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for name, text in (
        ("lines", lines),
        ("list", json.dumps(rows, indent=1)),
        ("object", json.dumps(rows[0], indent=1)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "x.json").write_bytes(text.encode())
        questions, _ = read_bfcl(folder, 0)
        assert len(questions) == (1 if name == "object" else 3)
        assert all(q.messages[-1]["content"].endswith(asked) for q in questions)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ground_truth": [{"f": {"base": "Rome"}}]}, "ground_truth has {'base': 'Rome'}"),
        ({"ground_truth": [{"f": {"base": [{"city": "Rome"}]}}]}, "ground_truth has {'base': "),
        ({"ground_truth": [{"f": {"base": [[{"city": "Rome"}]]}}]}, "ground_truth has {'base': "),
        ({"ground_truth": [{"f": ["Rome"]}]}, "ground_truth has ['Rome']"),
        ({"ground_truth": [{}]}, "ground_truth is [{}]"),
        ({"ground_truth": TEXT_TRUTH}, "ground_truth is ['calc_binomial"),
        ({"ground_truth": "f(base=1)"}, "ground_truth is 'f(base=1)'"),
        ({"ground_truth": ""}, "ground_truth is ''"),
        ({"question": None}, "question is None"),
        ({"question": []}, "question is []"),
        ({"question": [[]]}, "question is [[]]"),
        ({"question": [*USER, None]}, "question is "),
        ({"question": [[{"role": "user"}]]}, "question has {'role': 'user'}"),
        ({"question": [[{"role": "user", "content": None}]]}, "question has {'role': 'user', 'content': None}"),
        ({"question": ["How?"]}, "question has 'How?'"),
        ({"function": None}, "function has None"),
        ({"function": [{"description": "no name"}]}, "function has {'description'"),
        ({"function": [{"name": "f", "parameters": ["a"]}]}, "tool 'f': a is no parameter"),
        ({"id": None}, "has no id"),
    ],
)
def test_a_row_of_another_form_is_refused_by_its_line(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    rows = [{**BFCL_ROW, "ground_truth": TRUTH}, {**BFCL_ROW, "id": "simple_1", "ground_truth": TRUTH, **changed}]
    with pytest.raises(InvalidData) as refused:
        read_bfcl(write_bfcl(tmp_path, *rows), 0)
    assert [v.field for v in refused.value.violations] == ["BFCL_v4_x.json line 2"]
    assert refused.value.violations[0].description.startswith(said)


def test_all_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    good = json.dumps({**BFCL_ROW, "ground_truth": TRUTH})
    deep = "[" * 5000
    lines = [good, "", "{", good, "3", deep, '{"id": "a"}', "caf\xe9"]
    (tmp_path / "a.json").write_bytes("\n".join(lines).encode("latin-1"))
    (tmp_path / "b.jsonl").write_text('[{"id": "x"},')
    (tmp_path / "c.json").write_text('[{"id": "x"}, 3]')
    with pytest.raises(InvalidData) as refused:
        read_bfcl(tmp_path, 0)
    found = {v.field: v.description for v in refused.value.violations}
    assert list(found) == [
        "a.json line 3", "a.json line 4", "a.json line 5", "a.json line 6", "a.json line 7", "a.json line 8",
        "b.jsonl", "c.json row 1", "c.json row 2",
    ]  # fmt: skip
    assert found["a.json line 3"].startswith("is not JSON: Expecting property name")
    assert found["a.json line 4"] == "has the id of a.json line 1"
    assert found["a.json line 5"] == "is no object"
    assert found["a.json line 7"] == "a has no question and no function"
    assert "utf-8" in found["a.json line 8"]
    assert "neither JSON lines nor a JSON list" in found["b.jsonl"]


def test_of_many_wrong_rows_the_first_are_named_and_all_counted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("3\n" * 50)
    with pytest.raises(InvalidData, match="50 in all; the first 20 are") as refused:
        read_bfcl(tmp_path, 0)
    assert len(refused.value.violations) == 20


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "BFCL_v4_x.json").write_text("")
    with pytest.raises(InvalidData, match="that can be scored"):
        read_bfcl(tmp_path, 0)
