"""Rows and models that cannot be trained are refused by name; checkpoints are whole or not used."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import DataLoss, FabrictuneError, FailedPrecondition, InvalidData, Unavailable
from services.common.reporter import Aside, Silent
from services.training import worker
from services.training.admission import check_model, hardware_here
from services.training.checkpoints import (
    CheckpointKeeper,
    check_resumable,
    choose,
    read_metrics_until,
    restore_best,
    weight_files,
)
from services.training.rows import read_rows
from services.training.spec import Spec
from services.training.swift import Command
from services.training.worker import account_for_rows
from tests.conftest import Recorder

GOOD = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def _write(file: Path, *rows: Any) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{broken", "line 2: not JSON"),
        ({"id": "a", "messages": []}, "at least one message"),
        ({"id": "a", "messages": [{"role": "tool", "content": "x"}]}, "row 'a': messages[0].role must be one of"),
        ({"id": "a", "messages": [{"role": "user", "content": None}]}, "messages[0].content must be text"),
        ({"id": "a", "messages": GOOD[:1]}, "the last message must be the assistant's"),
        ({"id": "a", "messages": [GOOD[0], {**GOOD[1], "loss": False}]}, "nothing in it is trained"),
        ({"id": "a", "messages": [GOOD[0], {**GOOD[1], "loss": "yes"}]}, "loss must be true or false"),
        ({"id": "a", "messages": GOOD, "tools": []}, "a tools key"),
    ],
)
def test_a_row_that_cannot_be_trained_is_refused_with_its_line_number(tmp_path: Path, row: Any, words: str) -> None:
    file = _write(tmp_path / "train.jsonl", {"id": "ok", "messages": GOOD}, row)
    with pytest.raises(InvalidData, match="1 rows cannot be trained on") as caught:
        read_rows(file)
    assert words in caught.value.message
    assert "line 2" in caught.value.message


def test_a_row_that_is_not_utf_8_is_refused_with_its_line_number(tmp_path: Path) -> None:
    file = _write(tmp_path / "train.jsonl", {"id": "ok", "messages": GOOD})
    file.write_bytes(file.read_bytes() + b'{"id": "\xff"}\n')
    with pytest.raises(InvalidData, match="line 2: not UTF-8"):
        read_rows(file)


def test_rows_that_ms_swift_lost_without_a_word_are_an_error(tmp_path: Path) -> None:
    rows = read_rows(_write(tmp_path / "train.jsonl", *({"id": f"r{n}", "messages": GOOD} for n in range(3))))
    assert account_for_rows(rows, 3, tmp_path, "train", Silent()) == []
    with pytest.raises(FabrictuneError, match="1 are unaccounted for"):
        account_for_rows(rows, 2, tmp_path, "train", Silent())


def test_the_end_of_ms_swifts_output_outlives_a_run_that_failed(
    tmp_path: Path, reporter: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model := tmp_path / "model").mkdir()
    for name, text in (("config.json", "{}"), ("vocab.json", "{}"), ("model.safetensors", "")):
        (model / name).write_text(text)
    _write(tmp_path / "train.jsonl", {"id": "r1", "messages": GOOD})
    (output := tmp_path / "output").mkdir()
    failing = Command([sys.executable, "-c", "for n in range(300): print('line', n)\nraise SystemExit(3)"])
    monkeypatch.setattr(worker, "plan_sft", lambda *_: failing)
    spec = Spec.model_validate({"dataset": "datasets/d", "base_model": "models/m"})
    with pytest.raises(FabrictuneError, match="ended with code 3; the job's log has the end of its output"):
        worker.run(spec, {"dataset": tmp_path, "base_model": model}, output, reporter)
    severity, told = reporter.lines[-1]
    assert severity == "ERROR"
    assert [told.count(f"line {n}\n") for n in (99, 100, 298)] == [0, 1, 1]
    assert told.endswith("line 299")
    assert not list(output.iterdir()), "nor is anything left that looks like an adapter"


def test_a_further_node_says_it_where_the_cluster_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.log").write_text("RuntimeError: NCCL\n")
    worker.tell_end_of_output(tmp_path, Aside())
    assert "RuntimeError: NCCL" in capsys.readouterr().err


def _model(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_base_model_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"no config\.json"):
        check_model(tmp_path, trusted=False)
    (_model(tmp_path) / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InvalidData, match=r"no \.safetensors file"):
        check_model(tmp_path, trusted=False)


def test_a_base_model_with_code_runs_only_when_the_spec_says_so(tmp_path: Path) -> None:
    (_model(tmp_path, auto_map={"AutoConfig": "x.Y"}) / "model.safetensors").write_bytes(b"")
    with pytest.raises(FailedPrecondition, match="trust_remote_code: true"):
        check_model(tmp_path, trusted=False)
    check_model(tmp_path, trusted=True)


def test_a_tokenizer_with_code_counts_as_much(tmp_path: Path) -> None:
    (_model(tmp_path) / "model.safetensors").write_bytes(b"")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Y", null]}}')
    with pytest.raises(FailedPrecondition, match=r"auto_map in tokenizer_config\.json"):
        check_model(tmp_path, trusted=False)
    check_model(tmp_path, trusted=True)


def test_more_gpus_than_there_are_is_an_error_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    spec = Spec.model_validate({"dataset": "datasets/d", "base_model": "models/m", "resources": {"gpus": 8}})
    with pytest.raises(FailedPrecondition, match="asks for 8 GPUs on a node, and 0 can be seen"):
        hardware_here(spec)


def _checkpoint(run: Path, step: int, best_step: int | None = None) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text(str(step))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_global_step": best_step}))
    return folder


class _Store(Silent):
    """Keeps what it is handed, or is down."""

    def __init__(self, kept: Path, down: bool = False) -> None:
        self.kept, self.down, self.said = kept, down, [""]

    def log(self, text: str, severity: str = "INFO") -> None:
        self.said.append(f"{severity} {text}")

    def checkpoint(self, step: int, folder: Path) -> None:
        if self.down:
            raise Unavailable("the store is down")
        folder.rename(self.kept / str(step))


def test_a_kept_checkpoint_survives_its_deletion_by_training_and_carries_the_best_adapter(tmp_path: Path) -> None:
    run, held, kept = tmp_path / "run", tmp_path / "held", tmp_path / "kept"
    kept.mkdir()
    held.mkdir()
    _checkpoint(run, 2)
    _checkpoint(run, 4, best_step=2)
    keeper = CheckpointKeeper(run, held, _Store(kept))
    keeper.keep(4, 2)
    keeper.keep(6, 2)  # already deleted
    keeper.close()
    assert check_resumable(kept / "4") == 4
    again = tmp_path / "again"
    again.mkdir()
    restore_best(kept / "4", again)
    assert (again / "checkpoint-2" / "adapter_model.safetensors").read_text() == "2"
    assert list(held.iterdir()) == []


def test_a_kept_checkpoint_carries_the_metrics_up_to_its_step(tmp_path: Path) -> None:
    run, held, kept = tmp_path / "run", tmp_path / "held", tmp_path / "kept"
    for folder in (held, kept):
        folder.mkdir()
    _checkpoint(run, 2)
    keeper = CheckpointKeeper(run, held, _Store(kept))
    keeper.keep(2, None, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.5}])
    keeper.close()
    assert read_metrics_until(kept / "2", 2) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert read_metrics_until(None, 2) == [] == read_metrics_until(_checkpoint(tmp_path / "old", 4), 4)


def test_a_checkpoint_of_full_training_is_its_weights_and_config(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path, 2)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    with pytest.raises(InvalidData, match=r"adapter_model\.safetensors is missing"):
        check_resumable(folder)
    for name in ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (folder / name).write_text("{}")
    assert weight_files(folder) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert check_resumable(folder) == 2


def test_a_store_that_is_down_does_not_end_the_training(tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    _checkpoint(tmp_path / "run", 2)
    store = _Store(tmp_path, down=True)
    keeper = CheckpointKeeper(tmp_path / "run", tmp_path / "held", store)
    keeper.keep(2, None)
    keeper.close()
    assert "WARNING the checkpoint of step 2 could not be kept" in store.said[-1]


def test_the_best_checkpoint_is_chosen_unless_the_last_is_wanted(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 2)
    _checkpoint(tmp_path, 4, best_step=2)
    assert choose(tmp_path, None, "best", 4) == (2, tmp_path / "checkpoint-2")
    assert choose(tmp_path, None, "last", 4) == (4, tmp_path / "checkpoint-4")


def test_the_mean_is_chosen_where_it_is_wanted_and_there(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 2)
    folder = _checkpoint(tmp_path, 4, best_step=2)
    assert choose(tmp_path, None, "mean", 4) == (4, folder), "a checkpoint of a job that kept no mean"
    (folder / "mean").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "mean" / name).write_text("{}")
    assert choose(tmp_path, None, "mean", 4) == (4, folder / "mean")
    assert choose(tmp_path, folder, "mean", None) == (4, folder / "mean")


def test_a_resumed_run_with_nothing_left_to_do_takes_its_checkpoint(tmp_path: Path) -> None:
    before = _checkpoint(tmp_path / "before", 4)
    assert choose(tmp_path, before, "best", None) == (4, before)


def test_half_a_checkpoint_is_never_used(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path, 2)
    (folder / "trainer_state.json").write_text("{")
    with pytest.raises(DataLoss, match="cannot be read"):
        check_resumable(folder)
    (folder / "optimizer.pt").unlink()
    with pytest.raises(InvalidData, match=r"optimizer\.pt is missing"):
        check_resumable(folder)
