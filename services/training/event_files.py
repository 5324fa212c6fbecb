"""metrics.jsonl as a TensorBoard event file: `tensorboard --logdir` of pulled adapters shows their runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TAGS: Mapping[str, str] = {
    # metrics.jsonl → TensorBoard's tag; the groups are those of transformers' own callback
    "loss": "train/loss",
    "token_accuracy": "train/token_accuracy",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "epoch": "train/epoch",
    "tokens_per_second": "train/tokens_per_second",
    "memory_bytes": "train/memory_bytes",
}
_EVALUATION: Mapping[str, str] = {"eval_loss": "eval/loss", "token_accuracy": "eval/token_accuracy"}


def write_events(records: Sequence[Mapping[str, Any]], folder: Path) -> bool:
    """One event file with the scalars of every step; False: there was nothing to write.

    records: lines of metrics.jsonl. Times are the steps' numbers, since metrics.jsonl keeps none: the same run gives the
    same bytes.
    """
    if not records:
        return False
    # TensorBoard's own writer starts a thread and puts host and process into the file's name.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder.mkdir()
    with (folder / "events.out.tfevents.0.fabrictune").open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())
        for record in records:
            tags = _EVALUATION if "eval_loss" in record else _TAGS
            values = [Summary.Value(tag=tags[k], simple_value=record[k]) for k in tags if k in record]
            step = int(record["step"])
            event = Event(wall_time=float(step), step=step, summary=Summary(value=values))
            writer.write(event.SerializeToString())
        writer.flush()
    return True
