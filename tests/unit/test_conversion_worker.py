"""A whole conversion on folders: files, splits, refusals, packing, and that it is the same each time."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from pydantic import ValidationError

from services.common.errors import FabrictuneError, InvalidData, InvalidSpec
from services.conversion import sources as sources_module
from services.conversion import spill, worker
from services.conversion.processes import run_tasks
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
    listed = settings.pop("sources", [{"uri": str(s), "layout": "split"} for s in sources])
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
        "rejects.jsonl", "report.html", "report.json", "test.jsonl", "tools.jsonl", "train.jsonl", "validation.jsonl",
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


def test_refusals_are_near_misses_as_far_as_there_are_any(tmp_path: Path) -> None:
    fields = [f"{field}_{what}" for field in ("weather", "music", "stock") for what in ("today", "history")]
    source = write(tmp_path / "a.jsonl", *[row(n, tool) for n, tool in enumerate([*fields, "translate"])])
    refused = {}
    for near in (0, 1):
        output, _ = convert(
            tmp_path, source, folder=f"near-{near}", split={"test": 0, "validation": 0}, summaries=0,
            refusals={"ratio": 1, "near": near, "answers": ["I can't."]},
        )  # fmt: skip
        found = []
        for line, beside in zip(lines(output / "train.jsonl"), lines(output / "tools.jsonl"), strict=True):
            listed = {t["function"]["name"] for t in beside["tools"]}
            turns = line["messages"][1:]
            for question, answer in zip(turns[::2], turns[1::2], strict=True):
                if answer["content"] == "I can't.":
                    asked = question["content"].rpartition(" ")[2].removesuffix("?")
                    assert asked not in listed
                    found.append(any(asked.partition("_")[0] == t.partition("_")[0] for t in listed))
        refused[near] = found
    assert refused[0]
    assert not any(refused[0])
    assert any(refused[1])
    assert not all(refused[1])  # "translate" has none, and each other tool has one


def test_a_question_is_not_refused_where_a_tool_is_listed_that_does_the_same(tmp_path: Path) -> None:
    fields = [f"{field}_{what}" for field in ("weather", "music", "stock") for what in ("today", "history")]
    source = write(tmp_path / "a.jsonl", *[row(n, tool) for n, tool in enumerate(fields)])
    today, found = [tool for tool in fields if tool.endswith("today")], {}
    for name, equivalent in (("apart", []), ("same", [today, ["stock_history", "gone"]])):
        output, _ = convert(
            tmp_path, source, folder=name, split={"test": 0, "validation": 0}, summaries=0,
            refusals={"ratio": 1, "near": 1}, equivalent_tools=equivalent,
        )  # fmt: skip
        report = json.loads((output / "report.json").read_text())
        found[name] = [set(pair[:2]) <= set(today) for pair in report["near_misses"]]
        assert report["warnings"] == (["equivalent_tools names 'gone', which no row has"] if equivalent else [])
    assert any(found["apart"])
    assert found["same"] and not any(found["same"])


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
        {"sources": [{"uri": "a"}], "refusals": {"ratio": 1, "near": 1.5}},
        {"sources": [{"uri": "a"}], "equivalent_tools": [["alone"]]},
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
    written = {part for r in lines(output / "train.jsonl") for part in r["id"].partition("/")[0].split("+")}
    assert written == {"row-0", "row-1", "row-2"}
    assert [(r["code"], r["line"]) for r in lines(output / "rejects.jsonl")] == [("ROW_TOO_LONG", 4)]
    assert metadata["rows_converted"] == 3


SPLITS = ("train", "validation", "test", "tools", "rejects")


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks and buckets out of little data."""
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(worker, "CHUNK_BYTES", 1)
    monkeypatch.setattr(spill, "BUCKET_BYTES", 12_000)


def test_processes_and_nodes_do_not_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)
    rows = [*many(), *many(), *[row(200 + n, name(n), name(n + 9), name(n + 17)) for n in range(40)]]
    source = write(tmp_path / "a.jsonl", *rows[:50], "no json", *rows[50:], '{"conversations": []}')
    settings: dict[str, Any] = {
        "distractors": {"max": 2}, "questions": {"min": 1, "max": 3}, "refusals": {"ratio": 0.5}, "duplicates": "near",
        "split": {"test": 0.2, "validation": 0.1}, "self_cognition": {"count": 20, "name": "A", "author": "B"},
    }  # fmt: skip
    monkeypatch.setenv("FABRICTUNE_PROCESSES", "1")
    one, told = convert(tmp_path, source, folder="one", **settings)
    assert told["rows_duplicate"]["exact"] == 60
    assert told["rows_in"] == told["rows_converted"] + told["rows_rejected"] + sum(told["rows_duplicate"].values())
    monkeypatch.setenv("FABRICTUNE_PROCESSES", "2")
    two, _ = convert(tmp_path, source, folder="two", **settings)
    spec = Spec.model_validate({"sources": [{"uri": str(source), "layout": "split"}], **settings})
    shares = {}
    for node in range(3):
        shares[f"shares/{node}"] = tmp_path / f"share-{node}"
        shares[f"shares/{node}"].mkdir()
        worker.share(spec, {"sources/0": source}, shares[f"shares/{node}"], (node, 3), Recorder())
    three = tmp_path / "three"
    three.mkdir()
    run(spec, {"sources/0": source, **shares}, three, Recorder())
    monkeypatch.setattr(worker, "TOOLS_BYTES", 20_000)  # most tools then stand in each row that lists them
    four, _ = convert(tmp_path, source, folder="four", **settings)
    for file in (*(f"{split}.jsonl" for split in SPLITS), "report.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
        assert (one / file).read_bytes() == (four / file).read_bytes(), file
        if file != "report.json":
            assert (one / file).read_bytes() == (three / file).read_bytes(), file
    assert [r["line"] for r in lines(one / "rejects.jsonl")] == [51, 162]


def test_listed_tools_are_exchanged_so_that_a_held_out_tool_is_never_seen(tmp_path: Path) -> None:
    rows = [row(n, name(n % 30), name((n + 7) % 30), name((n + 13) % 30)) for n in range(90)]
    output, _ = convert(tmp_path, write(tmp_path / "a.jsonl", *rows), split={"test": 0.2, "validation": 0})
    beside = {b["id"]: {t["function"]["name"] for t in b["tools"]} for b in lines(output / "tools.jsonl")}
    train, test = (
        set().union(*(beside[r["id"]] for r in lines(output / f"{split}.jsonl"))) for split in ("train", "test")
    )
    assert train and test and not train & test
    assert json.loads((output / "report.json").read_text())["tools_exchanged"] > 0


def test_near_duplicates_go_and_other_questions_on_the_same_tool_stay(tmp_path: Path) -> None:
    text = "please tell me all about the long and winding history of this remarkable old question " * 3
    rows = [row(n, "alpha") for n in range(3)]
    for number, each in enumerate(rows):
        each["conversations"][1]["value"] = text + ("!", "!!", "what else is there to see around the corner")[number]
        each["conversations"][2]["value"] = rows[0]["conversations"][2]["value"]
    source = write(tmp_path / "a.jsonl", *rows)
    none = {"test": 0, "validation": 0}
    assert convert(tmp_path, source, folder="exact", split=none)[1]["rows_duplicate"] == {"exact": 0, "near": 0}
    _, told = convert(tmp_path, source, folder="near", split=none, duplicates="near")
    assert told["rows_duplicate"] == {"exact": 0, "near": 1}


def test_a_mix_ratio_takes_so_many_times_the_rows_of_the_other_sources(tmp_path: Path) -> None:
    own, general = write(tmp_path / "a.jsonl", *many(10)), tmp_path / "b.jsonl"
    chat = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(50)
    ]
    write(general, *chat)
    sources = [{"uri": "a", "layout": "split"}, {"uri": "b", "layout": "split", "format": "chat", "mix_ratio": 2.0}]
    output, told = convert(tmp_path, own, general, sources=sources, split={"test": 0, "validation": 0})
    assert sum(r["source"] == "b.jsonl" for r in lines(output / "train.jsonl")) == 20
    assert (told["rows_left_out"], told["rows_converted"]) == (30, 30)


def test_a_row_of_very_many_rounds_is_refused(tmp_path: Path) -> None:
    long = row(1, "t")
    long["conversations"] += long["conversations"][1:] * 300
    output, _ = convert(tmp_path, write(tmp_path / "a.jsonl", long, *many(3)), split={"test": 0, "validation": 0})
    assert [r["code"] for r in lines(output / "rejects.jsonl")] == ["ROW_TOO_LARGE"]


def test_half_a_surrogate_pair_in_a_literal_is_refused(tmp_path: Path) -> None:
    broken = row(1, "t")
    broken["conversations"][1]["value"] = "half"
    text = {"id": "x", "conversations": str(broken["conversations"]).replace("half", "\\ud800")}
    output, _ = convert(tmp_path, write(tmp_path / "a.jsonl", text, *many(3)), split={"test": 0, "validation": 0})
    assert [r["code"] for r in lines(output / "rejects.jsonl")] == ["EMPTY_CONVERSATIONS"]


def test_parquet_and_zstd_are_read(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([row(1, "t"), row(2, "u")])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    packed = zstandard.compress(json.dumps(row(3, "v")).encode())
    (tmp_path / "b.jsonl.zst").write_bytes(packed)
    none = {"test": 0, "validation": 0}
    _, told = convert(tmp_path, tmp_path / "a.parquet", tmp_path / "b.jsonl.zst", split=none)
    assert told["rows_converted"] == 3
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "d.jsonl.zst").write_bytes(packed[:-4])
    for broken in ("c.parquet", "d.jsonl.zst"):
        with pytest.raises(InvalidData, match=broken):
            convert(tmp_path, tmp_path / broken, folder=f"out-{broken}")


def test_a_line_without_end_is_refused_and_the_next_row_is_read(tmp_path: Path) -> None:
    endless, good = b"{" * (3 << 20), json.dumps(row(1, "t")).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(endless + b"\n" + good))
    output, told = convert(tmp_path, tmp_path / "a.jsonl.gz", split={"test": 0, "validation": 0})
    [refused] = lines(output / "rejects.jsonl")
    assert (refused["code"], refused["line"], refused["offset"]) == ("ROW_TOO_LARGE", 1, 0)
    assert len(refused["row"]) < 2 << 20
    assert told["rows_converted"] == 1
    [chunk] = sources_module.cut_chunks([(0, tmp_path / "a.jsonl.gz")])
    assert [(raw.line, raw.offset) for raw in sources_module.read_rows(chunk, 99)] == [(1, 0), (2, len(endless) + 1)]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_of_a_packed_line_without_end_no_more_is_in_memory_than_a_row_may_have(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(pack(bytes(100 << 20)))
    [chunk] = sources_module.cut_chunks([(0, file)])
    tracemalloc.start()
    [raw] = sources_module.read_rows(chunk, 1 << 20)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(raw.data) == (1 << 20) + 2
    assert most < 32 << 20


@pytest.mark.parametrize("most", [0, 1200])
def test_every_training_row_has_an_id_of_its_own(tmp_path: Path, most: int) -> None:
    source = write(tmp_path / "a.jsonl", *[row(n, name(n)) for n in range(8)])
    output, _ = convert(
        tmp_path, source, sources=[{"uri": "a", "layout": "both"}], questions={"min": 4, "max": 4},
        split={"test": 0, "validation": 0}, max_row_characters=most,
    )  # fmt: skip
    ids = [r["id"] for r in lines(output / "train.jsonl")]
    assert len(ids) == len(set(ids)) > 16
    assert ids == [b["id"] for b in lines(output / "tools.jsonl")]


def test_a_wrong_number_of_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)
    monkeypatch.setenv("FABRICTUNE_PROCESSES", "many")
    with pytest.raises(InvalidSpec, match="FABRICTUNE_PROCESSES is 'many'"):
        convert(tmp_path, write(tmp_path / "a.jsonl", *many(5)))


def test_what_breaks_in_a_process_is_told_here() -> None:
    with pytest.raises(FabrictuneError, match="TypeError: unsupported operand"):
        run_tasks(divmod, [(1,), (2,)], print)


def test_shares_are_not_used_up(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *many(30))
    spec = Spec.model_validate({"sources": [{"uri": "a"}]})
    given = tmp_path / "share"
    given.mkdir()
    worker.share(spec, {"sources/0": source}, given, (0, 1), Recorder())
    before = sorted(f.relative_to(given) for f in given.rglob("*"))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        run(spec, {"sources/0": source, "shares/0": given}, tmp_path / name, Recorder())
    assert sorted(f.relative_to(given) for f in given.rglob("*")) == before
    assert (tmp_path / "first/train.jsonl").read_bytes() == (tmp_path / "second/train.jsonl").read_bytes()


def test_processes_end_when_the_one_that_started_them_is_killed() -> None:
    code = (
        "from services.conversion.processes import run_tasks\n"
        "def work(number, tell):\n"
        "    while True: tell(1)\n"
        "run_tasks(work, [(1,), (2,)], lambda count: None)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        wait_until(lambda: len(listed.read_text().split()) == 2)
        children = [Path(f"/proc/{pid}/stat") for pid in listed.read_text().split()]
        parent.kill()
    wait_until(lambda: all(not c.exists() or c.read_text().rpartition(")")[2].split()[0] == "Z" for c in children))


def wait_until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("questions", [1, 4])
def test_rows_of_two_sources_that_share_an_id_or_a_files_name_stay_apart(tmp_path: Path, questions: int) -> None:
    def sources(*numbers: int) -> list[Path]:
        made = []
        for part, number in enumerate(numbers):
            (tmp_path / str(part)).mkdir(exist_ok=True)
            nameless = {key: value for key, value in row(number + 1, name(number + 1)).items() if key != "id"}
            made.append(write(tmp_path / str(part) / "a.jsonl", nameless, row(number, name(number)) | {"id": "0"}))
        return made

    settings: dict[str, Any] = {"questions": {"min": 1, "max": questions}, "split": {"test": 0, "validation": 0}}
    alone, _ = convert(tmp_path, *sources(0), folder="alone", **settings)
    both, _ = convert(tmp_path, *sources(0, 4), **settings)
    ids = [r["id"] for r in lines(both / "train.jsonl")]
    assert len(set(ids)) == len(ids)
    assert own(ids) == {"0", "0~1.1", "a.jsonl@0", "a.jsonl@0~1.0"}
    assert own([r["id"] for r in lines(alone / "train.jsonl")]) == {"0", "a.jsonl@0"}


def own(ids: list[str]) -> set[str]:
    """Ids of the source rows that training rows were made of."""
    return {part.partition("/")[0] for row_id in ids for part in row_id.split("+")}
