"""Lines of ms-swift become typed progress and one clear error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import FabrictuneError, InvalidSpec, ResourceExhausted, WorkerLost
from services.training.event_files import write_events
from services.training.plot import plot_loss, smooth
from services.training.progress import LineReader, Metrics, as_record, explain_failure, news_of, read_metrics


def _line(step: int, **more: Any) -> dict[str, Any]:
    return {
        **{"loss": 1.9, "grad_norm": 1.2, "learning_rate": 0.001, "token_acc": 0.67, "epoch": 0.5},
        **{"global_step/max_steps": f"{step}/10", "train_speed(s/it)": 2.0},
        **{"tokens": 1000 * step, "computing_seconds": 4.0 * step, "memory_bytes": 1 << 30, **more},
    }


def test_a_log_line_becomes_typed_progress() -> None:
    metrics, warnings = read_metrics(_line(1), Metrics())
    assert warnings == []
    assert as_record(metrics.progress) == {
        **{"unit": "steps", "step": 1, "total_steps": 10, "phase": "training", "epoch": 0.5, "loss": 1.9},
        **{"token_accuracy": 0.67, "learning_rate": 0.001, "grad_norm": 1.2, "tokens_per_second": 250.0},
        **{"memory_bytes": 1 << 30, "eta_seconds": 18.0},
    }


def test_speed_counts_the_tokens_since_the_line_before() -> None:
    first, _ = read_metrics(_line(1), Metrics())
    second, _ = read_metrics(_line(2, tokens=3000, computing_seconds=8.0), first)
    assert second.progress.tokens_per_second == 500.0


def test_the_first_line_of_a_resumed_run_says_nothing_of_speed() -> None:
    metrics, _ = read_metrics(_line(7, tokens=7000, computing_seconds=4.0), Metrics())
    assert metrics.progress.tokens_per_second is None


def test_a_loss_that_is_not_a_number_is_a_warning_and_no_figure() -> None:
    metrics, warnings = read_metrics(_line(3, loss=math.nan), Metrics())
    assert metrics.progress.loss is None
    assert "loss is nan at step 3" in warnings[0]


def test_a_validation_loss_that_stops_falling_is_a_warning_once() -> None:
    metrics, said = Metrics(), []
    for step, loss in enumerate((2.0, 1.0, 1.1, 1.2, 1.3, 1.4), 1):
        line = {"eval_loss": loss, "global_step/max_steps": f"{step}/10", "train_speed(s/it)": 1.0}
        metrics, warnings = read_metrics(line, metrics)
        said += warnings
    assert said == ["the validation loss has not improved for 3 evaluations (best: 1.0)"]


def test_ms_swifts_closing_line_changes_nothing() -> None:
    before = Metrics()
    assert read_metrics({"last_model_checkpoint": "x", "log_history": []}, before) == (before, [])


def test_a_line_that_is_not_finished_waits_for_the_next_read(tmp_path: Path) -> None:
    file = tmp_path / "log"
    reader = LineReader(file)
    assert list(reader.new_lines()) == []
    file.write_bytes(b"one\ntw")
    assert list(reader.new_lines()) == ["one"]
    file.write_bytes(b"one\ntwo\n")
    assert list(reader.new_lines()) == ["two"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[WARNING:swift] something odd", ("WARNING", "something odd")),
        ("[INFO:swift] Dataset Token Length: 80±3", ("INFO", "Dataset Token Length: 80±3")),
        ("[INFO:swift] args: …", None),
        ("[WARNING:swift] Loading model from '/m' with trust_remote_code=True.", None),
    ],
)
def test_people_see_the_lines_that_matter(line: str, said: tuple[str, str] | None) -> None:
    assert news_of(line) == said


TORCHRUN = """
============================================================
swift/cli/sft.py FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-24_23:14:44
  host      : training-two-nodes-0
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 26)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
""".splitlines()


@pytest.mark.parametrize(
    ("code", "output", "error", "words"),
    [
        (1, ["torch.OutOfMemoryError: CUDA out of memory. Tried …"], ResourceExhausted, "per_device_train_batch_size"),
        (1, ["RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried …"], ResourceExhausted, "max_length"),
        (1, ["OSError: [Errno 28] No space left on device"], ResourceExhausted, "disk is full"),
        (-9, [], ResourceExhausted, "killed, most likely for want of memory"),
        (1, ["ValueError: remaining_argv: ['--x']"], InvalidSpec, "spec.arguments"),
        (1, ["ValueError: Failed to automatically match `model_type` for …"], InvalidSpec, "spec.arguments.model_type"),
        (
            1,
            ["RuntimeError: [gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:4", *TORCHRUN],
            WorkerLost,
            "lost",
        ),
        (1, ["ValueError: remaining_argv: ['--x']", *TORCHRUN], InvalidSpec, "spec.arguments"),
        (3, ["Traceback (most recent call last):", '  File "x"', "KeyError: 'y'"], FabrictuneError, "KeyError: 'y'"),
    ],
)
def test_a_failed_child_is_one_error_that_says_what_to_do(
    code: int, output: list[str], error: type[FabrictuneError], words: str
) -> None:
    found = explain_failure(code, output)
    assert type(found) is error
    assert words in found.message
    assert "Traceback" not in found.message


def test_the_loss_curve_is_a_png_and_a_run_without_a_line_has_none(tmp_path: Path) -> None:
    records = [{"step": n, "loss": 2 / n} for n in range(1, 20)] + [{"step": 10, "loss": 0.2, "eval_loss": 0.3}]
    assert plot_loss(records, tmp_path / "loss.png", "a title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not plot_loss([], tmp_path / "none.png", "")
    assert not (tmp_path / "none.png").exists()


def test_tensorboard_reads_the_event_file_and_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    records = [{"step": 1, "loss": 2.0, "learning_rate": 0.5}, {"step": 1, "eval_loss": 1.5, "token_accuracy": 0.25}]
    assert write_events(records, tmp_path / "one") and write_events(records, tmp_path / "two")
    (file,) = (tmp_path / "one").iterdir()
    assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    events = [
        (e.step, v.tag, v.tensor.float_val[0]) for e in EventFileLoader(str(file)).Load() for v in e.summary.value
    ]
    assert events == [
        *((1, "train/loss", 2.0), (1, "train/learning_rate", 0.5)),
        *((1, "eval/loss", 1.5), (1, "eval/token_accuracy", 0.25)),
    ]
    assert not write_events([], tmp_path / "none") and not (tmp_path / "none").exists()


def test_smoothing_keeps_a_constant() -> None:
    assert smooth([2.0] * 5) == pytest.approx([2.0] * 5)
