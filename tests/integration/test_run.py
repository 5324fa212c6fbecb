"""The whole way as a user goes it: the real command, real services, store, training and vLLM, on a handful of rows.

One stack and one run serve all tests of this file; they stand in the order in which a user would do these things.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.heavy, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("run")]
SMALL: dict[str, Any] = {
    "conversion": {
        "sources": [{"uri": "train.jsonl", "split": "train"}, {"uri": "test.jsonl", "split": "test"}],
        "summaries": 0.2,
        "questions": {"min": 1, "max": 2},
    },
    "training": {
        "base_model": "models/smollm2-135m-instruct",
        "preset": "smollm2-cpu",
        "arguments": {"max_steps": 2, "save_steps": 1, "num_train_epochs": 1},
    },
    "evaluation": {"limit": 6, "max_tokens": 16},
    "deployment": {"deployment": "deployments/quickstart", "spec": {"max_model_len": 1024}},
}


class Here:
    """A folder with rows and a data directory, in which the command is called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, count in (("train", 8), ("test", 6)):
            lines = (ROOT / f"examples/data/{name}.jsonl").read_text(encoding="utf-8").splitlines()
            ordered = sorted(lines, key=len)
            kinds = ('"kind": "call"', '"kind": "nocall"')
            short = [line for kind in kinds for line in [line for line in ordered if kind in line][: count // 2]]
            (folder / f"{name}.jsonl").write_text("\n".join(short) + "\n", encoding="utf-8")
        ports = {f"FABRICTUNE_{k}PORT": "0" for k in ("", "GATEWAY_", "METRICS_")}
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("FABRICTUNE_")} | ports
        self.env |= {"FABRICTUNE_DATA_DIR": str(folder / "data"), "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}

    def call(self, *arguments: str, status: int = 0) -> str:
        """Run the command; returns stdout. Fails on another exit status."""
        argv = [sys.executable, "-m", "fabrictune", *arguments]
        done = subprocess.run(argv, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == status, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout if status == 0 else done.stderr

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """The command in the background; what it prints goes to `said.txt`."""
        argv = [sys.executable, "-m", "fabrictune", *arguments]
        with (self.folder / "said.txt").open("wb") as said:
            # What was started with `&` by a script ignores Ctrl-C, and so do its children.
            return subprocess.Popen(
                argv, cwd=self.folder, env=self.env, stdout=said, stderr=said, preexec_fn=_heed_ctrl_c
            )

    def json(self, *arguments: str) -> Any:
        return json.loads(self.call("--json", *arguments))

    def write(self, name: str, spec: dict[str, Any]) -> str:
        (self.folder / name).write_text(yaml.safe_dump(spec))
        return name

    def processes(self) -> list[psutil.Process]:
        """All that was started from here and lives."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("FABRICTUNE_DATA_DIR") == self.env["FABRICTUNE_DATA_DIR"]:
                    found.append(process)
            except psutil.Error:
                continue
        return [p for p in found if p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    here = Here(tmp_path_factory.mktemp("run"))
    try:
        yield here
    finally:
        here.call("down")
        assert here.processes() == []


@pytest.fixture(scope="module")
def told(here: Here) -> str:
    """What the first run prints."""
    return here.call("run", here.write("small.yaml", SMALL), "--up", "--id", "first")


def test_the_run_ends_with_before_and_after_and_how_to_use_the_model(here: Here, told: str) -> None:
    for text in ("before", "after", "calls a tool", "95 % intervals", "curl http://127.0.0.1:", "model_config.json"):
        assert text in told, told
    assert "✓ pipelineRuns/first" in told
    table = told.partition("held-out questions")[2].partition("A question about tools")[0]
    assert len(table.splitlines()) > 10
    assert max(map(len, table.splitlines())) <= 80
    stages = here.json("jobs", "get", "pipelineRuns/first")["stages"]
    assert [s["stage"] for s in stages] == [
        "conversion", "training", "merging", "evaluation-before", "evaluation-after", "deployment",
    ]  # fmt: skip
    assert {s["execution"]["state"] for s in stages} == {"SUCCEEDED"}


def test_watching_a_training_shows_its_figures(here: Here, told: str) -> None:
    jobs = {j["name"]: j for j in here.json("jobs", "list")}
    name = next(n for n in jobs if n.startswith("trainingJobs/"))
    lines = [json.loads(line) for line in here.call("--json", "jobs", "watch", name).splitlines()]
    progress = [e["progress"] for e in lines if "progress" in e]
    steps = [p for p in progress if p.get("loss")]
    assert sorted({int(p["step"]) for p in steps}) == [1, 2]
    assert all(int(p["total_steps"]) == 2 and p["tokens_per_second"] > 0 and p["memory_bytes"] for p in steps)
    assert "eta" in steps[0]
    assert any("log" in e for e in lines)


def test_lineage_ends_at_the_rows(here: Here, told: str) -> None:
    found = {a["name"]: a for a in here.json("lineage", "deployments/quickstart")}
    rows = [a for a in found.values() if a["kind"] == "rows"]
    assert len(rows) == 2
    assert {f["sha256"] for a in rows for f in a["files"]} == {
        _sha256(here.folder / f"{n}.jsonl") for n in ("train", "test")
    }
    assert rows[0]["digest"][:12] in here.call("lineage", "deployments/quickstart")


def test_the_endpoint_answers_curl_and_chat(here: Here, told: str) -> None:
    deployment = here.json("deployments")[0]
    body = {"model": "quickstart", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    answer = httpx.post(f"{deployment['address']}/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"]
    assert here.call("chat", "--message", "Hello", "--max-tokens", "8").strip()


def test_traffic_is_told_and_moved_by_the_command(here: Here, told: str) -> None:
    name = here.json("deployments")[0]["name"]
    [(revision, percent)] = here.json("traffic", name)["traffic"].items()
    assert percent == 100
    assert f"{revision} 100 %" in here.call("traffic", name, f"{revision}=100")
    assert "there is no such revision" in here.call("traffic", name, "nobody=100", status=64)


def test_a_second_run_does_nothing_again(here: Here, told: str) -> None:
    before = {j["name"] for j in here.json("jobs", "list")}
    begin = time.monotonic()
    here.call("run", "small.yaml", "--up", "--id", "second")
    assert time.monotonic() - begin < 120
    assert {j["name"] for j in here.json("jobs", "list")} - before == {"pipelineRuns/second"}
    stages = here.json("jobs", "get", "pipelineRuns/second")["stages"]
    assert all(s.get("reused") for s in stages if s["stage"] != "deployment")


def test_a_missed_gate_fails_the_run_with_the_numbers_and_keeps_the_report(here: Here, told: str) -> None:
    spec = {**SMALL, "evaluation": {**SMALL["evaluation"], "gate": {"exact_arguments": 1.0}}}
    said = here.call("run", here.write("gate.yaml", spec), "--id", "gated", status=78)
    assert "exact_arguments: " in said
    assert "the gate asks for 100.0%" in said
    run = here.json("jobs", "get", "pipelineRuns/gated")
    assert run["execution"]["error"]["details"][0]["reason"] == "GATE_NOT_MET"
    assert [s["stage"] for s in run["stages"]][-1] == "evaluation-after"
    assert len(here.json("artifacts", "ls", "reports")) >= 3
    assert len(here.json("deployments")[0]["revisions"]) == 1  # what was served before is served still


def test_a_missed_gate_can_be_forced_and_the_deployments_lineage_tells_it(here: Here, told: str) -> None:
    here.call("run", "gate.yaml", "--force", "--id", "forced")
    run = here.json("jobs", "get", "pipelineRuns/forced")
    stage = run["stages"][-2]
    assert (stage["stage"], stage["execution"]["state"]) == ("evaluation-after", "SUCCEEDED")
    assert stage["execution"]["error"]["details"][0]["reason"] == "GATE_NOT_MET"
    lineage = here.json("lineage", "deployments/quickstart")
    root = lineage[0]
    assert root["metadata"]["forced"] is True
    assert root["created_by"]["job"] == "pipelineRuns/forced"
    assert stage["output"] in [i["name"] for i in root["created_by"]["inputs"]]
    assert "deployed by force" in here.call("lineage", "deployments/quickstart").replace("\n", " ")
    here.call("run", "small.yaml", "--id", "unforced")
    assert "metadata" not in here.json("lineage", "deployments/quickstart")[0]


def test_folders_and_ctrl_c_leave_nothing_half(here: Here, told: str) -> None:
    dataset = next(a["name"] for a in here.json("artifacts", "ls", "datasets") if a["kind"] == "dataset")
    here.call("artifacts", "pull", dataset, "dataset")
    here.call("artifacts", "pull", "models/smollm2-135m-instruct", "base")
    argv = ["train", "dataset", "--model", "base", "--preset", "smollm2-cpu", "--output", "adapter"]
    process = here.start(*argv, "--set", "max_steps=500")
    _wait(lambda: list(here.folder.glob(".adapter-*/.work/run/logging.jsonl")))
    process.send_signal(signal.SIGINT)
    assert process.wait(120) in (130, 143)
    assert not list(here.folder.glob("*adapter*"))


def test_swift_export_merges_to_the_same_weights(here: Here, told: str) -> None:
    adapter = next(a["name"] for a in here.json("artifacts", "ls", "adapters") if a["kind"] == "adapter")
    for name, folder in ((adapter, "one"), ("models/smollm2-135m-instruct", "whole")):
        here.call("artifacts", "pull", name, folder)
    for engine in ("swift", "stream"):
        here.call("merge", "--model", "whole", "--adapter", "one", "--engine", engine, "--output", f"by-{engine}")
    from safetensors.torch import load_file  # numpy does not know bfloat16 by itself

    ours, swifts = (load_file(here.folder / f"by-{engine}" / "model.safetensors") for engine in ("stream", "swift"))
    assert ours.keys() == swifts.keys() and all((ours[name] == swifts[name]).all() for name in ours)


def test_a_folder_is_served_in_the_foreground_until_ctrl_c(here: Here, told: str) -> None:
    if not (here.folder / "base").exists():
        here.call("artifacts", "pull", "models/smollm2-135m-instruct", "base")
    spec = here.write("spec.yaml", {"max_model_len": 1024})
    options = ("deploy", "base", "--as", "small", "--spec", spec, "--port", "0")
    plan = here.call(*options, "--dry-run")
    assert "small would be served" in plan and "--max-model-len 1024" in plan
    process = here.start(*options)
    said = here.folder / "said.txt"
    _wait(lambda: process.poll() is not None or "is served at" in said.read_text())
    assert process.poll() is None, said.read_text()
    address = re.search(r"http://127\.0\.0\.1:\d+/v1", said.read_text())
    assert address
    body = {"model": "small", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    assert httpx.post(f"{address[0]}/chat/completions", json=body, timeout=60).status_code == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    _wait(lambda: not any(str(here.folder / "base") in p.cmdline() for p in here.processes()))


def test_ctrl_c_cancels_a_run_and_its_job(here: Here, told: str) -> None:
    spec = {"conversion": SMALL["conversion"], "training": {**SMALL["training"], "arguments": {"max_steps": 501}}}
    process = here.start("run", here.write("long.yaml", spec), "--id", "long")
    _wait(lambda: any(j["name"] == "pipelineRuns/long" for j in here.json("jobs", "list")))
    job = _wait(lambda: _stage(here, "long", "training").get("job"))
    _wait(lambda: _step(here, job) >= 1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    _wait(lambda: here.json("jobs", "get", job)["execution"]["state"] == "CANCELLED")
    _wait(lambda: here.json("jobs", "get", "pipelineRuns/long")["execution"]["state"] == "CANCELLED")
    _wait(lambda: not any("services.training.worker" in p.cmdline() for p in here.processes()))


def test_a_run_outlives_kill_9_of_up_in_mid_training(here: Here, told: str) -> None:
    spec = {k: v for k, v in SMALL.items() if k in ("conversion", "training")}
    spec["training"] = {**SMALL["training"], "arguments": {"max_steps": 8, "save_steps": 2}}
    here.call("run", here.write("killed.yaml", spec), "--id", "killed", "--detach")
    job = _wait(lambda: _stage(here, "killed", "training").get("job"))
    _wait(lambda: _step(here, job) >= 1)
    pid = json.loads((here.folder / "data/up.json").read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    here.call("up", "--detach")
    ended = _wait(
        lambda: (r := here.json("jobs", "get", "pipelineRuns/killed"))["execution"]["state"] != "RUNNING" and r, 600
    )
    assert ended["execution"]["state"] == "SUCCEEDED"
    conversion, training = ended["stages"][0], ended["stages"][1]
    assert conversion["reused"]
    # The worker went on by itself, or was begun again once; either way what was finished was not done a second time.
    assert here.json("jobs", "get", training["job"])["execution"]["attempt"] <= 2
    assert here.json("artifacts", "get", ended["stages"][-1]["output"])["kind"] == "model"


def test_down_leaves_nothing_running(here: Here, told: str) -> None:
    here.call("down")
    assert here.processes() == []
    assert "nothing was running" in here.call("down")


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stage(here: Here, run: str, stage: str) -> dict[str, Any]:
    stages = here.json("jobs", "get", f"pipelineRuns/{run}").get("stages", [])
    return next((s for s in stages if s["stage"] == stage), {})


def _step(here: Here, job: str) -> int:
    return int(
        here.json("jobs", "get", job)["execution"].get("progress", {}).get("step", 0)
    )  # JSON of an int64 is text


def _wait(ask: Any, seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := ask()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.5)
    return found


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
