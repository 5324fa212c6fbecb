"""`fabrictune chat`: talk to what is deployed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fabrictune.cli.context import console, print_json, settings
from fabrictune.cli.serving import DeploymentName, only_deployment
from fabrictune.errors import ApiError

if TYPE_CHECKING:
    from fabrictune.client import Client


def chat(
    name: DeploymentName = "",
    message: Annotated[str, typer.Option("--message", "-m", help="One message instead of a conversation.")] = "",
    system: Annotated[str, typer.Option(help="The system prompt.")] = "",
    max_tokens: Annotated[int, typer.Option(help="At most so many tokens an answer.")] = 300,
    tools: Annotated[
        Path | None, typer.Option(help="A JSON list of OpenAI tools; you are asked for the result of each call.")
    ] = None,
) -> None:
    """Talk to a deployment. Ctrl-D ends the conversation."""
    listed = read_tools(tools) if tools else []
    with settings().connect() as client:
        deployment = name or only_deployment(client)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        if message:
            messages.append({"role": "user", "content": message})
            answer = _answer(client, deployment, messages, max_tokens, listed)
            if settings().json:
                calls = [call["function"] for call in answer.get("tool_calls", [])]
                print_json({"answer": answer["content"], **({"tool_calls": calls} if calls else {})})
            return
        console.print(f"[dim]{deployment}; Ctrl-D ends[/]")
        while True:
            try:
                said = console.input("[bold cyan]you[/] ")
            except EOFError:
                return
            messages.append({"role": "user", "content": said})
            messages.append(answer := _answer(client, deployment, messages, max_tokens, listed))
            while answer.get("tool_calls"):
                for call in answer["tool_calls"]:
                    result = console.input(f"[bold magenta]result of {escape(call['function']['name'])}[/] ")
                    messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
                messages.append(answer := _answer(client, deployment, messages, max_tokens, listed))


def read_tools(file: Path) -> list[dict[str, Any]]:
    """A file's OpenAI tools; the server checks what they say. Raises ApiError."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ApiError(f"{file} cannot be read: {error.strerror}", "NOT_FOUND") from None
    except ValueError as error:
        raise ApiError(f"{file} is not JSON: {error}", "INVALID_ARGUMENT") from None
    listed = read if isinstance(read, list) else [None]
    functions = [tool.get("function", tool) if isinstance(tool, dict) else None for tool in listed]
    if not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in functions):
        raise ApiError(
            f"{file} must hold a list of tools: {{type: function, function: {{name, description, parameters}}}}",
            "INVALID_ARGUMENT",
        )
    return [{"type": "function", "function": each} for each in functions]


def _answer(
    client: Client, deployment: str, messages: list[dict[str, Any]], max_tokens: int, tools: list[dict[str, Any]]
) -> dict[str, Any]:
    """The assistant's message, printed as it comes."""
    text, calls = "", list[dict[str, Any]]()
    for piece in client.inference.generate(deployment, messages, tools, max_tokens=max_tokens, temperature=0.0):
        text += piece.text
        for made in piece.tool_calls:
            function = {"name": made.name, "arguments": made.arguments}
            calls.append({"id": made.id, "type": "function", "function": function})
        if not settings().json:
            console.print(piece.text, end="", markup=False, highlight=False, soft_wrap=True)
    if not settings().json:
        console.print()
        for call in calls:
            console.print(f"→ {call['function']['name']} {call['function']['arguments']}", markup=False, soft_wrap=True)
    return {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}
