"""The command without any server: help that teaches, and one clear error for each kind of bad input."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fabrictune.cli import app
from fabrictune.cli.chat import read_tools
from fabrictune.cli.context import print_message
from fabrictune.cli.progress import new_progress, show_progress
from fabrictune.cli.specs import parse_setting
from fabrictune.client.calls import Calls
from fabrictune.client.jobs import Jobs
from fabrictune.errors import ApiError
from fabrictune.v1 import job_pb2
from services.common.errors import WorkerLost
from tests.merging_files import write_adapter, write_base

COMMANDS = [
    [], ["up"], ["down"], ["doctor"], ["run"], ["convert"], ["train"], ["merge"], ["evaluate"], ["deploy"], ["undeploy"],
    ["deployments"], ["chat"], ["agentfabric", "config"], ["jobs", "list"], ["jobs", "get"], ["jobs", "watch"],
    ["jobs", "cancel"], ["jobs", "logs"], ["jobs", "resume"], ["jobs", "delete"], ["models", "list"], ["models", "import"],
    ["datasets", "list"], ["datasets", "from-traffic"], ["artifacts", "ls"], ["artifacts", "get"], ["artifacts", "pull"],
    ["artifacts", "push"], ["artifacts", "rm"], ["lineage"], ["tokens", "new"], ["connect"],
]  # fmt: skip
NOBODY = "127.0.0.1:9"


def call(*arguments: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("FABRICTUNE_")} | {"COLUMNS": "100"} | more
    argv = [sys.executable, "-m", "fabrictune", *arguments]
    return subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert len(result.output.split()) > 10


@pytest.mark.parametrize(
    ("name", "text", "status", "said"),
    [
        ("missing.yaml", None, 66, "missing.yaml cannot be read"),
        ("broken.yaml", "a: [", 64, "broken.yaml is not YAML"),
        ("list.yaml", "- a", 64, "must hold a mapping"),
    ],
)
def test_bad_yaml(tmp_path: Path, name: str, text: str | None, status: int, said: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    done = call("run", name, folder=tmp_path)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (None, "NOT_FOUND", "tools.json cannot be read"),
        ("[", "INVALID_ARGUMENT", "tools.json is not JSON"),
        ('{"name": "f"}', "INVALID_ARGUMENT", "must hold a list of tools"),
        ('[{"type": "function", "function": {}}]', "INVALID_ARGUMENT", "must hold a list of tools"),
    ],
)
def test_a_file_of_tools_that_cannot_be_used_is_refused(tmp_path: Path, text: str | None, code: str, said: str) -> None:
    file = tmp_path / "tools.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ApiError, match=said) as caught:
        read_tools(file)
    assert caught.value.code == code


def test_tools_may_be_written_with_and_without_their_type(tmp_path: Path) -> None:
    bare = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    whole = {"type": "function", "function": bare}
    (tmp_path / "tools.json").write_text(json.dumps([bare, whole]))
    assert read_tools(tmp_path / "tools.json") == [whole, whole]


def test_a_command_imports_what_only_others_need_not_at_all() -> None:
    others = {"grpc", "httpx", "yaml", "numpy", "pydantic", "services"}
    ask = f"import sys, fabrictune.cli; print(sorted({others} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout == "[]\n"


def test_json_errors(tmp_path: Path) -> None:
    done = call("run", "missing.yaml", "--json", folder=tmp_path)
    assert "missing.yaml" in json.loads(done.stderr)["error"]["message"]


def test_no_server(tmp_path: Path) -> None:
    done = call("--endpoint", NOBODY, "jobs", "list", folder=tmp_path)
    assert done.returncode == 75
    assert "`fabrictune up`" in done.stderr


def test_weights_that_are_none_are_all_named(tmp_path: Path) -> None:
    result = call("traffic", "deployments/x", "r1", "r2=many", "r3=50", folder=tmp_path)
    assert result.returncode == 64 and "r1, r2=many: must be REVISION=PERCENT" in result.stderr


def test_an_unknown_command_and_option(tmp_path: Path) -> None:
    assert call("trian", folder=tmp_path).returncode == 2
    done = call("convert", "--bogus", "x", folder=tmp_path)
    assert done.returncode == 2
    assert "--bogus" in done.stderr


def test_a_data_set_with_no_valid_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("nothing\n")
    done = call("convert", "rows.jsonl", "--output", "out", folder=tmp_path)
    assert done.returncode == 65
    assert "no row is left to train on" in done.stderr
    assert "rows.jsonl line 1" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_preview_of_a_file_needs_no_server_and_writes_nothing(tmp_path: Path) -> None:
    row = {"id": "row-1", "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\nnothing\n")
    preview = ("--endpoint", NOBODY, "convert", "rows.jsonl", "--format", "chat", "--preview", "5")
    done = call(*preview, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rows.jsonl line 1 · row-1" in done.stdout
    assert "INVALID_JSON" in done.stdout
    shown = json.loads(call(*preview, "--json", folder=tmp_path).stdout)["rows"]
    assert [r.get("refusal", {}).get("code") for r in shown] == [None, "INVALID_JSON"]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_preview_of_what_is_not_there_and_of_a_wrong_spec(tmp_path: Path) -> None:
    assert call("convert", "rows.jsonl", "--preview", "5", folder=tmp_path).returncode == 66
    assert call("convert", "rows.jsonl", "--preview", "51", folder=tmp_path).returncode == 2
    (tmp_path / "rows.jsonl").write_text("{}\n")
    done = call("convert", "rows.jsonl", "--preview", "5", "--layout", "sideways", folder=tmp_path)
    assert done.returncode == 64
    assert "spec.sources[0].layout" in done.stderr


def test_an_output_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("keep")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    done = call("convert", "rows.jsonl", "--output", "out", folder=tmp_path)
    assert done.returncode == 64
    assert "out exists and is not empty" in done.stderr
    assert (tmp_path / "out/mine").read_text() == "keep"


def test_an_unknown_preset_and_argument(tmp_path: Path) -> None:
    for name in ("data", "base"):
        (tmp_path / name).mkdir()
    train = ("train", "data", "--model", "base", "--output", "out")
    done = call(*train, "--preset", "nope", folder=tmp_path)
    assert done.returncode == 64
    assert "there is no preset 'nope'; there are" in done.stderr
    done = call(*train, "--set", "learning_rat=1", "--set", "deepspeed=zero3", folder=tmp_path)
    assert done.returncode == 64
    assert "did you mean 'learning_rate'?" in done.stderr
    assert "deepspeed" in done.stderr


@pytest.mark.parametrize("setting", ["target_modules=[q_proj", "system=*x", "run_name=2024-13-45"])
def test_a_setting_that_is_no_yaml_is_named(setting: str) -> None:
    with pytest.raises(ApiError, match=re.escape(f"--set {setting!r}: the value is not YAML")):
        parse_setting(setting)


@pytest.mark.parametrize(("text", "status"), [("arguments:", 0), ("arguments: [1]", 64), ("resources: 3", 64)])
def test_options_are_added_to_a_section_that_is_a_mapping_or_empty(tmp_path: Path, text: str, status: int) -> None:
    (tmp_path / "spec.yaml").write_text(text)
    _trainable(tmp_path)
    train = ("train", "data", "--model", "base", "--output", "out", "--dry-run", "--spec", "spec.yaml")
    done = call(*train, "--set", "lora_rank=8", "--gpus", "1", folder=tmp_path)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert status == 0 or "must be a mapping" in done.stderr


def test_a_dry_run_says_all_that_is_wrong_with_the_folders(tmp_path: Path) -> None:
    for name in ("data", "base", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "data/train.jsonl").write_bytes(b'{"id": "\xff"}\n')
    dry = ("--output", "out", "--dry-run")
    done = call("train", "data", "--model", "base", *dry, folder=tmp_path)
    assert done.returncode == 65, done.stderr
    assert "no .safetensors file" in done.stderr and "line 1: not UTF-8" in done.stderr
    done = call("merge", "--model", "base", "--adapter", "empty", *dry, folder=tmp_path)
    assert done.returncode == 65 and "empty is no adapter" in done.stderr
    done = call("convert", "empty", *dry, folder=tmp_path)
    assert done.returncode == 65 and "empty has no rows files" in done.stderr
    _trainable(tmp_path)
    write_base(tmp_path / "model")
    write_adapter(tmp_path / "adapter")
    for good in (
        ("train", "data", "--model", "base"),
        ("merge", "--model", "model", "--adapter", "adapter"),
        ("convert", "data"),
    ):
        done = call(*good, *dry, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()


def _trainable(folder: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    for name in ("data", "base"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "data/train.jsonl").write_text(json.dumps({"id": "r1", "messages": messages}) + "\n")
    for name, text in (("config.json", "{}"), ("vocab.json", "{}"), ("model.safetensors", "")):
        (folder / "base" / name).write_text(text)


@pytest.mark.parametrize("dry", [("--dry-run",), ()])
def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path, dry: tuple[str, ...]) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    done = call("convert", "rows.jsonl", "--output", "rows.jsonl/below/out", *dry, folder=tmp_path)
    assert done.returncode == 78
    assert "rows.jsonl/below/out cannot be made: " in done.stderr and "rows.jsonl is a file" in done.stderr


def test_an_output_where_nobody_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    done = call("convert", "rows.jsonl", "--output", "/proc/nowhere/out", folder=tmp_path)
    assert done.returncode == 78
    assert "/proc/nowhere/out cannot be made: " in done.stderr and "Traceback" not in done.stderr


def test_a_base_model_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "base/pytorch_model.bin").write_bytes(b"x")
    done = call("deploy", "base", folder=tmp_path)
    assert done.returncode == 65, done.stderr
    assert "no *.safetensors" in done.stderr
    (tmp_path / "adapter").mkdir()
    done = call("merge", "--model", "base", "--adapter", "adapter", "--output", "out", folder=tmp_path)
    assert done.returncode == 65, done.stderr
    assert not (tmp_path / "out").exists()


def test_merging_several_adapters_and_what_is_said_of_their_weights(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    names = [write_adapter(tmp_path / name).name for name in ("one", "two")]
    merge = ("merge", "--model", "base", *(word for name in names for word in ("--adapter", name)))
    done = call(*merge, "--weight", "0.5", "--output", "out", folder=tmp_path)
    assert done.returncode == 64
    assert "2 --adapter need as many --weight, not 1" in done.stderr
    done = call(*merge, "--stream", "--output", "out", folder=tmp_path)
    assert "--stream is from store to store" in done.stderr
    weights = ("--weight", "0.5", "--weight", "-1", "--combine", "cat", "--chat-template", "chatml")
    done = call(*merge, *weights, "--output", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/a.safetensors").stat().st_size == (tmp_path / "base/a.safetensors").stat().st_size
    assert "<|im_start|>" in (tmp_path / "out/chat_template.jinja").read_text()


def test_up_with_bad_settings_says_all_of_them(tmp_path: Path) -> None:
    env_port = call("up", "--port", "70000", folder=tmp_path)
    assert env_port.returncode == 64
    assert "FABRICTUNE_PORT" in env_port.stderr
    open_host = call("up", "--host", "0.0.0.0", "--port", "0", folder=tmp_path, FABRICTUNE_GATEWAY_PORT="0")
    assert open_host.returncode == 78
    assert "refusing to listen on 0.0.0.0" in open_host.stderr


def test_a_store_that_is_down(tmp_path: Path) -> None:
    done = call("up", "--s3-endpoint", "http://127.0.0.1:9", "--port", "0", folder=tmp_path)
    assert done.returncode == 75
    assert "http://127.0.0.1:9" in done.stderr
    assert "is it running?" in done.stderr


def test_tokens_are_shown_once_and_kept_as_hashes(tmp_path: Path) -> None:
    done = call("tokens", "new", "ann", "--role", "viewer", folder=tmp_path)
    token = done.stdout.strip().partition("=")[2]
    assert token.startswith("ft_")
    file = tmp_path / "tokens.yaml"
    assert token not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert call("tokens", "new", "ann", folder=tmp_path).returncode == 64
    assert call("tokens", "new", "bob", "--role", "king", folder=tmp_path).returncode == 64


def test_doctor_says_what_it_found(tmp_path: Path) -> None:
    done = call("doctor", "--json", folder=tmp_path)
    found = {f["what"]: f for f in json.loads(done.stdout)}
    assert found["Python"]["fine"]
    assert {"packages", "memory", "disk", "GPU", "server"} <= set(found)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        unhappy = call("doctor", folder=tmp_path, FABRICTUNE_PORT=port)
    assert unhappy.returncode == 1
    assert "set FABRICTUNE_PORT (0 takes a free one)" in unhappy.stdout


@pytest.mark.parametrize("taken", ["--port", "--gateway-port", "--metrics-port"])
def test_a_port_in_use_leaves_nothing_running(tmp_path: Path, taken: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        ports = {"--port": "0", "--gateway-port": "0", "--metrics-port": "0"} | {taken: port}
        done = call("up", *(part for pair in ports.items() for part in pair), folder=tmp_path)
    assert done.returncode in (75, 78), done.stderr
    assert port in done.stderr
    assert "FABRICTUNE_" in done.stderr
    assert "Traceback" not in done.stderr
    note = json.loads((tmp_path / ".fabrictune/store/weed.json").read_text())
    assert not psutil.pid_exists(note["pid"])
    assert not (tmp_path / ".fabrictune/up.json").exists()


def test_a_phase_that_counts_nothing_leaves_the_bar_where_it_is() -> None:
    said = io.StringIO()
    display = new_progress(Console(file=said, width=100))
    task = display.add_task("job", total=None, figures="")
    show_progress(display, task, job_pb2.Progress(unit="steps", step=4, total_steps=4, phase="training"))
    show_progress(display, task, job_pb2.Progress(unit="files", phase="uploading"))
    assert said.getvalue().splitlines() == ["job  4/4  training", "job  4/4  uploading"]


def test_a_failed_job_is_shown_with_the_details_of_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    job = job_pb2.Execution()
    job.error.CopyFrom(WorkerLost("its node has gone").to_status())
    print_message(job)
    assert "reason: WORKER_LOST" in capsys.readouterr().out


def test_only_jobs_that_keep_something_can_be_resumed() -> None:
    with grpc.insecure_channel(NOBODY) as channel:
        merges = Jobs(Calls(channel, NOBODY), "merging")
        with pytest.raises(ApiError, match="mergeJobs/m1 cannot be resumed; only trainings and evaluations keep"):
            merges.resume("mergeJobs/m1")
