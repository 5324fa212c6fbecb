"""What a run ends with: before and after, one answered question, and how to use the model from elsewhere."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fabrictune.cli.agentfabric import model_config
from fabrictune.cli.context import console, program
from fabrictune.cli.serving import address_here

if TYPE_CHECKING:
    from fabrictune.client import Client

BY_GROUP = ("calls", "right_tool", "exact_arguments", "no_call")
NARROW_FROM = 2
"""With more columns than these a terminal has no room for k/n."""
HEADINGS = {
    "all": "all prompts",
    "one tool": "that list one tool",
    "two tools": "two tools",
    "three or more tools": "three or more tools",
}


def show(client: Client, run: Any) -> None:
    """Print the results of a run that has succeeded."""
    outputs = {stage.stage: stage.output for stage in run.stages}
    if "evaluation-after" in outputs:
        _show_report(client, outputs)
    if "deployment" not in outputs:
        return
    deployment = client.inference.get(outputs["deployment"])
    base = address_here(deployment).rstrip("/")
    body = json.dumps({"model": deployment.served_model, "messages": [{"role": "user", "content": "Hello!"}]})
    _print("\n[bold]OpenAI endpoint[/]")
    _print(Text(f"  curl {base}/chat/completions -H 'content-type: application/json' -d '{body}'"))
    _print("\n[bold]AgentFabric[/]  put this into config/model_config.json")
    _print(Text(json.dumps(model_config(deployment), indent=2)))
    report = outputs.get("evaluation-after", "reports/an-id")
    _print("\n[bold]Next[/]")
    here = program()
    _print(f"  {here} chat {deployment.name}")
    _print(f"  {here} lineage {deployment.name}")
    _print(f"  {here} artifacts pull {report} report   # then open report/report.html")
    _print(f"  {here} down   # or `make stop`")


def report_table(report: Mapping[str, Any]) -> Table:
    """Before, after and others on the same rows: value, 95 % interval, k/n; all prompts first, then by listed tools."""
    narrow = len(report["columns"]) > NARROW_FROM
    table = Table(
        title=str(report["title"]),
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        caption="95 % intervals in brackets; parse, listed: of the answers that call",
    )
    table.add_column("")
    for column in report["columns"]:
        table.add_column(Text(str(column["label"])))
    for group in HEADINGS:
        table.add_row(f"[bold]{HEADINGS[group]}[/]")
        for metric, title in report["titles"].items():
            cells = [_cell(column["groups"][group][metric], narrow) for column in report["columns"]]
            if any(cells) and (group == "all" or metric in BY_GROUP):
                table.add_row(f"  {title}", *(cell or "-" for cell in cells))
        table.add_section()
    return table


def _cell(m: Mapping[str, Any], narrow: bool) -> str:
    if not m["n"]:
        return ""
    if narrow:
        return f"{m['value']:4.0%} [{100 * m['low']:.0f}-{100 * m['high']:.0f}]"
    return f"{m['value']:4.0%} [{m['low']:.0%}-{m['high']:.0%}] " + (
        f"{m['k']}/{m['n']}" if "k" in m else f"n={m['n']}"
    )


def _show_report(client: Client, outputs: Mapping[str, str]) -> None:
    from fabrictune import transfer

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "report"
        transfer.pull(client, outputs["evaluation-after"], folder)
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        answers = _read_rows(folder / "answers.jsonl")
        console.print(report_table(report))
        failed = {row["id"] for row in report["examples"]}
        good = next((a for a in answers if a["id"] not in failed and "Action:" in a["text"]), answers[0])
        if "deployment" in outputs:
            _ask(client, outputs["deployment"], outputs["conversion"], good["id"], Path(scratch))


def _ask(client: Client, deployment: str, dataset: str, row_id: str, scratch: Path) -> None:
    """Ask the deployed model one held-out question, as AgentFabric would."""
    from fabrictune import transfer

    folder = scratch / "dataset"
    transfer.pull(client, dataset, folder)
    row = next((r for r in _read_rows(folder / "test.jsonl") if r["id"] == row_id), None)
    if row is None:
        return  # a question of another suite, or one after a tool's result
    turns = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
    while turns[-1]["role"] == "assistant":
        turns.pop()
    pieces = client.inference.generate(deployment, turns, temperature=0.0, max_tokens=200, stop=["Observation:"])
    text = "".join(piece.text for piece in pieces).strip()
    _print("\n[bold]A question about tools that it has never seen[/], answered by the deployed model")
    console.print(Panel(Text(f"{turns[-1]['content']}\n\n{text}"), border_style="cyan"))


def _read_rows(file: Path) -> list[Any]:
    """The objects of a file of JSON lines; what else ends lines for Python, such as U+2028, may stand in their texts."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def _print(text: str | Text) -> None:
    console.print(text, highlight=False, soft_wrap=True)
