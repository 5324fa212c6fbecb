"""Which files of a hub's data set are the rows of a subset."""

from __future__ import annotations

import pytest

from fabrictune.row_files import may_hold_rows
from services.common.hub_rows import select_rows

CARD = """---
configs:
- config_name: default
  data_files: rows/base-*.jsonl
- config_name: addition
  data_files:
  - split: train
    path: rows/more.jsonl
---
# Rows
"""
META = '{"default": {"train": {"meta": "base.jsonl", "file": ""}}, "addition": {"train": {"meta": "more.jsonl"}}}'


@pytest.mark.parametrize(
    ("paths", "subset", "told", "rows"),
    [
        (["README.md", "b.jsonl.gz", "a.jsonl", "c.parquet", "d.csv"], "", {}, ["a.jsonl", "b.jsonl.gz", "c.parquet"]),
        (["dataset_infos.json", "rows.json"], "", {}, ["rows.json"]),
        (["rows.json", "train.jsonl"], "", {}, ["train.jsonl"]),
        (["x/addition/a.jsonl", "train_addition.jsonl", "additional.jsonl"], "addition", {},
         ["train_addition.jsonl", "x/addition/a.jsonl"]),
        (["rows/base-1.jsonl", "rows/more.jsonl"], "default", {"README.md": CARD}, ["rows/base-1.jsonl"]),
        (["rows/base-1.jsonl", "rows/more.jsonl"], "addition", {"README.md": CARD}, ["rows/more.jsonl"]),
        (["base.jsonl", "more.jsonl", "set.json"], "addition", {"README.md": "# no configs", "set.json": META},
         ["more.jsonl"]),
        (["base.jsonl"], "addition", {"README.md": "---\n: [\n---\n", "set.json": "no"}, []),
    ],
)  # fmt: skip
def test_rows_of_a_subset(paths: list[str], subset: str, told: dict[str, str], rows: list[str]) -> None:
    assert select_rows(paths, subset, may_hold_rows, told) == rows
