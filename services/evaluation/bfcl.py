"""Questions out of files in the format of the Berkeley Function Calling Leaderboard, prompted as AgentFabric would.

A row is {id, question: [[{role, content}, …]], function: [{name, description, parameters}]}; what is right is `ground_truth`,
[{tool: {parameter: [allowed values]}}], in the row or under its id in a file in the folder `possible_answer`. Rows of the
irrelevance categories have none: no call is right. Source: gorilla, berkeley-function-call-leaderboard (v3 and v4).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from services.common.errors import InvalidData
from services.common.fabric import ROLES, Tool, language_of, render_prefix, render_system
from services.common.tool_schemas import BadSchema, make_schema
from services.evaluation.questions import Question

ANSWERS = "possible_answer"
# BFCL's names of types that JSON schemas do not have.
TYPES: Mapping[str, str] = {
    "dict": "object",
    "float": "number",
    "double": "number",
    "tuple": "array",
    "any": "string",
}
# Categories whose answers cannot be compared by the AST rules for Python, and why.
LEFT_OUT: Mapping[str, str] = {
    "multi_turn": "several turns against a simulated system",
    "memory": "needs BFCL's memory",
    "web_search": "needs the web",
    "format_sensitivity": "tests other prompts",
    "simple_java": "values in Java's notation",
    "simple_javascript": "values in JavaScript's notation",
    "relevance": "any call is right",
    "live_relevance": "any call is right",
}
PREFIX = "bfcl/"


def read_bfcl(folder: Path, limit: int) -> tuple[list[Question], Counter[str]]:
    """The questions of all files in a folder, and how many rows were left out, by reason. limit: of questions; 0 takes all.

    Raises InvalidData naming the file.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".jsonl") and p.name != "manifest.json")
    answers: dict[str, Any] = {}
    for file in files:
        if file.parent.name == ANSWERS:
            answers |= {str(row["id"]): row.get("ground_truth") for row in _read_rows(file) if "id" in row}
    questions: list[Question] = []
    left_out: Counter[str] = Counter()
    for file in files:
        if file.parent.name == ANSWERS:
            continue
        for row in _read_rows(file):
            if limit and len(questions) >= limit:
                return questions, left_out
            made = _make_question(row, answers, file.name)
            if isinstance(made, str):
                left_out[made] += 1
            else:
                questions.append(made)
    if not questions:
        raise InvalidData(
            f"no file of {folder.name} has rows in BFCL's format ({{id, question, function}}) that can be scored"
            + "".join(f"; {count} left out: {reason}" for reason, count in left_out.items())
        )
    return questions, left_out


def category_of(row_id: str) -> str:
    """A row's category: "live_multiple" of "live_multiple_12-3-0"."""
    return row_id.rpartition("_")[0] or row_id


def _make_question(row: Mapping[str, Any], answers: Mapping[str, Any], file: str) -> Question | str:
    """The question of a row, or why it is left out."""
    if not {"id", "question", "function"} <= row.keys():
        raise InvalidData(f"{file} has a row without id, question and function: {str(row)[:120]}")
    row_id = str(row["id"])
    category = category_of(row_id)
    if reason := LEFT_OUT.get(next((name for name in LEFT_OUT if category.startswith(name)), "")):
        return reason
    truth = row.get("ground_truth", answers.get(row_id))
    if truth is None and "irrelevance" not in category:
        return "no ground_truth"
    turns = _read_turns(row["question"])
    if len(turns) != 1 or turns[0][-1]["role"] != "user":
        return "several turns"
    functions = row["function"] if isinstance(row["function"], list) else [row["function"]]
    try:
        tools = [_make_tool(function) for function in functions]
        expected = [_make_expected(call) for call in truth or []]
    except (BadSchema, KeyError, TypeError, ValueError) as error:
        raise InvalidData(f"{file}, row {row_id}: {type(error).__name__}: {error}") from None
    objects = [_tool_object(tool) for tool in tools]
    return Question(f"{PREFIX}{row_id}", _prompt(turns[0], tools), objects, expected, category=category)


def _prompt(messages: Sequence[Mapping[str, str]], tools: Sequence[Tool]) -> list[dict[str, str]]:
    query = messages[-1]["content"]
    language = language_of(query)
    role = "\n".join(m["content"] for m in messages if m["role"] == "system") or ROLES[language]
    history = [dict(m) for m in messages[:-1] if m["role"] != "system"]
    asked = {"role": "user", "content": render_prefix(tools, language) + query}
    return [{"role": "system", "content": render_system(tools, role, language)}, *history, asked]


def _read_turns(question: Any) -> list[list[dict[str, str]]]:
    """Turns of messages; a text alone, or one turn's messages, as BFCL had them at first, are one turn."""
    if isinstance(question, str):
        return [[{"role": "user", "content": question}]]
    turns = question if question and isinstance(question[0], list) else [question]
    return [[{"role": str(m["role"]), "content": str(m["content"])} for m in turn] for turn in turns]


def _make_tool(function: Mapping[str, Any]) -> Tool:
    name = str(function["name"])
    schema = make_schema(_rename_types(function.get("parameters") or {"type": "object", "properties": {}}), name)
    return Tool(name, str(function.get("description") or ""), json.dumps(schema, ensure_ascii=False))


def _tool_object(tool: Tool) -> dict[str, Any]:
    told = {"name": tool.name, "description": tool.description, "parameters": json.loads(tool.parameters)}
    return {"type": "function", "function": told}


def _make_expected(call: Mapping[str, Any]) -> dict[str, Any]:
    ((name, possible),) = call.items()
    return {"name": name, "possible": {key: list(allowed) for key, allowed in possible.items()}}


def _rename_types(value: Any) -> Any:
    if isinstance(value, list):
        return [_rename_types(item) for item in value]
    if not isinstance(value, dict):
        return value
    renamed = {key: _rename_types(item) for key, item in value.items()}
    told = value.get("type")
    return {**renamed, "type": TYPES.get(told, told)} if isinstance(told, str) else renamed


def _read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file: JSON lines, as BFCL's files are whatever their ending says, or one list."""
    text = file.read_text(encoding="utf-8")
    try:
        rows = (
            json.loads(text) if text.lstrip().startswith("[") else map(json.loads, filter(str.strip, text.splitlines()))
        )
        yield from (row for row in rows if isinstance(row, dict))
    except ValueError as error:
        raise InvalidData(f"{file.name} is neither JSON lines nor a JSON list: {error}") from None
