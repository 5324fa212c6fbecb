"""The whole stage against a small server that speaks OpenAI's API: columns, suites, the gate, and going on after a kill."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fabrictune.cli import app
from fabrictune.errors import ApiError
from services.common.artifacts import Artifacts
from services.common.config import StoreConfig
from services.common.errors import Cancelled, GateNotMet, InvalidData, InvalidSpec
from services.common.fabric import Call, Turn
from services.common.store import Store
from services.evaluation.earlier import read_answers
from services.evaluation.targets import find_label, find_targets
from services.evaluation.worker import STAGE, run_stoppable
from tests.conftest import Recorder, serving
from tests.unit.test_evaluation_questions import BFCL_ROW, REFUSED, TRUTH, TURN, write_bfcl, write_dataset

RIGHT = 'Action: weather\nAction Input: {"city": "Rome"}\n'


@dataclass
class Model:
    """Answers as its model's name says: before (never calls), after (calls right and sums up), hosted (uses tools)."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    fail_after: int = 10**9
    """So many answers, then only refusals."""
    too_long: str = "never"
    """A question that holds this is refused."""
    stall_after: int = 10**9
    """So many answers, then none until `going_on`."""
    stalled: threading.Event = field(default_factory=threading.Event)
    going_on: threading.Event = field(default_factory=threading.Event)

    @property
    def status(self) -> int:
        """Of a refusal."""
        return 401 if len(self.asked) >= self.fail_after else 400

    def answer(self, body: dict[str, Any], key: str) -> dict[str, Any] | None:
        """The message, or None to refuse."""
        if len(self.asked) >= self.fail_after:
            return None
        if len(self.asked) >= self.stall_after:
            self.stalled.set()
            self.going_on.wait(60)
        self.asked.append({**body, "key": key})
        last = body["messages"][-1]
        if self.too_long in last["content"]:
            return None
        if body["model"] == "before":
            return {"content": "I do not know."}
        if last["role"] == "tool" or last["content"].endswith("Answer:"):
            return {"content": "Warm, and the sea is calm."}
        if "tools" in body:
            function = {"name": "weather", "arguments": '{"city": "Rome"}'}
            return {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
        return {"content": RIGHT}


@pytest.fixture
def model() -> Iterator[Model]:
    model = Model()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            message = model.answer(body, self.headers["authorization"])
            told = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 5}}
            raw, kind = json.dumps(told).encode(), "application/json"
            if body.get("stream"):
                chunk = json.dumps({"choices": [{"delta": message}]})
                raw, kind = f"data: {chunk}\n\ndata: [DONE]\n\n".encode(), "text/event-stream"
            self.send_response(model.status if message is None else 200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    model.url = f"http://127.0.0.1:{http.server_port}/v1"
    with serving(http):
        yield model
        model.going_on.set()


@pytest.fixture
def evaluate(tmp_path: Path, model: Model, reporter: Recorder) -> Callable[..., Any]:
    """Runs the stage; returns (metadata, folder)."""
    data = write_dataset(tmp_path / "data", "split", [TURN, REFUSED, TURN])

    def run(name: str, asked: str = "after", **more: Any) -> tuple[dict[str, Any], Path]:
        inputs = {"dataset": data, **more.pop("inputs", {})}
        output = tmp_path / name
        output.mkdir()
        spec = {"dataset": "datasets/d", "target": {"address": model.url, "model": asked}, "concurrency": 1, **more}
        return dict(STAGE.run(STAGE.spec.model_validate(spec), inputs, output, reporter)), output

    return run


def read(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return told


def test_before_and_after_on_the_same_rows(evaluate: Callable[..., Any]) -> None:
    _, before = evaluate("before", "before")
    told, folder = evaluate("after", baseline="reports/b", inputs={"baseline": before}, gate={"calls": 1.0})
    report = read(folder)
    assert [(c["label"], c["role"]) for c in report["columns"]] == [("before", "baseline"), ("after", "target")]
    assert [c["groups"]["all"]["exact_arguments"]["k"] for c in report["columns"]] == [0, 2]
    assert report["paired"]["exact_arguments"]["difference"] == 1
    assert told["gate"][0]["met"]
    assert told["metrics"]["no_call"] == {"value": 0, "k": 0, "n": 1}
    assert "rouge_l" not in told["metrics"]
    assert (folder / "report.html").stat().st_size > 5000


def test_others_and_constrained_answers_stand_beside_it(
    evaluate: Callable[..., Any], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTED_API_KEY", "secret")
    hosted = {"address": model.url, "model": "hosted", "tools": True, "api_key_variable": "HOSTED_API_KEY"}
    _, folder = evaluate("out", targets=[hosted], constrained=True)
    report = read(folder)
    assert [(c["label"], c["role"]) for c in report["columns"]] == [
        ("hosted", "reference"), ("after", "target"), ("after, tools=", "constrained"),
    ]  # fmt: skip
    assert {c["groups"]["all"]["right_tool"]["k"] for c in report["columns"]} == {2}
    assert {a["key"] for a in model.asked if a["model"] == "hosted"} == {"Bearer secret"}
    assert {a["key"] for a in model.asked if a["model"] == "after"} == {"Bearer EMPTY"}
    assert "secret" not in "".join(f.read_text() for f in folder.iterdir())
    for column in report["columns"]:
        assert len((folder / column["answers"]).read_text().splitlines()) == 3
    assert report["paired"]["calls"]["n"] == 2  # against the first column


def test_a_key_that_is_not_there_is_named_before_anything_is_asked(evaluate: Callable[..., Any], model: Model) -> None:
    hosted = {"address": model.url, "model": "hosted", "api_key_variable": "NOT_SET_ANYWHERE_API_KEY"}
    with pytest.raises(InvalidSpec, match="NOT_SET_ANYWHERE_API_KEY, which is not set here"):
        evaluate("out", targets=[hosted])
    assert model.asked == []


def test_a_keys_last_line_break_is_not_sent_and_other_odd_keys_are_named_by_their_variables(
    evaluate: Callable[..., Any], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosted = {"address": model.url, "model": "hosted", "api_key_variable": "HOSTED_API_KEY"}
    monkeypatch.setenv("HOSTED_API_KEY", "secret\n")
    evaluate("good", targets=[hosted])
    assert {a["key"] for a in model.asked if a["model"] == "hosted"} == {"Bearer secret"}
    model.asked.clear()
    for key in ("sec\nret", "secrét"):
        monkeypatch.setenv("HOSTED_API_KEY", key)
        with pytest.raises(
            InvalidSpec, match="HOSTED_API_KEY, whose value has characters that no API key has"
        ) as refused:
            evaluate(f"bad-{len(key)}", targets=[hosted])
        assert "sec" not in str(refused.value)
    assert model.asked == []


def test_rows_are_asked_on_after_their_results_for_every_model_alike(
    evaluate: Callable[..., Any], model: Model
) -> None:
    _, before = evaluate("before", "before", suites=["multi_turn", "latency"])
    _, folder = evaluate("after", suites=["multi_turn", "latency"], baseline="reports/b", inputs={"baseline": before})
    report = read(folder)
    assert report["title"] == "3 held-out questions (test) and 4 after a tool's result"
    assert report["prompts"] == 3
    groups = [c["groups"]["all"] for c in report["columns"]]
    assert [g["rouge_l"]["n"] for g in groups] == [2, 2]
    assert [g["rouge_l"]["value"] for g in groups] == [0.0, 1.0]
    assert [g["plan_em"]["n"] for g in groups] == [7, 7]
    # Both rows are asked the same, so this is Wilson's interval for one.
    assert report["paired"]["rouge_l"] == {"difference": 1.0, "low": pytest.approx(0.21, abs=0.01), "high": 1.0, "n": 2}
    assert [(entry["label"], entry["requests"]) for entry in report["latency"]] == [("before", 3), ("after", 3)]


def test_bfcl_files_are_a_table_of_their_own_or_the_whole_report(
    evaluate: Callable[..., Any], tmp_path: Path, model: Model, reporter: Recorder
) -> None:
    rows = [{**BFCL_ROW, "ground_truth": TRUTH}, {**BFCL_ROW, "id": "simple_java_0", "ground_truth": TRUTH}]
    folder = write_bfcl(tmp_path / "bfcl", *rows)
    _, output = evaluate("both", bfcl="datasets/b", inputs={"bfcl": folder})
    (suite,) = read(output)["suites"]
    assert (suite["name"], suite["prompts"]) == ("bfcl", 1)
    assert suite["columns"][0]["groups"]["simple_python"]["right_tool"] == {
        "k": 0, "n": 1, "value": 0, "low": 0, "high": pytest.approx(0.7935),
    }  # fmt: skip
    assert ("WARNING", "1 rows of datasets/b are left out: values in Java's notation") in reporter.lines
    spec = {"bfcl": "datasets/b", "target": {"address": model.url, "model": "after"}}
    alone = tmp_path / "alone"
    alone.mkdir()
    STAGE.run(STAGE.spec.model_validate(spec), {"bfcl": folder}, alone, reporter)
    assert read(alone)["title"] == "1 questions in BFCL's format"


def test_an_attempt_that_broke_off_is_gone_on_with(
    evaluate: Callable[..., Any], tmp_path: Path, model: Model, reporter: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"

    def keep(step: int, folder: Path) -> None:
        reporter.checkpoints.append(step)
        shutil.copytree(folder, kept)

    monkeypatch.setattr(reporter, "checkpoint", keep)
    model.fail_after = 5
    hosted = {"address": model.url, "model": "hosted"}
    with pytest.raises(Exception, match="refuses row r2/0#1"):
        evaluate("first", targets=[hosted], suites=["multi_turn"])
    assert reporter.checkpoints == [5]
    model.asked.clear()
    model.fail_after = 10**9
    evaluate("second", "after", targets=[hosted], suites=["multi_turn"], inputs={"checkpoint": kept})
    assert [a["model"] for a in model.asked] == ["hosted"] * 2 + ["after"] * 7
    assert (reporter.steps[-1].step, reporter.steps[-1].total_steps) == (14, 14)


def test_a_row_that_the_server_refuses_fails_and_the_others_are_scored(
    evaluate: Callable[..., Any], tmp_path: Path, model: Model, reporter: Recorder
) -> None:
    """REFUSED: no tool fits, so an empty answer would count as right."""
    rows = write_dataset(tmp_path / "rows", "split", [REFUSED, TURN, TURN])
    text = (rows / "test.jsonl").read_text().replace("How is Rome?", "How is a very long Rome?", 1)
    (rows / "test.jsonl").write_text(text)
    model.too_long = "very long"
    told, folder = evaluate("out", inputs={"dataset": rows})
    assert {m: told["metrics"][m]["value"] for m in ("no_call", "stops", "right_tool", "hallu_rate")} == {
        "no_call": 0.0, "stops": pytest.approx(2 / 3), "right_tool": 1.0, "hallu_rate": 0.0,
    }  # fmt: skip
    assert (told["metrics"]["plan_em"]["k"], told["metrics"]["hallu_rate"]["n"]) == (2, 2)
    (column,) = read(folder)["columns"]
    assert column["failures"] == {"refused by the server": 1}
    (example,) = read(folder)["examples"]
    assert example["answers"]["after"].startswith("[refused: HTTP 400")
    assert "refused by the server" in (folder / "report.html").read_text()
    (warning,) = [line for severity, line in reporter.lines if severity == "WARNING"]
    assert warning.startswith("after refused 1 questions, such as r0/0 (HTTP 400")


def test_rows_that_were_refused_are_asked_again_by_the_next_attempt(
    evaluate: Callable[..., Any], tmp_path: Path, model: Model
) -> None:
    model.too_long = "How is Rome?\n"
    model.fail_after = 10**9
    rows = write_dataset(tmp_path / "rows", "split", [REFUSED, TURN, TURN])
    (rows / "test.jsonl").write_text((rows / "test.jsonl").read_text().replace("How is Rome?", "How is Rome?\\n", 1))
    _, kept = evaluate("first", inputs={"dataset": rows})
    model.asked.clear()
    model.too_long = "never"
    _, folder = evaluate("second", inputs={"dataset": rows, "checkpoint": kept})
    assert len(model.asked) == 1
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().split("\n") if line]
    assert sorted(a["id"] for a in answers) == ["r0/0", "r1/0", "r2/0"]
    assert not any(a["refused"] for a in answers)


def test_a_signal_that_arrives_where_asyncio_swallows_what_is_raised_ends_the_asking() -> None:
    def stop(*_: object) -> None:
        raise Cancelled("told to stop")

    async def ask() -> None:
        with contextlib.suppress(BaseException):  # as asyncio's transports do around a socket's send
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        await asyncio.sleep(5)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Cancelled, match="told to stop"):
            run_stoppable(ask())
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_leaves_its_answers_for_the_next_one(
    tmp_path: Path, model: Model, store: Store, object_store: StoreConfig, artifacts: Artifacts
) -> None:
    artifacts.publish(write_dataset(tmp_path / "data", "split", [TURN, REFUSED, TURN]), "datasets/d", "dataset")
    spec = {"dataset": "datasets/d", "target": {"address": model.url, "model": "after"}, "concurrency": 1}
    spec |= {"suites": ["multi_turn"], "gate": {"no_call": 1.0}}
    (tmp_path / "spec.yaml").write_text(json.dumps({"name": "evaluationJobs/e", "spec": spec}))
    env = {
        **os.environ,
        "FABRICTUNE_S3_ENDPOINT": object_store.endpoint,
        "FABRICTUNE_S3_BUCKET": store.bucket,
        "FABRICTUNE_S3_ACCESS_KEY": object_store.access_key,
        "FABRICTUNE_S3_SECRET_KEY": object_store.secret_key.get_secret_value(),
        "FABRICTUNE_DATA_DIR": str(tmp_path / "worker"),
        "FABRICTUNE_TERMINATION_LOG": str(tmp_path / "word"),
        "FABRICTUNE_SPEC_FILE": str(tmp_path / "spec.yaml"),
    }
    argv = [sys.executable, "-m", "services.evaluation.worker"]
    model.stall_after = 5
    with subprocess.Popen(argv, env=env) as worker:
        assert model.stalled.wait(60)  # five answers have arrived, the sixth is waited for
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 143
    assert store.get_json("evaluationJobs/e/outcome.json") is None
    model.stall_after = 10**9
    model.going_on.set()
    while len(model.asked) < 6:
        time.sleep(0.01)  # what was asked for is answered to nobody
    model.asked.clear()
    assert subprocess.run(argv, env=env, check=False).returncode == 78
    assert len(model.asked) == 2
    outcome = store.get_json("evaluationJobs/e/outcome.json")
    assert outcome is not None
    info = outcome["error"]["details"][0]
    assert (info["reason"], info["metadata"]) == ("GATE_NOT_MET", {"report": "reports/e"})
    sealed = artifacts.get("reports/e")
    assert sealed.metadata["metrics"]["rouge_l"]["n"] == 2
    assert {f.path for f in sealed.files} == {"answers.jsonl", "report.html", "report.json"}


def test_the_gate_compares_with_reports_and_other_targets(evaluate: Callable[..., Any]) -> None:
    _, good = evaluate("good")
    other = {"label": "hosted", "address": "", "model": "hosted"}
    told, folder = evaluate(
        "bad",
        "before",
        not_worse=[{"than": "reports/good", "by": {"right_tool": 0.02}}, {"than": "baseline", "by": {"no_call": 0}}],
        inputs={"compared/0": good},
    )
    assert [(g["metric"], g["than"], g["met"]) for g in told["gate"]] == [
        ("right_tool", "reports/good", False), ("no_call", "baseline", False),
    ]  # fmt: skip
    assert read(folder)["gate"] == told["gate"]
    assert STAGE.verdict is not None
    with pytest.raises(GateNotMet) as refused:
        STAGE.verdict(told, "reports/bad")
    assert "reports/bad says where it fails" in refused.value.message
    assert "-100.0 points" in refused.value.violations[0].description
    with pytest.raises(ValueError, match="give either a revision of ours or an address"):
        evaluate("none", targets=[other])


OTHER = Turn((Call("海 sea", "{}", "calm"),), "The sea is calm.")


@pytest.fixture
def other_rows(evaluate: Callable[..., Any], tmp_path: Path) -> Path:
    """A report on other rows that have the same ids, of which the second alone is the same."""
    data = write_dataset(tmp_path / "other", "split", [OTHER, REFUSED, OTHER])
    _, folder = evaluate("others", inputs={"dataset": data})
    return Path(folder)


def test_a_baseline_on_other_rows_of_the_same_ids_is_refused_before_anything_is_asked(
    evaluate: Callable[..., Any], other_rows: Path, model: Model
) -> None:
    model.asked.clear()
    with pytest.raises(
        InvalidData, match=r"reports/b has no answer to 2 of the rows, such as 'r0/0', as they are asked here"
    ):
        evaluate("after", baseline="reports/b", inputs={"baseline": other_rows})
    assert model.asked == []


def test_the_gate_is_not_met_by_a_comparison_with_other_rows_of_the_same_ids(
    evaluate: Callable[..., Any], other_rows: Path
) -> None:
    told, folder = evaluate(
        "bad", "before",
        not_worse=[{"than": "reports/others", "by": {"right_tool": 1.0, "no_call": 0.0}}],
        inputs={"compared/0": other_rows},
    )  # fmt: skip
    assert [(g["metric"], g["n"], g["missing"], g["met"]) for g in told["gate"]] == [
        ("right_tool", 0, 2, False), ("no_call", 1, 0, True),
    ]  # fmt: skip
    assert (
        "reports/others has no answer to 2 of the rows as they are asked here" in (folder / "report.html").read_text()
    )


@pytest.mark.parametrize("role", ["baseline", "compared/0"])
def test_a_report_that_does_not_say_what_was_asked_is_refused_with_what_to_do(
    evaluate: Callable[..., Any], other_rows: Path, role: str
) -> None:
    rows = [json.loads(line) for line in (other_rows / "answers.jsonl").read_text().split("\n") if line]
    assert all(row.pop("question") for row in rows)
    (other_rows / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compared = [{"than": "reports/old", "by": {"calls": 0}}]
    more: dict[str, Any] = {"baseline": "reports/old"} if role == "baseline" else {"not_worse": compared}
    with pytest.raises(InvalidData, match=r"reports/old does not say what was asked.*Evaluate its model again"):
        evaluate("bad", inputs={role: other_rows}, **more)


def test_a_baseline_that_is_called_as_the_target_keeps_its_answers_and_its_latency(
    evaluate: Callable[..., Any], model: Model
) -> None:
    suites = ["held_out", "latency"]
    _, before = evaluate("first", "before", suites=suites)
    mine = {"address": model.url, "model": "after", "label": "before"}
    not_worse = [{"than": "baseline", "by": {"right_tool": 0}}]
    more: dict[str, Any] = {"target": mine, "suites": suites, "not_worse": not_worse}
    told, folder = evaluate("second", baseline="reports/b", inputs={"baseline": before}, **more)
    report = read(folder)
    both = ["before (baseline)", "before"]
    assert [column["label"] for column in report["columns"]] == both
    assert [entry["label"] for entry in report["latency"]] == both
    assert told["gate"][0]["difference"] == 1
    assert report["examples"][0]["answers"] == {both[0]: "I do not know.", both[1]: RIGHT}


def test_targets_that_are_called_alike_are_numbered_past_a_label_that_is_given(model: Model) -> None:
    target = {"address": model.url, "model": "m"}
    targets = [target, {**target, "label": "m (2)"}]
    spec = STAGE.spec.model_validate({"dataset": "datasets/d", "target": target, "targets": targets})
    assert [asked.label for asked in find_targets(spec)] == ["m", "m (2)", "m (3)"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: file.unlink(), "reports/b: there is no report.json in .*give the folder of a report that"),
        (lambda file: file.write_text("{"), "reports/b: report.json in .* cannot be read .*give the folder"),
        (lambda file: file.write_text('{"rows": 3}'), "reports/b: report.json in .* tells no model's answers; give"),
    ],
)
def test_a_folder_that_is_no_report_is_refused_with_what_to_give(
    evaluate: Callable[..., Any], model: Model, spoil: Callable[[Path], Any], said: str
) -> None:
    _, before = evaluate("first", "before")
    model.asked.clear()
    spoil(before / "report.json")
    with pytest.raises(InvalidData, match=said):
        evaluate("second", baseline="reports/b", inputs={"baseline": before})
    with pytest.raises(InvalidData, match=r"there is no report\.json in .*manifest\.json; give the folder"):
        (before / "manifest.json").touch()
        evaluate("third", baseline="reports/b", inputs={"baseline": before / "manifest.json"})
    assert model.asked == []


def test_a_row_of_answers_that_lacks_or_has_a_key_too_many_is_named(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"id": "a", "finish_reason": "stop", "completion_tokens": 1, "seconds": 1, "mood": "good"}\n')
    with pytest.raises(InvalidData, match=r"answers\.jsonl, row 1, is no answer: it lacks text and it has mood, which"):
        read_answers(file)


def test_a_revision_is_compared_in_the_way_in_which_the_target_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABRICTUNE_GATEWAY_URL", "http://127.0.0.1:9")
    mine, other = (f"deployments/d/revisions/r-{n}" for n in (1, 2))
    spec = STAGE.spec.model_validate(
        {
            "dataset": "datasets/d",
            "target": {"revision": mine},
            "targets": [{"revision": other, "tools": True, "label": "with tools"}],
            "constrained": True,
            "not_worse": [{"than": other, "by": {"calls": 0}}, {"than": mine, "by": {"calls": 0}}],
        }
    )
    asked = find_targets(spec)
    assert [(a.label, a.role, a.address.wire.tools) for a in asked] == [
        ("with tools", "reference", True), ("d@r-2", "reference", False), ("d@r-1", "reference", False),
        ("d@r-1 (2)", "target", False), ("d@r-1, tools=", "constrained", True),
    ]  # fmt: skip
    assert [find_label(asked, than) for than in (other, mine, "with tools")] == ["d@r-2", "d@r-1", "with tools"]


def test_folders_that_a_spec_names_are_read_without_a_server(
    evaluate: Callable[..., Any], tmp_path: Path, model: Model
) -> None:
    _, before = evaluate("before", "before")
    write_bfcl(tmp_path / "bfcl", {**BFCL_ROW, "ground_truth": TRUTH})
    named = {"dataset": str(tmp_path / "data"), "bfcl": str(tmp_path / "bfcl"), "baseline": str(before)}
    (tmp_path / "spec.yaml").write_text(json.dumps({**named, "target": {"address": model.url, "model": "after"}}))
    arguments = ["evaluate", "--spec", str(tmp_path / "spec.yaml"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = read(tmp_path / "out")
    assert [c["role"] for c in report["columns"]] == ["baseline", "target"]
    assert [suite["name"] for suite in report["suites"]] == ["bfcl"]
    shutil.rmtree(tmp_path / "data")
    result = CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "again")])
    assert isinstance(result.exception, ApiError)
    assert f"dataset: there is nothing at {tmp_path / 'data'}" in str(result.exception)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"dataset": ""}, "give a dataset"),
        ({"gate": {"beauty": 0.5}}, "there is no metric beauty"),
        ({"gate": {"calls": 95}}, "parts from 0 to 1"),
        ({"not_worse": [{"than": "last week", "by": {"calls": 0.1}}]}, "'last week' is neither baseline"),
        ({"not_worse": [{"than": "baseline", "by": {}}]}, "at least 1 item"),
        ({"suites": ["speed"]}, "held_out"),
        ({"target": {"address": "http://a/v1", "model": "m", "api_key_variable": "sk-123"}}, "never the key itself"),
        (
            {"target": {"address": "http://host:port/v1", "model": "m"}},
            "'http://host:port/v1' is no address: Invalid port",
        ),
        *(
            ({"target": {"address": "http://a/v1", "model": "m", "api_key_variable": name}}, "ends in _API_KEY")
            for name in ("FABRICTUNE_S3_SECRET_KEY", "FABRICTUNE_X_API_KEY", "AWS_X_API_KEY", "HF_TOKEN", "PATH")
        ),
    ],
)
def test_specs_that_cannot_be_done_are_refused(spec: dict[str, Any], said: str) -> None:
    plain = {"dataset": "datasets/d", "target": {"address": "http://a/v1", "model": "m"}, **spec}
    with pytest.raises(ValueError, match=said):
        STAGE.spec.model_validate(plain)


def test_the_inputs_are_all_that_is_named() -> None:
    spec = STAGE.spec.model_validate(
        {
            "dataset": "datasets/d",
            "bfcl": "datasets/b",
            "baseline": "reports/r",
            "target": {"revision": "deployments/d/revisions/r"},
            "not_worse": [{"than": "baseline", "by": {"calls": 0}}, {"than": "reports/q", "by": {"calls": 0}}],
        }
    )
    assert STAGE.inputs(spec) == {
        "dataset": "datasets/d", "bfcl": "datasets/b", "baseline": "reports/r", "compared/1": "reports/q",
    }  # fmt: skip
