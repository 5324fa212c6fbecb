"""A whole conversion on folders: files, splits, refusals, packing, and that it is the same each time."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from services.common.errors import InvalidData
from services.conversion.spec import Spec
from services.conversion.worker import run
from tests.conftest import Recorder


def row(number: int, *tools: str, call: bool = True) -> dict[str, Any]:
    parameters = '[{"name": "q", "description": "a question", "required": "True"}]'
    apis = "\n".join(
        f"{n}. {tool}: Call this tool to interact with the {tool} API. What is the {tool} API useful for? About {tool}. "
        f"Parameters: {parameters}"
        for n, tool in enumerate(tools, 1)
    )
    system = (
        f"Answer … You have access to the following APIs:\n{apis}\n\nUse the following format:\n\nThought: …\nBegin!"
    )
    answer = (
        f'Action: {tools[0]}\nAction Input: {{"q": "{number}"}}\nObservation: seen {number}\n'
        f"Thought: I now know the final answer\nFinal Answer: It is {number}."
    )
    turns = [
        ("system", system),
        ("user", f"Question {number} on {tools[0]}?"),
        ("assistant", answer if call else "No."),
    ]
    return {"id": f"row-{number}", "conversations": [{"from": f, "value": v} for f, v in turns]}


def write(file: Path, *rows: dict[str, Any] | str) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def convert(tmp_path: Path, *sources: Path, folder: str = "out", **settings: Any) -> tuple[Path, dict[str, Any]]:
    listed = settings.pop("sources", [{"uri": str(s)} for s in sources])
    spec = Spec.model_validate({"sources": listed, **settings})
    output = tmp_path / folder
    output.mkdir()
    metadata = run(spec, {f"sources/{n}": s for n, s in enumerate(sources)}, output, Recorder())
    return output, metadata


WORDS = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima"]


def name(number: int) -> str:
    """Tools that share no word."""
    return f"{WORDS[number % 12]}{chr(97 + number // 12)}"


def many(count: int = 60) -> list[dict[str, Any]]:
    return [row(n, name(n), call=n % 5 != 0) for n in range(count)]


def test_files_of_a_dataset(tmp_path: Path) -> None:
    output, metadata = convert(tmp_path, write(tmp_path / "a.jsonl", *many()))
    assert sorted(f.name for f in output.iterdir()) == [
        "rejects.jsonl", "report.json", "test.jsonl", "tools.jsonl", "train.jsonl", "validation.jsonl",
    ]  # fmt: skip
    written = [r for split in ("train", "validation", "test") for r in lines(output / f"{split}.jsonl")]
    assert {frozenset(r) for r in written} == {frozenset({"id", "source", "messages"})}
    beside = lines(output / "tools.jsonl")
    assert [b["id"] for b in beside] == [r["id"] for r in written]
    assert {frozenset(b) for b in beside} == {frozenset({"id", "tools"}), frozenset({"id", "tools", "expected"})}
    assert {t["type"] for b in beside for t in b["tools"]} == {"function"}
    assert metadata["rows_in"] == metadata["rows_converted"] == 60
    assert lines(output / "rejects.jsonl") == []


def test_no_tool_is_in_two_splits(tmp_path: Path) -> None:
    rows = many() + [row(100 + n, name(n), name(n + 12)) for n in range(12)]
    output, _ = convert(tmp_path, write(tmp_path / "a.jsonl", *rows), split={"test": 0.2, "validation": 0.2})
    beside = {b["id"]: {t["function"]["name"] for t in b["tools"]} for b in lines(output / "tools.jsonl")}
    seen = [
        set().union(*(beside[r["id"]] for r in lines(output / f"{split}.jsonl")))
        for split in ("train", "validation", "test")
    ]
    assert all(seen)
    assert not (seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2])


def test_distractors_come_from_the_same_split(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *many())
    output, _ = convert(tmp_path, source, distractors={"min": 2, "max": 2}, split={"test": 0.2, "validation": 0})
    beside = {b["id"]: [t["function"]["name"] for t in b["tools"]] for b in lines(output / "tools.jsonl")}
    assert {len(tools) for tools in beside.values()} == {3}
    train = {t for r in lines(output / "train.jsonl") for t in beside[r["id"]]}
    assert not train & {t for r in lines(output / "test.jsonl") for t in beside[r["id"]]}


def test_named_splits_and_a_tool_in_two_of_them(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", *many(20)), write(tmp_path / "b.jsonl", row(100, "zulu"))
    named = [{"uri": "a", "split": "train"}, {"uri": "b", "split": "test"}]
    output, _ = convert(tmp_path, first, second, sources=named)
    assert {r["id"].partition("/")[0] for r in lines(output / "test.jsonl")} == {"row-100"}
    leaking = write(tmp_path / "c.jsonl", row(101, name(0)))
    with pytest.raises(InvalidData, match="no tool may be in two splits"):
        convert(tmp_path, first, leaking, sources=named, folder="leak")


def test_bad_rows_are_refused_by_name_with_their_line(tmp_path: Path) -> None:
    bad = ['{"id": "broken"', json.dumps({"id": "x", "conversations": []}), json.dumps({"conversations": [
        {"from": "system", "value": "Be nice"}, {"from": "user", "value": "q"}, {"from": "assistant", "value": "a"},
    ]})]  # fmt: skip
    source = write(tmp_path / "a.jsonl", row(1, "t"), *bad, row(2, "u"), row(3, "v"), row(4, "w"))
    output, metadata = convert(tmp_path, source)
    refused = lines(output / "rejects.jsonl")
    assert [(r["line"], r["code"]) for r in refused] == [
        (2, "INVALID_JSON"), (3, "EMPTY_CONVERSATIONS"), (4, "NOT_REACT_PROMPT"),
    ]  # fmt: skip
    assert all(set(r) == {"source", "line", "offset", "code", "expected", "excerpt", "row"} for r in refused)
    assert refused[0]["row"] == bad[0]
    assert metadata["rows_in"] == metadata["rows_converted"] + metadata["rows_rejected"] == 7


def test_no_valid_row_fails_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"no row is left to train on: 2 of 2 were rejected.*INVALID_JSON"):
        convert(tmp_path, write(tmp_path / "a.jsonl", "not json", "{"))


def test_too_many_rejects_fail(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="max_reject_ratio"):
        convert(tmp_path, write(tmp_path / "a.jsonl", *many(9), "x"), max_reject_ratio=0.05)


def test_the_same_twice_and_another_with_another_seed(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *many())
    settings: dict[str, Any] = {
        "distractors": {"max": 3},
        "questions": {"min": 2, "max": 3},
        "refusals": {"ratio": 0.5},
    }
    first, second = (convert(tmp_path, source, folder=n, **settings)[0] for n in ("one", "two"))
    other = convert(tmp_path, source, folder="other", seed=7, **settings)[0]
    for name in ("train.jsonl", "tools.jsonl", "test.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / "train.jsonl").read_bytes() != (other / "train.jsonl").read_bytes()


def test_questions_share_a_prompt_and_refusals_fit_no_tool(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *[row(n, name(n)) for n in range(12)])
    output, _ = convert(
        tmp_path, source, split={"test": 0, "validation": 0}, questions={"min": 3, "max": 3},
        refusals={"ratio": 1, "answers": ["I can't."]}, summaries=0,
    )  # fmt: skip
    tools = {b["id"]: {t["function"]["name"] for t in b["tools"]} for b in lines(output / "tools.jsonl")}
    asked, refused = 0, 0
    for line in lines(output / "train.jsonl"):
        turns = line["messages"][1:]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            tool = question["content"].rpartition(" ")[2].removesuffix("?")
            assert (answer["content"] == "I can't.") == (tool not in tools[line["id"]])
            asked, refused = asked + 1, refused + (answer["content"] == "I can't.")
    assert asked - refused == 12  # every row once
    assert 0 < refused <= 24  # from none to twice as many


def test_gzip_and_folders_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "a.jsonl", row(1, "t"))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(row(2, "u")).encode()))
    _, metadata = convert(tmp_path, folder)
    assert metadata["rows_in"] == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"sources": []},
        {"sources": [{"uri": "a", "layout": "other"}]},
        {"sources": [{"uri": "a"}], "split": {"test": 0.6, "validation": 0.5}},
        {"sources": [{"uri": "a"}], "distractors": {"min": 3, "max": 1}},
        {"sources": [{"uri": "a"}], "questions": {"min": 0, "max": 1}},
        {"sources": [{"uri": "a"}], "unknown": 1},
    ],
)
def test_bad_specs_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Spec.model_validate(wrong)


def test_a_shared_prompt_that_is_too_long_is_taken_apart_and_what_is_still_too_long_is_refused(tmp_path: Path) -> None:
    rows = [row(n, name(n)) for n in range(4)]
    rows[3]["conversations"][1]["value"] += " please" * 400
    source = write(tmp_path / "a.jsonl", *rows)
    output, metadata = convert(
        tmp_path, source, split={"test": 0, "validation": 0}, questions={"min": 4, "max": 4}, summaries=0,
        max_row_characters=2500,
    )  # fmt: skip
    assert max(sum(len(m["content"]) for m in r["messages"]) for r in lines(output / "train.jsonl")) <= 2500
    assert {r["id"].partition("/")[0] for r in lines(output / "train.jsonl")} == {"row-0", "row-1", "row-2"}
    assert [(r["code"], r["line"]) for r in lines(output / "rejects.jsonl")] == [("ROW_TOO_LONG", 4)]
    assert metadata["rows_converted"] == 3
