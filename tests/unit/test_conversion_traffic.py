"""Recorded traffic becomes rows: what is kept, what is left out and why, and that conversion takes every row."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import InvalidData
from services.common.fabric import Tool, render_call, render_prefix, render_result, render_system
from services.conversion.readers import READERS
from services.conversion.rows import make_call, make_tool
from services.conversion.traffic import REASONS, Selection, write_rows

WEATHER = make_tool(
    "amap_weather", "获取对应城市的天气数据",
    {"type": "object", "properties": {"location": {"type": "string", "description": ""}}, "required": ["location"]},
)  # fmt: skip
SYSTEM = render_system([WEATHER], "你扮演一个天气预报助手。", "zh")
CALL = render_call(make_call("amap_weather", {"location": "朝阳区"}))
RESULT, TOLD = "朝阳区的天气是晴温度是25度。", "朝阳区现在是晴天，25度。"
ASKED = render_prefix([WEATHER], "zh") + "朝阳区天气怎样？"
AFTER = ASKED + CALL + render_result(RESULT)
DONE = f"{CALL}{render_result(RESULT)} {TOLD}"


def record(
    messages: Sequence[str], answer: str, reason: str = "stop", time: str = "2026-11-20T12:00:00.000+00:00"
) -> Any:
    """A record of a system prompt, user and assistant in turn, and an answer."""
    roles = ("user", "assistant")
    told = [{"role": "system", "content": SYSTEM}]
    told += [{"role": roles[n % 2], "content": text} for n, text in enumerate(messages)]
    said = {"content": answer, "finish_reason": reason}
    return {
        "id": "0",
        "time": time,
        "deployment": "x",
        "revision": "r-1",
        "request": {"messages": told},
        "answer": said,
    }


def select(folder: Path, *records: Any, since: datetime | None = None) -> tuple[list[Any], list[Any], Selection]:
    """(rows, what was left out, the counts)."""
    file = folder / "records.jsonl.gz"
    file.write_bytes(gzip.compress(b"".join(json.dumps(r).encode() + b"\n" for r in records)))
    rows, left_out = folder / "rows.jsonl", folder / "left-out.jsonl"
    selection = write_rows([file], since, rows, left_out)
    read = [[json.loads(line) for line in each.read_text().splitlines()] for each in (rows, left_out)]
    return read[0], read[1], selection


def test_the_steps_of_a_conversation_become_one_row_that_conversion_takes(tmp_path: Path) -> None:
    rows, left_out, selection = select(tmp_path, record([ASKED], CALL), record([AFTER], TOLD))
    assert selection == Selection(2, 1, {"CONTINUED": 1})
    assert [each["reason"] for each in left_out] == ["CONTINUED"]
    [row] = rows
    conversation = READERS["agentfabric"](row)
    assert conversation.system == SYSTEM
    [told] = conversation.rounds
    assert (told.query, told.turn.answer) == ("朝阳区天气怎样？", TOLD)
    assert told.turn.calls == (make_call("amap_weather", {"location": "朝阳区"}, RESULT),)
    assert row["meta"] == {"time": "2026-11-20T12:00:00.000+00:00", "deployment": "x", "revision": "r-1"}


def test_of_a_longer_talk_only_the_last_record_is_a_row(tmp_path: Path) -> None:
    """RolePlay's history has the finished turn, and no parenthesis before the older question."""
    later = ["朝阳区天气怎样？", DONE, ASKED.replace("怎样？", "明天呢？") + CALL + render_result(RESULT)]
    rows, _, selection = select(
        tmp_path,
        record([ASKED], CALL),
        record([AFTER], TOLD),
        record([*later[:2], later[2].partition("Action:")[0]], CALL),
        record(later, "明天也是。"),
    )
    assert selection == Selection(4, 1, {"CONTINUED": 3})
    assert [each.turn.answer for each in READERS["agentfabric"](rows[0]).rounds] == [TOLD, "明天也是。"]


def test_what_the_model_says_before_its_call_is_told_from_the_question(tmp_path: Path) -> None:
    """RolePlay writes it right behind the question; only the record of the first step tells where that ended."""
    said = f"我来查询一下。\n{CALL}"
    more = f"是晴天。\n\n{CALL}"
    two = ASKED + said + render_result(RESULT)
    three = two + more + render_result(RESULT)
    rows, _, selection = select(tmp_path, record([ASKED], said), record([two], more), record([three], TOLD))
    assert selection == Selection(3, 1, {"CONTINUED": 2})
    [told] = READERS["agentfabric"](rows[0]).rounds
    assert told.query == "朝阳区天气怎样？"
    assert [call.lead for call in told.turn.calls] == ["我来查询一下。", "是晴天。"]
    _, _, alone = select(tmp_path, record([two], TOLD))
    assert alone.left_out == {"INCOMPLETE_TURN": 1}


def test_what_goes_wrong_later_does_not_cost_what_went_well(tmp_path: Path) -> None:
    later = ["朝阳区天气怎样？", DONE, ASKED]
    _, _, selection = select(tmp_path, record([AFTER], TOLD), record(later, f"{CALL}Action Input: {{"))
    assert selection.rows == 1


@pytest.mark.parametrize(
    ("messages", "answer", "more", "reason"),
    [
        ([ASKED], CALL, {}, "NO_RESULT"),
        ([AFTER], "", {}, "NOT_CHAT"),
        ([AFTER], TOLD, {"reason": "length"}, "CUT_OFF"),
        ([ASKED], "今天天气很好。", {}, "NO_CALL"),
        ([ASKED + CALL + render_result("")], TOLD, {}, "NO_RESULT"),
        ([ASKED], render_call(make_call("other", {})), {}, "UNKNOWN_TOOL"),
        ([ASKED], "Action: amap_weather\nAction Input: {朝阳区\n", {}, "INVALID_ACTION_INPUT"),
        (
            [ASKED + CALL + render_result("Tool api amap_weather failed to call. Args: {}.Details: no key")],
            "对不起。", {}, "TOOL_FAILED",
        ),
        ([ASKED, TOLD], TOLD, {}, "ROLE_ORDER"),
    ],
)  # fmt: skip
def test_what_is_no_example_is_left_out_by_name(
    tmp_path: Path, messages: list[str], answer: str, more: dict[str, str], reason: str
) -> None:
    rows, [left], selection = select(tmp_path, record(messages, answer, **more))
    assert rows == [] and selection.left_out == {reason: 1}
    assert left["reason"] == reason and reason in REASONS


def test_prompts_that_are_not_agentfabrics_and_plain_completions_are_left_out(tmp_path: Path) -> None:
    chat = record([ASKED], TOLD)
    chat["request"]["messages"][0]["content"] = "Be kind."
    completion = {"id": "1", "time": "", "request": {"prompt": "Once"}, "answer": {"content": "upon"}}
    _, _, selection = select(tmp_path, chat, completion)
    assert selection.left_out == {"NOT_FABRIC_PROMPT": 1, "NOT_CHAT": 1}


def test_the_same_conversation_is_one_row(tmp_path: Path) -> None:
    _, _, selection = select(tmp_path, record([AFTER], TOLD), record([AFTER], TOLD), record([AFTER], "晴。"))
    assert selection == Selection(3, 2, {"DUPLICATE": 1})


def test_since_leaves_earlier_records_alone(tmp_path: Path) -> None:
    early = record([AFTER], "晴。", time="2026-11-19T23:59:59.999+00:00")
    _, _, selection = select(tmp_path, early, record([AFTER], TOLD), since=datetime(2026, 11, 20, tzinfo=UTC))
    assert selection == Selection(1, 1, {})


def test_calls_of_openai_clients_become_agentfabrics_rows(tmp_path: Path) -> None:
    function = {"name": WEATHER.name, "description": WEATHER.description, "parameters": json.loads(WEATHER.parameters)}
    tools = [{"type": "function", "function": function}]
    call = {"id": "c1", "type": "function", "function": {"name": WEATHER.name, "arguments": '{"location": "朝阳区"}'}}
    asked: list[dict[str, Any]] = [
        {"role": "system", "content": "你很友善。"}, {"role": "user", "content": "朝阳区天气怎样？"},
    ]  # fmt: skip
    results = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": RESULT}]
    first = {
        "request": {"messages": asked, "tools": tools},
        "answer": {"tool_calls": [call], "finish_reason": "tool_calls"},
    }
    last = {
        "request": {"messages": asked + results, "tools": tools}, "answer": {"content": TOLD, "finish_reason": "stop"},
    }  # fmt: skip
    [row], _, selection = select(tmp_path, first, last)
    assert selection == Selection(2, 1, {"CONTINUED": 1})
    turns = [turn["value"] for turn in row["conversations"]]
    assert turns == [render_system([Tool(*WEATHER)], "你很友善。", "zh"), ASKED, DONE]


def test_a_file_that_is_no_record_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    for data in (b"nothing", gzip.compress(b"[1]\n"), gzip.compress(b"{}\n")[:-9]):
        file.write_bytes(data)
        with pytest.raises(InvalidData, match=r"a\.jsonl\.gz"):
            write_rows([file], None, tmp_path / "rows", tmp_path / "left")
