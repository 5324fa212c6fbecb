"""What a run ends with: before and after, one answered question, and how to use the model from elsewhere."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.panel import Panel
from rich.table import Table

from fabrictune import transfer
from fabrictune.agentfabric import model_config, tool_prompt
from fabrictune.cli.context import console
from fabrictune.client import Client

TITLES: Mapping[str, str] = {
    "calls": "calls a tool",
    "right_tool": "the right tool",
    "exact_arguments": "exact arguments",
    "parses": "arguments parse",
    "stops": "stops by itself",
    "no_call": "no call when none fits",
}


def show(client: Client, run: Any, ask: Mapping[str, Any] | None) -> None:
    """Print the results of a run that has succeeded."""
    outputs = {stage.stage: stage.output for stage in run.stages}
    if "evaluation-after" in outputs:
        _show_report(client, outputs["evaluation-after"])
    if "deployment" not in outputs:
        return
    deployment = client.inference.get(outputs["deployment"])
    if ask:
        _show_answer(client, deployment.name, ask)
    base = deployment.address.rstrip("/")
    body = json.dumps({"model": deployment.served_model, "messages": [{"role": "user", "content": "Hello!"}]})
    console.print("\n[bold]OpenAI endpoint[/]")
    console.print(f"  curl {base}/chat/completions -H 'content-type: application/json' -d '{body}'", highlight=False, soft_wrap=True)
    console.print("\n[bold]AgentFabric[/]  put this into config/model_config.json")
    console.print(json.dumps(model_config(deployment.served_model, base), indent=2), highlight=False, soft_wrap=True)
    console.print(
        f"\n[bold]Next[/]  fabrictune chat {deployment.name} · fabrictune lineage {deployment.name} · "
        f"fabrictune artifacts pull {outputs.get('evaluation-after', 'reports/…')} report · fabrictune down",
        highlight=False,
        soft_wrap=True,
    )


def _show_report(client: Client, name: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "report"
        transfer.pull(client, name, folder)
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    console.print(report_table(report))


def report_table(report: Mapping[str, Any]) -> Table:
    """Before and after on the same held-out rows, with 95 % intervals, prompts with one tool apart."""
    return Table(title=str(report.get("title", "")))


def _show_answer(client: Client, deployment: str, ask: Mapping[str, Any]) -> None:
    messages = tool_prompt(str(ask["question"]), list(ask["tools"]))
    pieces = client.inference.generate(deployment, messages, temperature=0.0, max_tokens=200, stop=["Observation:"])
    text = "".join(piece.text for piece in pieces)
    console.print(Panel(text.strip(), title=f"{ask['question']}", title_align="left", border_style="cyan"))
