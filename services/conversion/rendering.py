"""A row becomes training rows: alone in its layouts, or with the questions of other rows under one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.common.fabric import (
    Example,
    Round,
    Tool,
    language_of,
    render_rows,
    render_system,
    render_together,
)
from services.common.fabric_json import render_system_json
from services.conversion.mixture import pick_one
from services.conversion.spec import Spec
from services.conversion.spill import Row

LAYOUTS = {"split": ("split",), "inline": ("inline",), "both": ("split", "inline")}


class Renderer:
    """Renders rows as a spec asks."""

    def __init__(self, spec: Spec, as_json: bool = False) -> None:
        """as_json: prompts that are made of tools are `orjson.Fragment`s, for who only writes them."""
        self.spec, self.sources = spec, spec.all_sources
        self._render_system = render_system_json if as_json else render_system
        self._roles = {language: in_language(spec.instructions, language) for language in ("zh", "en")}

    def language(self, row: Row) -> str:
        """The language that AgentFabric would speak: the last question's, unless the spec names one."""
        return self.spec.language if self.spec.language != "auto" else language_of(row.rounds[-1].query)

    def alone(self, row: Row, tools: Sequence[Tool], only: str = "") -> list[tuple[str, Example]]:
        """(layout, training row) of a row by itself. only: this layout instead of the source's."""
        language = self.language(row)
        system = self.system(row, tools, language)
        layouts = (only,) if only else LAYOUTS[self.sources[row.source].layout]
        return [(layout, e) for layout in layouts for e in render_rows(layout, system, tools, row.rounds, language)]

    def together(self, first: Row, tools: Sequence[Tool], rounds: Sequence[Round]) -> Example:
        """Several questions under one prompt, in the first row's language and role."""
        language = self.language(first)
        return Example(render_together(self.system(first, tools, language), tools, rounds, language), None)

    def system(self, row: Row, tools: Sequence[Tool], language: str) -> Any:
        """The system prompt: the row's own, or AgentFabric's."""
        if row.system is not None:
            return row.system
        return self._render_system(tools, row.instruction or self.role(row.id, language), language, self.spec.wording)

    def role(self, row_id: str, language: str) -> str:
        """The role of a row that tells none."""
        return pick_one(self._roles[language], self.spec.seed, "role", row_id)

    def may_share(self, row: Row) -> bool:
        """Whether a row may share a prompt: one question, over tools that we print, answered by a call or in plain words."""
        return len(row.rounds) == 1 and bool(row.tools) and row.system is None and not row.instruction

    def is_too_long(self, example: Example) -> bool:
        """Whether it is longer than the spec allows."""
        return bool(self.spec.max_row_characters) and count_characters(example) > self.spec.max_row_characters


def count_characters(example: Example) -> int:
    """Characters of all messages."""
    return sum(len(m["content"]) for m in example.messages)


def in_language(texts: Sequence[str], language: str) -> Sequence[str]:
    """Those in the language; all when there are none."""
    return [text for text in texts if language_of(text) == language] or texts
