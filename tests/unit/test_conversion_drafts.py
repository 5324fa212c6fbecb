"""Rows that are rendered when they are read become what they would become later, to the byte."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from services.conversion.spill import BUFFER_BYTES, Buckets, read_bucket
from tests.unit.test_conversion_worker import convert

ROWS = Path(__file__).parents[2] / "examples/data/train.jsonl"
FILES = ("train.jsonl", "validation.jsonl", "test.jsonl", "tools.jsonl")


@pytest.mark.parametrize("layout", ["inline", "split", "both"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"distractors": {"min": 1, "max": 3}, "language": "zh", "instructions": ["Be kind.", "Be short.", "说中文。"]},
    ],
    ids=["plain", "with distractors"],
)
def test_a_row_that_is_rendered_when_it_is_read_becomes_the_same_as_one_that_waits(
    layout: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    written = []
    for limit in (0, 1 << 30):  # who counts characters needs the row itself, so none is rendered early
        folder = tmp_path / str(limit)
        folder.mkdir()
        sources = [{"uri": "rows", "layout": layout}]
        output, _ = convert(folder, ROWS, sources=sources, max_row_characters=limit, **settings)
        written.append([(output / name).read_bytes() for name in FILES])
    assert written[0] == written[1]
    assert all(written[0])


def test_what_is_put_into_a_bucket_comes_out_in_order_whatever_its_size(tmp_path: Path) -> None:
    draw, count = random.Random(7), BUFFER_BYTES // 4096
    buckets, expected = Buckets(tmp_path, "rows", count), [b"", b""]
    for size in (0, 1, 4095, 1, 4096, 4097, 100, 4000, 9000, 5, 4091, *(draw.randrange(3000) for _ in range(50))):
        data, bucket = draw.randbytes(size), draw.randrange(2)
        expected[bucket] += data
        buckets.put(bucket, data)
    buckets.close()
    assert [read_bucket([tmp_path], "rows", number) for number in (0, 1)] == expected
    assert read_bucket([tmp_path], "rows", 2) == b""
