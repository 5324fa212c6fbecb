"""Cards as golden text (tests/data/cards; UPDATE=1 renews them), and what must never get into one."""

from __future__ import annotations

import os
from typing import Any

import pytest
import yaml

from fabrictune.card import render_card
from fabrictune.errors import ApiError
from fabrictune.publishing import HubAddress, parse_address
from fabrictune.v1 import artifact_pb2
from tests.conftest import ROOT

GOLDEN = ROOT / "tests/data/cards"


def artifact(name: str, kind: str, files: dict[str, int], **more: Any) -> artifact_pb2.Artifact:
    made = artifact_pb2.Artifact(name=name, kind=kind, digest=name.encode().hex().ljust(64, "0")[:64])
    for path, size in files.items():
        made.files.add(path=path, size_bytes=size, sha256=path.encode().hex().ljust(64, "0")[:64])
    made.size_bytes = sum(files.values())
    made.create_time.FromSeconds(1_750_000_000)
    made.metadata.update(more.get("metadata", {}))
    if "job" in more:
        made.created_by.job = more["job"]
        made.created_by.spec.update(more["spec"])
        made.created_by.versions.update(more["versions"])
    for source in more.get("inputs", ()):
        made.created_by.inputs.add(name=source.name, digest=source.digest)
    return made


ROWS = artifact("datasets/rows-ms-agent-1", "rows", {"rows.jsonl": 90}, metadata={"source": "ms:iic/ms_agent@master"})
DATASET = artifact(
    "datasets/d1",
    "dataset",
    {"train.jsonl": 2_000_000, "validation.jsonl": 9, "test.jsonl": 10, "tools.jsonl": 80, "rejects.jsonl": 12},
    job="conversionJobs/d1",
    spec={"sources": [{"uri": ROWS.name, "format": "ms_agent"}], "seed": 42, "instructions": ["你是助手", "```\nrm"]},
    versions={"fabrictune": "0.1.0"},
    inputs=[ROWS, artifact("datasets/gone", "rows", {})],
    metadata={
        "rows_in": 30000,
        "rows_converted": 29000,
        "rows_duplicate": {"exact": 100, "near": 0},
        "rows_rejected": 900,
        "rejected_by_code": {"NOT_REACT": 850, "INVALID_JSON": 50},
        "rows_written": {"train": 58000, "validation": 1, "test": 2},
        "rows_scored": {"test": 2},
        "tools": {"train": 400, "validation": 20, "test": 40},
    },
)
BASE = artifact("models/base", "model", {"model.safetensors": 10**9}, metadata={"source": "hf:Qwen/Qwen3-0.6B@abc"})
ADAPTER = artifact(
    "adapters/a1",
    "adapter",
    {"adapter_model.safetensors": 4_000_000, "README.md": 7},
    job="trainingJobs/a1",
    spec={"dataset": DATASET.name, "base_model": BASE.name, "preset": "agentfabric-lora"},
    versions={"ms-swift": "4.6.0", "fabrictune": "0.1.0"},
    inputs=[DATASET, BASE],
    metadata={"preset": "agentfabric-lora", "step": 900, "total_steps": 906, "loss": 0.25, "seed": 42},
)
REPORTS = [
    artifact(
        f"reports/{label}",
        "report",
        {"report.json": 1},
        job=f"evaluationJobs/{label}",
        spec={"dataset": DATASET.name, "split": "test", "target": {"address": "http://inside:8000/v1"}},
        versions={},
        metadata={
            "label": label,
            "metrics": {
                "right_tool": {"value": right / 40, "k": right, "n": 40},
                "no_call": {"value": 0, "k": 0, "n": 0},
            },
        },
    )
    for label, right in (("before", 2), ("after", 38))
]


@pytest.mark.parametrize(
    ("name", "card"),
    [
        (
            "dataset",
            render_card("my-rows", [DATASET, ROWS], license_id="apache-2.0", files=["train.jsonl", "test.jsonl"]),
        ),
        ("adapter", render_card("my-adapter", [ADAPTER, DATASET, BASE, ROWS], REPORTS)),
    ],
)
def test_cards_are_as_they_were(name: str, card: str) -> None:
    golden = GOLDEN / f"{name}.md"
    if os.environ.get("UPDATE"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(card, encoding="utf-8")
    assert card == golden.read_text(encoding="utf-8")


def test_a_mean_has_no_part_of_rows() -> None:
    told = {"label": "after", "metrics": {"rouge_l": {"value": 0.5, "n": 4}}}
    report = artifact("reports/r", "report", {}, job="evaluationJobs/r", spec={}, versions={}, metadata=told)
    assert "| rouge l | 50.0 % (mean of 4) |" in render_card("a", [ADAPTER, DATASET, BASE, ROWS], [report])


def test_the_front_matter_is_what_hubs_read() -> None:
    told = yaml.safe_load(render_card("a", [ADAPTER, DATASET, BASE, ROWS]).split("---\n")[1])
    assert (told["base_model"], told["library_name"], told["license"]) == ("Qwen/Qwen3-0.6B", "peft", "unknown")
    told = yaml.safe_load(render_card("d", [DATASET, ROWS]).split("---\n")[1])
    assert [f["path"] for f in told["configs"][0]["data_files"]] == ["train.jsonl", "validation.jsonl", "test.jsonl"]
    assert told["size_categories"] == ["10K<n<100K"]


def test_text_of_others_breaks_neither_tables_nor_code() -> None:
    name = artifact("datasets/x", "rows", {"a|b.jsonl": 1}, metadata={"description": "x | y\n| z | <script>"})
    card = render_card("x", [name])
    assert "a\\|b.jsonl" in card
    assert "x \\| y \\| z \\| &lt;script>" in card
    assert "````yaml" in render_card("d", [DATASET])  # its instructions have a fence of their own


def test_addresses_of_hubs() -> None:
    assert parse_address("hf://org/name") == HubAddress("hf", "org/name")
    assert parse_address("modelscope://org/name") == HubAddress("ms", "org/name")
    assert parse_address("datasets/d1") is None
    for wrong in ("hf://name", "hf://a/b/c", "s3://bucket/x", "hf://../x y"):
        with pytest.raises(ApiError, match="must look like hf://ORG/NAME"):
            parse_address(wrong)
