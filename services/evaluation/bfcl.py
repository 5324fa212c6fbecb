"""Questions out of files in the format of the Berkeley Function Calling Leaderboard, prompted as AgentFabric would.

A row is {id, question: [[{role, content}, …]], function: [{name, description, parameters}]}; what is right is `ground_truth`,
[{tool: {parameter: [allowed values]}}], in the row or under its id in a file in the folder `possible_answer`. Rows of the
irrelevance categories have none: no call is right. Source: gorilla, berkeley-function-call-leaderboard (v3 and v4).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from services.common.errors import InvalidData, Violation
from services.common.fabric import ROLES, Tool, language_of, render_prefix, render_system
from services.common.tool_schemas import make_schema
from services.evaluation.questions import Question

ANSWERS = "possible_answer"
# What BFCL's own folder has beside questions and answers: files and folders of no rows, or of rows that it does not use.
BESIDE = frozenset(
    {
        "manifest.json",
        "BFCL_v4_format_sensitivity.json",
        "memory_prereq_conversation",
        "multi_turn_func_doc",
        "unused_datasets",
    }
)
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
    "multi_turn*": "several turns against a simulated system",
    "memory*": "needs BFCL's memory",
    "web_search*": "needs the web",
    "simple_java": "values in Java's notation",
    "simple_javascript": "values in JavaScript's notation",
    "relevance": "any call is right",
    "live_relevance": "any call is right",
    # v3
    "java": "values in Java's notation",
    "javascript": "values in JavaScript's notation",
    "exec_*": "calls are to be run",
    "rest": "calls are to be run",
}
PREFIX = "bfcl/"
MOST_NAMED = 20
"""So many rows that are wrong are named."""


def read_bfcl(folder: Path, limit: int) -> tuple[list[Question], Counter[str]]:
    """The questions of all files in a folder, and how many rows were left out, by reason.

    limit: of questions, the first ones of each category in turn; 0 takes all. Raises InvalidData naming the rows that are
    wrong.
    """
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix in (".json", ".jsonl") and BESIDE.isdisjoint(p.relative_to(folder).parts)
    )
    wrong: list[Violation] = []
    answers = {
        str(row.get("id")): row.get("ground_truth")
        for _, row in _read_all((file for file in files if file.parent.name == ANSWERS), wrong)
    }
    questions: list[Question] = []
    places: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    for place, row in _read_all((file for file in files if file.parent.name != ANSWERS), wrong):
        try:
            made = _make_question(row, answers)
        except (ValueError, RecursionError) as error:
            wrong.append(Violation(place, str(error)))
            continue
        if isinstance(made, str):
            left_out[made] += 1
        elif places.setdefault(made.id, place) != place:
            wrong.append(Violation(place, f"has the id of {places[made.id]}"))
        else:
            questions.append(made)
    _check(folder.name, questions, left_out, wrong)
    return _spread(questions, limit), left_out


def category_of(row_id: str) -> str:
    """A row's category: "live_multiple" of "live_multiple_12-3-0"; "" without one."""
    return row_id.rpartition("_")[0]


def _check(folder: str, questions: Sequence[Question], left_out: Mapping[str, int], wrong: Sequence[Violation]) -> None:
    if wrong:
        more = f", {len(wrong)} in all; the first {MOST_NAMED} are" if len(wrong) > MOST_NAMED else ""
        raise InvalidData(
            f"{folder} has rows that are not in BFCL's format ({{id, question, function}}){more}",
            violations=wrong[:MOST_NAMED],
        )
    if not questions:
        raise InvalidData(
            f"no file of {folder} has rows in BFCL's format ({{id, question, function}}) that can be scored"
            + "".join(f"; {count} left out: {reason}" for reason, count in left_out.items())
        )


def _spread(questions: Sequence[Question], limit: int) -> list[Question]:
    """At most so many, as many of each category as there are or as of the others; in their order. 0 takes all."""
    seen: Counter[str] = Counter()
    turns = []
    for place, question in enumerate(questions):
        turns.append((seen[question.category], place))
        seen[question.category] += 1
    taken = sorted(turns)[: limit or None]
    return [questions[place] for place in sorted(place for _, place in taken)]


def _make_question(row: Mapping[str, Any], answers: Mapping[str, Any]) -> Question | str:
    """The question of a row, or why it is left out. Raises ValueError when it is malformed."""
    if row.get("id") is None:
        raise ValueError(f"has no id: {row!r:.80}")
    row_id = str(row["id"])
    category = category_of(row_id)
    if reason := next((why for name, why in LEFT_OUT.items() if fnmatchcase(category, name)), ""):
        return reason
    if missing := [key for key in ("question", "function") if key not in row]:
        raise ValueError(f"{row_id} has no {' and no '.join(missing)}")
    truth = row.get("ground_truth", answers.get(row_id))
    if truth is None and "irrelevance" not in row_id:
        return "no ground_truth"
    turns = _read_turns(row["question"])
    if len(turns) != 1 or turns[0][-1]["role"] != "user":
        return "several turns"
    functions = row["function"] if isinstance(row["function"], list) else [row["function"]]
    tools = [_make_tool(function) for function in functions]
    objects = [_tool_object(tool) for tool in tools]
    return Question(
        f"{PREFIX}{row_id}",
        _prompt(turns[0], tools),
        objects,
        _read_truth([] if truth is None else truth),
        category=category,
    )


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
    turns = question if isinstance(question, list) and question and isinstance(question[0], list) else [question]
    if turns == [[]] or not all(isinstance(turn, list) for turn in turns):
        raise ValueError(f"question is {question!r:.80}, which holds no messages")
    return [[_read_message(message) for message in turn] for turn in turns]


def _read_message(message: Any) -> dict[str, str]:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"question has {message!r:.80}, which is no message with a role and a text")
    return {"role": role, "content": content}


def _make_tool(function: Any) -> Tool:
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"function has {function!r:.80}, which is no tool with a name")
    schema = make_schema(_rename_types(function.get("parameters") or {"type": "object", "properties": {}}), name)
    return Tool(name, str(function.get("description") or ""), json.dumps(schema, ensure_ascii=False))


def _tool_object(tool: Tool) -> dict[str, Any]:
    told = {"name": tool.name, "description": tool.description, "parameters": json.loads(tool.parameters)}
    return {"type": "function", "function": told}


def _read_truth(truth: Any) -> list[dict[str, Any]]:
    """Expected calls out of [{tool: {parameter: [allowed values]}}]."""
    if not isinstance(truth, list) or not all(isinstance(c, dict) and len(c) == 1 for c in truth):
        raise ValueError(f"ground_truth is {truth!r:.80}, and not [{{tool: {{parameter: [allowed values]}}}}]")
    expected = [{"name": name, "possible": possible} for call in truth for name, possible in call.items()]
    if bad := [call["possible"] for call in expected if not _is_possible(call["possible"])]:
        raise ValueError(f"ground_truth has {bad[0]!r:.80}, and not {{parameter: [allowed values]}}")
    return expected


def _is_possible(possible: Any) -> bool:
    """Whether it is {parameter: [allowed values]}, as are allowed objects, and those in allowed lists."""
    if not isinstance(possible, dict) or not all(isinstance(allowed, list) for allowed in possible.values()):
        return False
    values = [value for allowed in possible.values() for value in allowed]
    objects = [o for value in values for o in (value if isinstance(value, list) else [value]) if isinstance(o, dict)]
    return all(isinstance(allowed, list) for o in objects for allowed in o.values())


def _rename_types(value: Any) -> Any:
    if isinstance(value, list):
        return [_rename_types(item) for item in value]
    if not isinstance(value, dict):
        return value
    renamed = {key: _rename_types(item) for key, item in value.items()}
    told = value.get("type")
    return {**renamed, "type": TYPES.get(told, told)} if isinstance(told, str) else renamed


def _read_all(files: Iterable[Path], wrong: list[Violation]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each row of files; what is none is added to `wrong`."""
    for file in files:
        for place, row in _read_rows(file, wrong):
            if isinstance(row, dict):
                yield place, row
            else:
                wrong.append(Violation(place, "is no object"))


def _read_rows(file: Path, wrong: list[Violation]) -> Iterator[tuple[str, Any]]:
    """JSON lines, as BFCL's files are whatever their ending says, or one object or list."""
    raw = file.read_bytes()
    try:
        whole = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        if raw.lstrip().startswith(b"["):
            wrong.append(Violation(file.name, f"is neither JSON lines nor a JSON list: {error}"))
        else:
            yield from _read_lines(raw, file.name, wrong)
        return
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield f"{file.name} row {number}", row


def _read_lines(raw: bytes, name: str, wrong: list[Violation]) -> Iterator[tuple[str, Any]]:
    # Not splitlines: JSON may hold U+2028 and other ends of lines as they are.
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            try:
                yield f"{name} line {number}", json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                wrong.append(Violation(f"{name} line {number}", f"is not JSON: {error}"))
