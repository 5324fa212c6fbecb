"""Makes train.jsonl anew: rows of BFCL in ms_agent form, and the rows of Glaive that are in it already.

    pip download --no-deps bfcl-eval==2026.3.23 && unzip -d bfcl bfcl_eval-*.whl
    python examples/data/make_train.py bfcl/bfcl_eval/data

No tool of test.jsonl, nor one that is called alike, and no question of it gets in. Of a question that needs several calls
the first one is kept. Optional arguments that BFCL lets be absent are absent.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = {"source": "BFCL v4 (bfcl-eval 2026.3.23)", "license": "Apache-2.0"}
WITH_A_CALL = ("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple", "live_multiple")
WITHOUT = ("irrelevance", "live_irrelevance")
CALLS, NEAR_MISSES = 330, 35
"""Rows of each kind that are taken."""
SAME_TOOL = 2
"""Rows at most that call the same tool."""
LONGEST_TOOLS, LONGEST_QUESTION, LONGEST_ARGUMENTS = 1800, 400, 220
"""Characters. Rows are short, since a CPU trains on them."""
TYPES = {"dict": "object", "float": "number", "tuple": "array", "list": "array", "any": "string"}
"""BFCL's types → JSON schema's; others are the same."""
REFUSALS = (
    "I'm sorry, but none of my tools fits this question.",
    "I'm sorry, but I don't have a tool for that.",
)
FORMAT = """

Use the following format:

Thought: you should always think about what to do
Action: the action to take, should be one of the above tools[{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question
Begin!"""


def main(bfcl: Path) -> None:
    """Write train.jsonl."""
    test, train = (read_lines(HERE / f"{name}.jsonl") for name in ("test", "train"))
    kept = [row for row in train if row["id"].startswith("glaive")]
    held = Held(test, kept)
    calls, misses = (pick(bfcl, categories, held) for categories in (WITH_A_CALL, WITHOUT))
    rows = [*kept, *calls[:CALLS], *misses[:NEAR_MISSES]]
    random.Random(11).shuffle(rows)
    with (HERE / "train.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"train.jsonl: {len(rows)} rows")


class Held:
    """What must not get in: tools of the test rows, and questions that are asked already."""

    def __init__(self, test: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]]) -> None:
        names = [
            name for row in test for name in re.findall(r"^\d+\. (.+?): Call", row["conversations"][0]["value"], re.M)
        ]
        self._tools = {alike(name) for name in names} | {alike(name.split(".")[-1]) for name in names}
        self._questions = {alike(row["conversations"][1]["value"]) for row in (*test, *kept)}

    def admits(self, tools: Sequence[Mapping[str, Any]], question: str) -> bool:
        """Whether a row may be trained on; its question is not asked again."""
        names = {alike(part) for tool in tools for part in (tool["name"], tool["name"].split(".")[-1])}
        if names & self._tools or alike(question) in self._questions:
            return False
        self._questions.add(alike(question))
        return True


def pick(bfcl: Path, categories: Sequence[str], held: Held) -> list[dict[str, Any]]:
    """Rows of some categories, shuffled, of each called (or first) tool SAME_TOOL at most."""
    found = [(tool, row) for category in categories for tool, row in read_category(bfcl, category, held)]
    random.Random(7).shuffle(found)
    seen, rows = Counter[str](), []
    for tool, row in found:
        seen[tool] += 1
        if seen[tool] <= SAME_TOOL:
            rows.append(row)
    return rows


def read_category(bfcl: Path, category: str, held: Held) -> Iterator[tuple[str, dict[str, Any]]]:
    """(the tool that is called, or the first one; the row)."""
    answers = bfcl / "possible_answer" / f"BFCL_v4_{category}.json"
    expected = {each["id"]: each["ground_truth"] for each in read_lines(answers)} if answers.exists() else None
    for entry in read_lines(bfcl / f"BFCL_v4_{category}.json"):
        asked = [message["content"].strip() for message in entry["question"][0] if message["role"] == "user"]
        tools = entry["function"]
        if len(asked) != 1 or not tools or not asked[0].isascii() or len(asked[0]) > LONGEST_QUESTION:
            continue
        if sum(len(describe(1, tool)) for tool in tools) > LONGEST_TOOLS:
            continue
        name, arguments = tools[0]["name"], None
        if expected is not None:
            ((name, allowed),) = expected[entry["id"]][0].items()
            arguments = json.dumps(choose(allowed), ensure_ascii=False)
            if len(arguments) > LONGEST_ARGUMENTS:
                continue
        if held.admits(tools, asked[0]):
            yield name, make_row(f"bfcl_{entry['id']}", tools, asked[0], name, arguments)


def make_row(
    identity: str, tools: Sequence[Mapping[str, Any]], question: str, name: str, arguments: str | None
) -> dict[str, Any]:
    """A row in ms_agent form. arguments: None where no tool fits."""
    if arguments is None:
        refusal = REFUSALS[sum(identity.encode()) % len(REFUSALS)]
        said = f"Thought: I now know the final answer\nFinal Answer: {refusal}"
        kind, synthetic = "nocall", ["final_answer"]
    else:
        said = (
            f"Thought: I need to call the {name} API to answer the question.\nAction: {name}\n"
            f'Action Input: {arguments}\nObservation: {{"status": "ok"}}\n'
            "Thought: I now know the final answer\nFinal Answer: Done."
        )
        kind, synthetic = "call", ["thought", "observation", "final_answer"]
    names = ", ".join(tool["name"] for tool in tools)
    listed = "\n\n".join(describe(number, tool) for number, tool in enumerate(tools, 1))
    system = "Answer the following questions as best you can. You have access to the following APIs:\n" + listed
    turns = [("system", system + FORMAT.format(names=names)), ("user", question), ("assistant", said)]
    return {
        "id": identity,
        "conversations": [{"from": who, "value": text} for who, text in turns],
        "meta": {**SOURCE, "origin": identity, "kind": kind, "synthetic": synthetic},
    }


def describe(number: int, tool: Mapping[str, Any]) -> str:
    """The line of an API, as ms_agent has it."""
    name, schema = tool["name"], tool["parameters"]
    required = schema.get("required", ())
    parameters = []
    for key, value in schema.get("properties", {}).items():
        told = read_property(value)
        head = {"name": key, "description": told.pop("description", ""), "required": str(key in required)}
        parameters.append(head | told)
    use = f"{name}: Call this tool to interact with the {name} API. What is the {name} API useful for?"
    return f"{number}. {use} {tool['description'].strip()} Parameters: {json.dumps(parameters, ensure_ascii=False)}"


def read_property(value: Mapping[str, Any]) -> dict[str, Any]:
    """A property in JSON schema's words, without the items of lists."""
    told: dict[str, Any] = {"description": value["description"]} if "description" in value else {}
    kind = str(value.get("type", "string")).lower()
    told["type"] = TYPES.get(kind, kind)
    if value.get("enum"):
        told["enum"] = value["enum"]
    if value.get("properties"):
        told["properties"] = {key: read_property(each) for key, each in value["properties"].items()}
    return told


def choose(allowed: Mapping[str, Any]) -> dict[str, Any]:
    """Of each argument's allowed values the first one; "" says that it may be absent."""
    return {key: unwrap(values[0]) for key, values in allowed.items() if values and "" not in values}


def unwrap(value: Any) -> Any:
    """BFCL lists the allowed values within objects, too."""
    if isinstance(value, dict):
        return {
            key: unwrap(each[0] if isinstance(each, list) and each else each)
            for key, each in value.items()
            if not (isinstance(each, list) and "" in each)
        }
    return [unwrap(each) for each in value] if isinstance(value, list) else value


def alike(text: str) -> str:
    """Letters and digits only."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def read_lines(file: Path) -> list[Any]:
    """JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
