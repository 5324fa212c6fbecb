"""report.html: what people see of a conversion. It adds up, it escapes what rows say, and it needs nothing from outside."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from services.conversion import refusals
from services.conversion.refusals import REASONS
from services.conversion.report_page import render_page, share
from services.conversion.spec import Spec
from services.conversion.worker import run
from tests.conftest import Recorder

EVIL = "<script>alert(1)</script><img src=x onerror=y> \"'&"
REPORT: dict[str, Any] = {
    "rows_in": 1000,
    "rows_converted": 900,
    "rows_rejected": 40,
    "rows_duplicate": {"exact": 30, "near": 10},
    "rows_left_out": 20,
    "rejected_by_code": {"UNKNOWN_TOOL": 39, "INVALID_JSON": 1},
    "rejected_examples": {
        "UNKNOWN_TOOL": [
            {"source": "a.jsonl", "line": 812, "offset": 19182, "expected": "a tool; found 'b'", "excerpt": '{"id": 1'}
        ]
    },
    "rows_written": {"train": 900, "validation": 50, "test": 90},
    "rows_scored": {"train": 800, "test": 80},
    "tools": {"train": 40, "validation": 2, "test": 4},
    "held_out_tools": ["plan_route"],
    "languages": {"zh": 600, "en": 300},
    "layouts": {"split": 1040},
    "rows_by_source": {"a.jsonl": 900},
    "turns_with_calls": 800,
    "turns_without_call": 200,
    "turns": {"1": 800, "10": 1, "2": 99},
    "calls_per_turn": {"0": 200, "1": 800},
    "tokens": {
        "tokenizer": "models/x", "bin": 32, "histogram": {"6": 5, "20": 800, "62": 90, "260": 5}, "max": 8340, "mean": 650.4,
        "longer_than": {"1024": 95, "1500": 95, "2048": 5, "4096": 5, "8192": 5}, "rows": 900,
    },
    "near_misses": [["plan_route", "route.get", 7]],
    "tools_by_frequency": [["plan_route", 400], ["weather", 200]],
    "warnings": ["two tools are called weather"],
    "spec": {"sources": [{"uri": "datasets/a"}]},
}  # fmt: skip


class Page(HTMLParser):
    """Text, tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def poison(value: Any) -> Any:
    """The same report with every text made evil; keys that code looks for stay."""
    if isinstance(value, dict):
        return {k: poison(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poison(v) for v in value]
    return EVIL if isinstance(value, str) else value


def test_the_sum_says_where_each_row_went() -> None:
    text = Page(render_page(REPORT)).text
    assert "1,000 rows in = 900 converted + 40 duplicates 30 exact · 10 near + 20 left out" in text
    assert "+ 40 rejected" in text
    assert "does not add up" not in text


def test_a_sum_that_does_not_add_up_is_said() -> None:
    assert "997 rows are not accounted for" in Page(render_page({"rows_in": 1000, "rows_converted": 3})).text


def test_what_rows_say_is_text_never_markup() -> None:
    report = poison(REPORT)
    named = ("languages", "layouts", "rows_by_source", "rejected_by_code", "rows_duplicate")
    report |= {key: {EVIL: 3} for key in named} | {"rejected_examples": {EVIL: [{"excerpt": EVIL, "source": EVIL}]}}
    plain, evil = Page(render_page(REPORT)), Page(render_page(report))
    assert set(evil.tags) <= set(plain.tags)
    assert {name for name, _ in evil.attributes} <= {name for name, _ in plain.attributes}
    assert html.escape("<script>alert(1)") in render_page(report)


def test_the_page_has_no_script_and_asks_for_nothing_from_outside() -> None:
    text = render_page(REPORT)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|//\w|@import|url\(", text)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


@pytest.mark.parametrize("missing", [*REPORT, "everything"])
def test_a_key_may_be_missing(missing: str) -> None:
    report = {} if missing == "everything" else {k: v for k, v in REPORT.items() if k != missing}
    assert "rows in" in Page(render_page(report)).text


@pytest.mark.parametrize("key", [k for k, v in REPORT.items() if isinstance(v, dict | list)])
def test_a_key_may_hold_nothing(key: str) -> None:
    assert "rows in" in Page(render_page({**REPORT, key: type(REPORT[key])()})).text


def test_a_key_of_the_token_lengths_may_be_missing() -> None:
    for key in REPORT["tokens"]:
        tokens = {k: v for k, v in REPORT["tokens"].items() if k != key}
        render_page({"tokens": tokens})


def test_a_refusal_says_what_was_expected_what_was_found_where_and_how_to_mend_it() -> None:
    text = Page(render_page(REPORT)).text
    assert f"Expected {REASONS['UNKNOWN_TOOL'].expected} To mend it {REASONS['UNKNOWN_TOOL'].mend}" in text
    assert "a.jsonl · line 812 · byte 19182 Found 'b' {\"id\": 1…" in text
    assert "jq -r .row rejects.jsonl > mended.jsonl" in text


def test_near_misses_are_told_so_that_people_find_those_that_are_none() -> None:
    text = Page(render_page(REPORT)).text
    assert "name both in equivalent_tools . asked for listed questions plan_route route.get 7" in text


def test_every_reason_of_refusal_says_how_to_mend_the_row() -> None:
    codes = {value for name, value in vars(refusals).items() if name == value}
    assert codes == REASONS.keys()
    assert all(reason.expected and reason.mend for reason in REASONS.values())


def test_each_max_length_has_a_line_and_says_how_many_rows_it_cuts() -> None:
    page = Page(render_page(REPORT))
    lines = [v for n, v in page.attributes if n == "class" and v == "limit"]
    assert len(lines) == 5
    assert "1500 95 10.6 %" in page.text
    assert "2048 5 0.6 %" in page.text


def test_areas_of_the_histogram_stand_for_rows_and_stay_inside() -> None:
    histogram = {str(n): 10 for n in range(8, 300)}
    text = render_page({"tokens": {"bin": 32, "histogram": histogram}})
    found = re.findall(
        r'left: ([\d.]+)%; width: ([\d.]+)%; height: ([\d.]+)%" title="[\d,]+ to [\d,]+ tokens: (\d+) r', text
    )
    bars = [tuple(map(float, bar)) for bar in found]
    assert sum(rows for *_, rows in bars) == 2920
    per_row = [width * height / rows for _, width, height, rows in bars]
    assert max(per_row) == pytest.approx(min(per_row), rel=0.02)
    assert all(left >= 0 and left + width <= 100 and height <= 100 for left, width, height, _ in bars)


def test_numbers_are_in_the_order_of_numbers_and_the_longest_tail_is_joined() -> None:
    text = Page(render_page({"turns": {str(n): n for n in range(1, 15)}})).text
    assert "1 1 2 2 3 3" in text
    assert f"10 10 11 or more {11 + 12 + 13 + 14}" in text


@pytest.mark.parametrize(
    ("part", "whole", "said"),
    [(1, 8, "12.5 %"), (1, 2, "50 %"), (0, 5, "0 %"), (5, 5, "100 %"), (1, 10**6, "< 0.1 %"), (9999, 10**4, "> 99.9 %"),
     (1, 0, "–")],
)  # fmt: skip
def test_parts_in_words(part: int, whole: int, said: str) -> None:
    assert share(part, whole) == said


def test_the_report_of_a_real_conversion_makes_a_page(tmp_path: Path) -> None:
    examples = Path(__file__).resolve().parents[2] / "examples/data/train.jsonl"
    output = tmp_path / "out"
    output.mkdir()
    run(Spec.model_validate({"sources": [{"uri": "x"}]}), {"sources/0": examples}, output, Recorder())
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    page = Page(render_page(report))
    assert f"{report['rows_in']:,} rows in" in page.text
    assert "does not add up" not in page.text
