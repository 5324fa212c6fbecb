"""Change each value of the schema alone: some case must render to something else, or the value is named.

A leaf's other value comes from its schema: the other boolean, the next number, another of an enum, one of `examples`. A
case in which the change is a contradiction is passed over; the first case that renders something else is enough.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import yaml
from chart_render import CASES, CHART, ChartError, render

Path = tuple[str, ...]
NOT_READ = {("global",)}
"""Helm's own: values of a chart that has this one as a part."""


@dataclass(frozen=True)
class Leaf:
    """One value that can be changed."""

    path: Path
    schema: dict[str, Any]

    @property
    def name(self) -> str:
        """As in `--set`."""
        return ".".join(self.path)


def walk() -> tuple[int, list[str]]:
    """(how many values there are, those that change no render)."""
    leaves = list(leaves_of(load_schema()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bases = dict(zip(CASES, pool.map(lambda case: render([CASES[case]]), CASES), strict=True))
        idle = list(pool.map(lambda leaf: _is_idle(leaf, bases), leaves))
    return len(leaves), [leaf.name for leaf, is_idle in zip(leaves, idle, strict=True) if is_idle]


def load_schema() -> dict[str, Any]:
    """values.schema.json with its references in place."""
    schema = json.loads((CHART / "values.schema.json").read_text())

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolve(schema["definitions"][node["$ref"].removeprefix("#/definitions/")])
        return {key: resolve(value) for key, value in node.items() if key != "definitions"}

    resolved: dict[str, Any] = resolve(schema)
    return resolved


def leaves_of(schema: dict[str, Any], path: Path = ()) -> Iterator[Leaf]:
    """Every value that has no named values inside; free maps and lists are one value."""
    if path in NOT_READ:
        return
    if "properties" not in schema or "examples" in schema:
        yield Leaf(path, schema)
        return
    for key, inner in schema["properties"].items():
        yield from leaves_of(inner, (*path, key))


def _is_idle(leaf: Leaf, bases: dict[str, str]) -> bool:
    return not any(_changes(leaf, case, bases[case]) for case in _likely_first(leaf))


def _changes(leaf: Leaf, case: str, before: str) -> bool:
    now = _value_in(case, leaf.path)
    for other in _others(leaf, now):
        try:
            if render([CASES[case]], _nest(leaf.path, other)) != before:
                return True
        except ChartError as error:
            if not _is_refusal(error):
                raise ChartError(f"{leaf.name} = {other!r} in {case}: {error}") from None
    return False


def _is_refusal(error: ChartError) -> bool:
    """A contradiction that the schema or a template's `fail` names, not a template that breaks."""
    return "don't meet the specifications" in str(error) or "execution error at" in str(error)


def _others(leaf: Leaf, now: Any) -> Sequence[Any]:
    """Valid values of this leaf that are not the present one."""
    schema = leaf.schema
    if "examples" in schema:
        found = schema["examples"]
    elif "enum" in schema:
        found = schema["enum"]
    elif schema.get("type") == "boolean":
        found = [not now]
    elif schema.get("type") == "integer":
        found = [int(now or 0) + 1, int(now or 0) - 1]
    elif schema.get("type") == "string" and "pattern" not in schema:
        found = ["another"]
    else:
        raise ValueError(f"values.schema.json: {leaf.name} needs `examples`, so that it can be changed")
    return [value for value in found if value != now]


def _likely_first(leaf: Leaf) -> list[str]:
    """The cases that say something near this value, then the others: fewer renders, the same answer."""
    return sorted(CASES, key=lambda case: (-_shared(leaf.path, _own_values(case)), case != "default"))


def _shared(path: Path, values: Any) -> int:
    depth = 0
    for key in path:
        if not isinstance(values, dict) or key not in values:
            break
        values, depth = values[key], depth + 1
    return depth


def _own_values(case: str) -> Any:
    return yaml.safe_load(CASES[case].read_text())


def _value_in(case: str, path: Path) -> Any:
    for values in (_own_values(case), yaml.safe_load((CHART / "values.yaml").read_text())):
        for key in path:
            values = values.get(key) if isinstance(values, dict) else None
        if values is not None:
            return values
    return None


def _nest(path: Path, value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    nested: dict[str, Any] = value
    return nested
