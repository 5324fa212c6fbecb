"""Rows before and after: every change is marked, a refused row says why, and it is quick and small whatever the row."""

from __future__ import annotations

import gzip
import io
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fabrictune.cli.preview import show_preview
from fabrictune.v1 import conversion_pb2
from services.common.errors import InvalidData
from services.conversion.changes import DELETED, EQUAL, INSERTED, MOST_PIECES, Span, cut_spans, mark_changes
from services.conversion.preview import (
    HEAD_BYTES,
    LONGEST_TEXT,
    MOST_EXAMPLES,
    PreviewedExample,
    PreviewedMessage,
    PreviewedRefusal,
    PreviewedRow,
    preview_head,
    preview_path,
    preview_row,
    to_plain,
)
from services.conversion.refusals import REASONS
from services.conversion.spec import Spec
from tests.unit.test_conversion_worker import row, write

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/data/train.jsonl"
TEXTS = st.text(st.sampled_from("ab c\n.,天气é"), max_size=60)


def spec(**settings: Any) -> Spec:
    source = {"uri": "datasets/rows", **settings.pop("source", {})}
    return Spec.model_validate({"sources": [source], **settings})


def preview(value: Any, **settings: Any) -> PreviewedRow:
    made = spec(**settings)
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return preview_row(data, made.sources[0], made, 7, "rows.jsonl")


def why(shown: PreviewedRow) -> PreviewedRefusal:
    """The refusal of a row that is refused."""
    assert shown.refusal is not None
    return shown.refusal


def sides(message: PreviewedMessage) -> tuple[str, str]:
    """The text before and after, as its spans tell them."""
    old = "".join(text for kind, text in message.spans if kind != INSERTED)
    return old, "".join(text for kind, text in message.spans if kind != DELETED)


@given(TEXTS, TEXTS)
def test_spans_are_the_text_before_and_the_text_after(before: str, after: str) -> None:
    spans = mark_changes(before, after)
    assert "".join(text for kind, text in spans if kind != INSERTED) == before
    assert "".join(text for kind, text in spans if kind != DELETED) == after
    assert all(text for _, text in spans)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=4))
def test_spans_are_shared_out_to_pieces_without_loss(before: str, pieces: list[str]) -> None:
    spans = mark_changes(before, "".join(pieces))
    cut = cut_spans(spans, [len(piece) for piece in pieces])
    assert ["".join(text for kind, text in piece if kind != DELETED) for piece in cut] == pieces
    assert "".join(text for piece in cut for kind, text in piece if kind != INSERTED) == before


def test_words_are_marked_whole_and_chinese_characters_one_by_one() -> None:
    assert mark_changes("a nice day", "a nasty day") == [
        Span(EQUAL, "a "), Span(DELETED, "nice"), Span(INSERTED, "nasty"), Span(EQUAL, " day"),
    ]  # fmt: skip
    assert mark_changes("今天天气好", "今天天气坏")[0] == Span(EQUAL, "今天天气")


def test_what_two_large_changes_have_between_them_by_chance_is_part_of_them() -> None:
    before, after = "alpha bravo charlie of delta echo foxtrot", "one two three four of five six seven eight"
    assert [kind for kind, _ in mark_changes(before, after)] == [DELETED, INSERTED]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a b " * 5000, "b a " * 5000),
        ("".join(chr(0x4E00 + n % 110) for n in range(20_000)), "".join(chr(0x4E00 + n % 109) for n in range(20_000))),
        ("\n" * 20_000, "\n\t" * 10_000),
        (" ".join(f"w{n % 99}" for n in range(1900)), " ".join(f"w{n * 7 % 99}" for n in range(1900))),
    ],
)  # fmt: skip
def test_time_is_bounded_whatever_the_texts(before: str, after: str) -> None:
    begin = time.monotonic()
    mark_changes(before, after)
    assert time.monotonic() - begin < 5


def test_a_text_with_too_many_lines_is_replaced_as_a_whole() -> None:
    before, after = "x\n" * (MOST_PIECES + 1), "x\n" * MOST_PIECES
    assert [kind for kind, _ in mark_changes(before, after)] == [DELETED, INSERTED]


def test_a_row_is_shown_before_and_after_in_each_of_its_layouts() -> None:
    shown = preview(row(1, "weather"))
    assert (shown.source, shown.line, shown.id) == ("rows.jsonl", 7, "row-1")
    assert [message.role for message in shown.before] == ["system", "user", "assistant"]
    assert [example.layout for example in shown.after] == ["split", "split", "inline"]
    assert shown.refusal is None


@pytest.mark.parametrize("layout", ["split", "inline"])
def test_every_change_is_marked(layout: str) -> None:
    shown = preview(row(1, "weather", "maps"), source={"layout": layout})
    before = {message.role: message.text for message in shown.before}
    for example in shown.after:
        told: dict[str, str] = {}
        for message in example.messages:
            old, new = sides(message)
            assert new == message.text
            told[message.role] = told.get(message.role, "") + old
        assert told == before


def test_what_is_trained_is_said() -> None:
    shown = preview(row(1, "weather"), source={"layout": "inline"})
    said = [(message.role, message.trained) for message in shown.after[0].messages]
    assert said == [("system", False), ("user", False), ("assistant", True), ("assistant", False), ("assistant", True)]


def test_the_prompt_lists_no_tools_of_other_rows() -> None:
    shown = preview(row(1, "weather"), distractors={"min": 3, "max": 3}, questions={"min": 2, "max": 3})
    assert "[weather]" in shown.after[0].messages[0].text


def test_openais_tools_stand_before_the_turns() -> None:
    tool = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
    call = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Hot?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "30 degrees"},
        {"role": "assistant", "content": "Yes."},
    ]
    shown = preview({"tools": [tool], "messages": messages}, source={"format": "openai"})
    assert [message.role for message in shown.before] == ["tools", "user", "assistant", "tool", "assistant"]
    assert shown.refusal is None
    assert sides(shown.after[0].messages[1])[0] == "Hot?"


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (b"{", "INVALID_JSON"),
        (b"\xff", "WRONG_ENCODING"),
        ({"id": 1}, "EMPTY_CONVERSATIONS"),
        ({"conversations": [{"from": "user", "value": "x"}]}, "NO_SYSTEM_TURN"),
        ({"conversations": [1, None, {"from": 2, "value": {"a": [3]}}]}, "EMPTY_CONVERSATIONS"),
        ({"conversations": f"[{{'from': 'user', 'value': '{chr(92)}ud800'}}]"}, "EMPTY_CONVERSATIONS"),
        ({"conversations": "[" * 300 + "]" * 300}, "EMPTY_CONVERSATIONS"),
    ],
)  # fmt: skip
def test_a_refused_row_says_why(value: Any, code: str) -> None:
    shown = preview(value)
    assert why(shown).code == code
    assert why(shown).expected == REASONS[code].expected
    assert why(shown).excerpt
    assert not shown.after


def test_a_refused_row_is_shown_as_far_as_it_can_be_read() -> None:
    broken = row(1, "weather")
    broken["conversations"][2]["value"] = "Action: nothing\nAction Input: {}"
    shown = preview(broken)
    assert why(shown).code == "UNKNOWN_TOOL"
    assert "nothing" in why(shown).found
    assert [message.role for message in shown.before] == ["system", "user", "assistant"]


def test_a_row_over_a_limit_is_refused_as_it_would_be() -> None:
    assert why(preview(row(1, "weather"), max_row_characters=100)).code == "ROW_TOO_LONG"
    assert why(preview(row(1, "weather") | {"x": "y" * 2000}, max_row_bytes=1500)).code == "ROW_TOO_LARGE"


def test_long_texts_are_cut_with_a_mark() -> None:
    long = row(1, "weather")
    long["conversations"][1]["value"] = "word " * 10_000
    shown = preview(long)
    for message in (shown.before[1], shown.after[0].messages[1]):
        assert len(message.text) < LONGEST_TEXT + 100
        assert "(cut: " in message.text


def test_a_row_that_makes_many_training_rows_is_shown_in_part() -> None:
    many = row(1, "weather")
    many["conversations"] += [turn for _ in range(9) for turn in many["conversations"][1:]]
    shown = preview(many, source={"layout": "split"})
    assert len(shown.after) == MOST_EXAMPLES
    assert shown.after_left_out == 20 - MOST_EXAMPLES


def test_rows_of_a_folder_come_in_order_and_blank_lines_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", row(1, "weather"), "", row(2, "maps"))
    write(tmp_path / "b.jsonl", row(3, "mail"))
    shown = list(preview_path(tmp_path, spec(), 3))
    assert [(r.source, r.line, r.id) for r in shown] == [
        ("a.jsonl", 1, "row-1"), ("a.jsonl", 3, "row-2"), ("b.jsonl", 1, "row-3"),
    ]  # fmt: skip


def test_every_row_of_the_examples_can_be_previewed() -> None:
    shown = list(preview_path(EXAMPLES, spec(), 50))
    assert len(shown) == 50
    assert not [r.id for r in shown if r.refusal]


def compress_zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


PACKINGS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": compress_zst}


@pytest.mark.parametrize("suffix", PACKINGS)
def test_rows_are_read_from_the_beginning_of_a_file(suffix: str) -> None:
    noise = random.Random(1)  # so that packing does not make it small
    lines = [json.dumps(row(n, "weather") | {"noise": noise.randbytes(4000).hex()}) for n in range(60)]
    packed = PACKINGS[suffix]("\r\n".join(lines).encode())
    name = f"rows.jsonl{suffix}"
    assert [r.line for r in preview_head(packed, True, name, spec(), 60)] == list(range(1, 61))
    begun = list(preview_head(packed[: len(packed) * 2 // 3], False, name, spec(), 60))
    assert 0 < len(begun) < 60
    assert not [r for r in begun if r.refusal], "a row that was torn is not shown"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_is_packed_is_unpacked_up_to_a_limit(suffix: str) -> None:
    bomb = PACKINGS[suffix](b"x" * (HEAD_BYTES * 4))
    (shown,) = preview_head(bomb, True, f"rows.jsonl{suffix}", spec(), 5)
    assert why(shown).code == "ROW_TOO_LARGE"
    assert len(why(shown).excerpt) <= 80


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"])
def test_a_file_that_cannot_be_read_from_its_beginning_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidData, match=name):
        list(preview_head(b"nothing packed", True, name, spec(), 5))


def printed(*rows: PreviewedRow, colours: bool = False) -> str:
    said = io.StringIO()
    console = Console(file=said, width=160, force_terminal=colours, color_system="standard" if colours else None)
    answer = json_format.ParseDict({"rows": to_plain(rows)}, conversion_pb2.PreviewConversionResponse())
    show_preview(answer, console)
    return said.getvalue()


def test_rows_are_printed_side_by_side_with_what_changed_in_brackets_or_in_colours() -> None:
    text = printed(preview(row(1, "weather")))
    assert "{+(. you can use tools: [weather])+}Question 1 on weather?" in text
    assert "[-Observation: seen 1" in text
    assert text.count("Begin!") == 1, "the prompt is printed once"
    coloured = printed(preview(row(1, "weather")), colours=True)
    assert "\x1b[32m(. you can use tools: [weather])\x1b[0mQuestion" in coloured
    assert "{+" not in coloured


def test_a_change_of_blanks_alone_can_be_seen() -> None:
    message = PreviewedMessage("user", " \n", spans=[Span(INSERTED, " \n")])
    shown = PreviewedRow("rows.jsonl", 1, "row-1", after=[PreviewedExample("split", [message])])
    assert "·⏎" in printed(shown, colours=True)


def test_a_row_cannot_write_to_the_terminal() -> None:
    evil = row(1, "weather") | {"id": "\x1b[2J[red]id[/red]\x07"}
    evil["conversations"][1]["value"] = "\x1b]0;title\x07 [bold]text[/bold] \x9b31m"
    text = printed(preview(evil), preview({"id": "\x1b", "conversations": []}))
    assert not {"\x1b", "\x07", "\x9b"} & set(text)
    assert "[red]id[/red]" in text
    assert "[bold]text[/bold]" in text


@pytest.mark.parametrize("module", ["preview", "changes", "report_page", "tokens"])
def test_workers_parts_load_no_grpc(module: str) -> None:
    code = f"import sys, services.conversion.{module}; print('grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_refusal_is_printed_with_what_was_expected() -> None:
    text = printed(preview({"id": 1, "conversations": []}))
    assert "EMPTY_CONVERSATIONS" in text
    assert "no turns" in text
    assert printed() == "There are no rows.\n"
