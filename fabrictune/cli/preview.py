"""`fabrictune convert --preview`: the first rows of each source side by side, before and after, every change marked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fabrictune.cli.context import console, print_message, settings
from fabrictune.cli.progress import find_with_bar
from fabrictune.sources import is_artifact, public_uri
from fabrictune.v1 import conversion_pb2

EQUAL, DELETED, INSERTED = conversion_pb2.Span.EQUAL, conversion_pb2.Span.DELETED, conversion_pb2.Span.INSERTED
STYLES = {EQUAL: "", DELETED: "red", INSERTED: "green"}
# Where there are no colours, changes are marked as wdiff does.
BRACKETS = {EQUAL: ("", ""), DELETED: ("[-", "-]"), INSERTED: ("{+", "+}")}
# Rows come from anywhere: what would move the cursor or colour the screen is shown as a picture of itself.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(
    range(127, 160), 0xFFFD
)
BLANKS = VISIBLE | {ord(" "): "·", ord("\t"): "→\t", ord("\n"): "⏎\n"}


def preview_sources(spec: Mapping[str, Any], folder: Path, rows: int) -> conversion_pb2.PreviewConversionResponse:
    """The first rows of each source: of an artifact asked of a server, of others read here. Raises ApiError."""
    answer = conversion_pb2.PreviewConversionResponse()
    for source in spec["sources"]:
        uri = source["uri"]
        if is_artifact(uri) and not (folder / uri).exists():
            with settings().connect() as client:
                answer.rows.extend(client.conversion.preview({**spec, "sources": [source]}, rows).rows)
            continue
        from fabrictune import local

        path = find_with_bar(uri, folder).path
        answer.rows.extend(
            local.preview_rows({**spec, "sources": [{**source, "uri": public_uri(uri)}]}, path, rows).rows
        )
    return answer


def show_preview(answer: conversion_pb2.PreviewConversionResponse, on: Console = console) -> None:
    """Print it: the message with --json, else the rows side by side."""
    if settings().json:
        print_message(answer)
        return
    if not answer.rows:
        on.print("There are no rows.")
    for row in answer.rows:
        on.print(Rule(Text(_clean(f"{row.source} line {row.line} · {row.id}")), align="left", style="dim"))
        if row.HasField("refusal"):
            _show_refused(row, on)
            continue
        for number, example in enumerate(row.after, 1):
            _show_example(
                f"{example.layout} {number}/{len(row.after) + row.after_left_out}", example, number == 1, row, on
            )
        if row.after_left_out:
            on.print(f"… and {row.after_left_out} more training rows", style="dim")


def _show_example(title: str, example: Any, is_first: bool, row: Any, on: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, expand=True, header_style="bold", padding=(0, 1))
    table.add_column("before", ratio=1, overflow="fold")
    table.add_column(f"after · {title}", ratio=1, overflow="fold")
    for message in example.messages:
        role = f"{message.role}, trained" if message.trained else message.role
        if message.role == "system" and not is_first and message == row.after[0].messages[0]:
            same = Text("as above", style="dim")
            table.add_row(same, same)
            continue
        table.add_row(Text(message.role, style="bold cyan"), Text(role, style="bold cyan"))
        table.add_row(_join(message.spans, DELETED, on), _join(message.spans, INSERTED, on), end_section=True)
    on.print(table)


def _show_refused(row: Any, on: Console) -> None:
    refusal = row.refusal
    told = Text.assemble(
        (refusal.code, "bold red"),
        *(("\nexpected ", "dim"), _clean(refusal.expected)),
        *(("\nfound    ", "dim"), _clean(refusal.found)),
        *(("\nrow      ", "dim"), _clean(refusal.excerpt), "…"),
    )
    on.print(Panel(told, title="refused", title_align="left", border_style="red"))


def _join(spans: Iterable[Any], kind: int, on: Console) -> Text:
    """The text of one side: what is equal, and what only it has."""
    text = Text()
    for span in spans:
        if span.kind in (EQUAL, kind):
            before, after = ("", "") if on.color_system else BRACKETS[span.kind]
            # Blanks alone could not be seen to change.
            said = _clean(span.text) if span.kind == EQUAL or span.text.strip() else span.text.translate(BLANKS)
            text.append(f"{before}{said}{after}", style=STYLES[span.kind])
    return text


def _clean(text: str) -> str:
    return text.translate(VISIBLE)
