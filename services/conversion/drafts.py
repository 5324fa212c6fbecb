"""Rows that will stand alone under a prompt are rendered when they are read: only their tools are open between the passes.

A draft has its training rows' messages as JSON from the question on; the second pass puts the prompt and the prefix before
them, and nothing is read or rendered again. Of other rows (several rounds, a prompt of their own, a prompt that is shared,
lengths that are counted) the row itself waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import orjson

from services.common.fabric import RENDER_TURN, Call, Tool, language_of
from services.common.fabric_json import BEGIN_USER
from services.conversion.rendering import LAYOUTS
from services.conversion.spec import Spec
from services.conversion.spill import Row

_BEGIN = len(b"[" + BEGIN_USER)


class Part(NamedTuple):
    """One training row of a draft."""

    layout: str
    messages: bytes
    """Their JSON from the user's question on."""
    expected: bytes | None
    """The JSON of the calls that are expected; None: not to be scored."""


class Draft(NamedTuple):
    """A row that is rendered but for its tools."""

    id: str
    file: str
    source: int
    tools: tuple[int | Tool, ...]
    """As `_Packed` has them."""
    language: str
    called: str
    """The tool of its first call; "" when it has none."""
    parts: tuple[Part, ...]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Draft).decode


class Drafter:
    """Makes drafts as a spec asks."""

    def __init__(self, spec: Spec) -> None:
        # Who counts characters or tokens asks for the text of the prompt, and who shares one for the row.
        self._possible = not (stands_together(spec) or spec.tokenizer or spec.max_row_characters)
        self._layouts = [LAYOUTS[source.layout] for source in spec.all_sources]
        self._language = "" if spec.language == "auto" else spec.language

    def draft(self, row: Row, tools: Sequence[int | Tool]) -> bytes | None:
        """A row's draft, packed; None where the row itself must wait. tools: its own, by number where they have one."""
        row_id, file, _, source, listed, rounds, system, instruction = row
        if not self._possible or len(rounds) > 1 or not listed or system is not None or instruction:
            return None
        query, turn, prefix = rounds[0]
        if prefix is not None:
            return None
        language = self._language or language_of(query)
        parts = [
            (layout, orjson.dumps(messages)[_BEGIN:], None if expected is None else expected_json(expected))
            for layout in self._layouts[source]
            for messages, expected in RENDER_TURN[layout]((), query, turn)
        ]
        called = turn.calls[0].name if turn.calls else ""
        return _encode((row_id, file, source, tools, language, called, parts))


def unpack_draft(data: memoryview) -> Draft:
    """The draft that `Drafter.draft` has packed."""
    return _decode(data)


def stands_together(spec: Spec) -> bool:
    """Whether rows may share a prompt."""
    return spec.questions.max > 1 or spec.refusals.ratio > 0


def expected_json(calls: Sequence[Call]) -> bytes:
    """Calls as tools.jsonl has them."""
    return b"[%b]" % b",".join(
        [b'{"name":%b,"arguments":%b}' % (orjson.dumps(c.name), c.arguments.encode()) for c in calls]
    )
