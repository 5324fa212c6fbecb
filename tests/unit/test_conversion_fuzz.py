"""Rows broken in every way: none ends a conversion or keeps it waiting, and each is converted or refused, never lost.

Vectors and example rows are mutated as bytes, as JSON and as texts of the grammar. FUZZ_ROWS says how many (a million take
seven minutes), FUZZ_SEED which ones: `FUZZ_ROWS=1000000 FUZZ_SEED=7 pytest tests/unit/test_conversion_fuzz.py`.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from services.common.fabric import render_rows, render_system
from services.conversion.readers import READERS
from services.conversion.refusals import REASONS, Refused
from services.conversion.sources import decode_row
from tests.unit.test_conversion_worker import convert

ROWS, SEED = int(os.environ.get("FUZZ_ROWS", "3000")), os.environ.get("FUZZ_SEED", "0")
LONGEST = 2.0
"""Seconds for one row of at most some ten thousand bytes: far more than any takes, also where other tests run beside."""
ROOT = Path(__file__).parents[1]
FILES = (ROOT / "data/vectors.jsonl", ROOT.parent / "examples/data/train.jsonl")
PARTS = {"ms_agent": 0.7, "agentfabric": 0.1, "openai": 0.1, "chat": 0.1}

PIECES = (
    "\n1. ", "\n2. ", ": Call this tool", " API. ", "useful for?", "Parameters:", "Parameters: []", 'Parameters: [{"', "[", "]",
    "{", "}", '"', "'", "\\", "\\'", ",", ":", "：", "．", "\n", "\r\n", "\r", "\0", "\u2028", "\x85", "\ufeff", "天气", "🙂",
    "Thought: ", "\nAction: ", "\nAction Input: ", "\nObservation: ", "\nFinal Answer: ",
    "\nThought: I now know the final answer", "\nAnswer:", "<result>", "</result>",
    "\nUse the following format:", "You have access to the following APIs:", "NaN", "1e999",
    "9" * 5000, "[" * 2000, "{'a':" * 300, "(" * 300, "-" * 300, "None", "True",
    "null", "{[]: 1}", "{1: 2}", "\\ud800", "\\N{x}", " " * 3000,
    "# 工具", "(. you can use tools: [", "])", "必须是[", "Format the arguments as a JSON object.", "https://a.example/b.png",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1 << 70, 1.5, "", " ", [], {}, [[]], [None], {"from": "user"}, {"value": "x"}, ["a"], "[]", "{}",
    "[open(1)]", [[[[[[[[[[[]]]]]]]]]]], {"a": {"a": {"a": {}}}}, "system", "user", "assistant", "tool",
)  # fmt: skip
FABRIC_CALL = re.compile(r"Action: (.+)\nAction Input: (.+)")
"""What RolePlay 0.7.1 calls."""


def seeds() -> Mapping[str, list[bytes]]:
    """Format → good rows, and vectors."""
    rows = [json.loads(line) for file in FILES for line in file.read_text(encoding="utf-8").splitlines()[:40]]
    texts = [row.get("input_row", row) for row in rows]
    ms_agent = [t.encode() if isinstance(t, str) else json.dumps(t, ensure_ascii=False).encode() for t in texts]
    made: dict[str, list[bytes]] = {"ms_agent": ms_agent, "agentfabric": [], "openai": [], "chat": []}
    for data in ms_agent:
        try:
            told = READERS["ms_agent"](decode_row(data, 1 << 20))
        except Refused:
            continue
        system = render_system(told.tools, "Be kind.", "en")
        for example in render_rows("split", system, told.tools, told.rounds, "en"):
            made["agentfabric"].append(json.dumps({"messages": list(example.messages)}, ensure_ascii=False).encode())
        query, turn, _ = told.rounds[0]
        chat = [{"role": "user", "content": query}, {"role": "assistant", "content": turn.answer}]
        made["chat"].append(json.dumps({"messages": chat}).encode())
        if turn.calls:
            call = turn.calls[0]
            function = {"name": call.name, "arguments": call.arguments}
            tools = [
                {"type": "function", "function": {**tool._asdict(), "parameters": json.loads(tool.parameters)}}
                for tool in told.tools
            ]
            steps = [
                {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]},
                {"role": "tool", "tool_call_id": "1", "content": call.observation},
            ]
            made["openai"].append(json.dumps({"tools": tools, "messages": [chat[0], *steps, chat[1]]}).encode())
    return made


def mutate(data: bytes, draw: random.Random) -> bytes:
    """A row that is broken once or a few times, or not at all."""
    for _ in range(draw.choice((0, 1, 1, 1, 2, 4))):
        data = draw.choice(MUTATIONS)(data, draw)
    return data.replace(b"\n", b" ")  # one line


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Cut, doubled, or with other bytes somewhere."""
    start = draw.randrange(len(data) + 1)
    end = min(len(data), start + draw.choice((0, 1, 1, 2, 30, 500)))
    middle = draw.choice(
        (b"", draw.randbytes(draw.choice((1, 1, 4))), data[start:end] * 2, draw.choice(PIECES).encode())
    )
    return draw.choice((data[:start], data[start:])) if draw.random() < 0.1 else data[:start] + middle + data[end:]


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    """Another value, key or order in some place of the JSON."""
    try:
        row = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, draw)
    holder, key = _find_place(row, draw)
    if holder is None:
        return json.dumps(draw.choice(VALUES)).encode()
    value = holder[key]
    way = draw.randrange(6)
    if way == 0:
        holder[key] = draw.choice(VALUES)
    elif way == 1:
        del holder[key]
    elif way == 2 and isinstance(holder, list):
        holder.insert(draw.randrange(len(holder) + 1), value)
    elif way == 3 and isinstance(holder, list):
        draw.shuffle(holder)
    elif way == 4:
        holder[key] = draw.choice((repr, json.dumps))(value)
    elif isinstance(value, str):
        holder[key] = _mutate_text(value, draw)
    return json.dumps(row, ensure_ascii=draw.random() < 0.5).encode("utf-8", errors="surrogatepass")


def mutate_text(data: bytes, draw: random.Random) -> bytes:
    """A piece of the grammar in some turn's text, or a piece less."""
    try:
        turns = json.loads(data)
        turns = turns.get("conversations") or turns["messages"]
        turn = draw.choice(turns)
        key = "value" if "value" in turn else "content"
        before, after = turn[key], _mutate_text(turn[key], draw)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return mutate_json(data, draw)
    parts = [json.dumps(text, ensure_ascii=False).encode("utf-8", errors="surrogatepass") for text in (before, after)]
    return data.replace(parts[0], parts[1], 1)


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (mutate_bytes, mutate_json, mutate_text, mutate_text)


def _mutate_text(text: str, draw: random.Random) -> str:
    start = draw.randrange(len(text) + 1)
    end = min(len(text), start + draw.choice((0, 0, 1, 5, 50, 1000)))
    way = draw.randrange(5)
    if way == 0:
        return text.replace("\n", draw.choice(("\r\n", "\r", " ", "\n\n", "")))
    if way == 1:  # the piece itself, moved or written again
        place = draw.randrange(len(text) + 1)
        return text[:place] + text[start:end] + text[place:]
    if way == 2:
        return text.translate({ord('"'): "'", ord("'"): '"'})
    return text[:start] + draw.choice(PIECES) + text[end:]


def _find_place(value: Any, draw: random.Random) -> tuple[Any, Any]:
    """(a list or object, a key of it) anywhere; (None, None) in nothing."""
    holder, key = None, None
    while isinstance(value, dict | list) and value and (holder is None or draw.random() < 0.8):
        holder, key = value, draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        value = value[key]
    return holder, key


def fuzz(format: str, count: int) -> Iterator[bytes]:
    """Rows of a format; a good one first, so that some row is always left to train on."""
    rows, draw = seeds()[format], random.Random(f"{SEED} {format}")
    yield rows[-1]
    for _ in range(count - 1):
        yield mutate(draw.choice(rows), draw)


@pytest.mark.timeout(60 + ROWS // 100)
@pytest.mark.parametrize("format", PARTS)
def test_every_broken_row_is_read_or_refused_by_name_in_bounded_time(format: str) -> None:
    read = 0
    for number, data in enumerate(fuzz(format, round(ROWS * PARTS[format])), 1):
        start = time.perf_counter()
        try:
            READERS[format](decode_row(data, 1 << 20))
            read += 1
        except Refused as refused:
            assert refused.code in REASONS
        except Exception as error:
            error.add_note(f"row {number}: {data[:4000]!r}")
            raise
        assert time.perf_counter() - start < LONGEST, f"row {number}: {data[:4000]!r}"
    assert read


@pytest.mark.timeout(120 + ROWS // 50)
@pytest.mark.parametrize(
    "settings",
    [
        {"duplicates": "keep"},
        {"questions": {"min": 1, "max": 3}, "distractors": {"max": 2}, "refusals": {"ratio": 0.5}, "duplicates": "near"},
    ],
    ids=["alone", "together"],
)  # fmt: skip
def test_a_file_of_broken_rows_is_converted_and_none_is_lost(settings: dict[str, Any], tmp_path: Path) -> None:
    rows_in = 0
    for format, part in PARTS.items():
        with (tmp_path / f"{format}.jsonl").open("wb") as file:
            for data in fuzz(format, round(ROWS * part)):
                file.write(data + b"\n")
                rows_in += bool(data.strip())
    layout = "both" if settings["duplicates"] == "keep" else "split"
    sources = [{"uri": format, "format": format, "layout": layout} for format in PARTS]
    files = [tmp_path / f"{format}.jsonl" for format in PARTS]
    output, told = convert(tmp_path, *files, sources=sources, max_reject_ratio=1, **settings)
    gone = told["rows_rejected"] + told["rows_left_out"] + sum(told["rows_duplicate"].values())
    assert told["rows_in"] == rows_in == told["rows_converted"] + gone
    assert told["rows_converted"] > rows_in / 20
    assert told["rows_rejected"] == count_lines(output / "rejects.jsonl") > rows_in / 20
    written = 0
    for split in ("train", "validation", "test"):
        with (output / f"{split}.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                written += 1
                check_row(json.loads(line))
    assert written == count_lines(output / "tools.jsonl") == sum(told["rows_written"].values())


def check_row(row: dict[str, Any]) -> None:
    """A training row ends in what the assistant says, and RolePlay could run each call of it."""
    assert row["messages"][-1]["role"] == "assistant"
    for message in row["messages"]:
        if message["role"] == "assistant" and message.get("loss") is not False:
            for name, arguments in FABRIC_CALL.findall(message["content"]):
                assert name == name.strip()
                assert isinstance(json.loads(arguments), dict), row


def count_lines(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)
