"""The messages of a chat with tools as rounds: a question, the calls with their results, and an answer.

As conversion's reader of OpenAI rows does, but what is wrong is gathered, not refused at the first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from services.common.errors import Violation
from services.common.fabric import FORBIDDEN_IN_NAMES, Call, Round, Turn
from services.inference.calls import escape_halves


def read_messages(told: Any, bad: list[Violation]) -> tuple[str, list[Round]]:
    """(the system's text, the rounds). All system messages are one instruction, wherever they stand. bad: takes what is wrong."""
    if not isinstance(told, list) or not told:
        bad.append(Violation("messages", "must be a list with one message or more"))
        return "", []
    instructions: list[str] = []
    rounds: list[_Round] = []
    for number, message in enumerate(told):
        field = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("system", "developer"):
            instructions.append(_read_text(message, field, bad))
        elif role == "user":
            rounds.append(_Round(_read_text(message, field, bad)))
        elif role not in ("assistant", "tool"):
            bad.append(Violation(f"{field}.role", f"must be system, user, assistant or tool, not {str(role)[:60]!r}"))
        elif not rounds:
            bad.append(Violation(field, f"is the {role}'s, before any of the user's"))
        elif role == "tool":
            rounds[-1].add_result(message, _read_text(message, field, bad), field, bad)
        else:
            rounds[-1].add_turn(message, _read_text(message, field, bad), field, bad)
    if not rounds:
        bad.append(Violation("messages", "have none of the user's"))
    return "\n\n".join(filter(None, instructions)), [each.close(bad) for each in rounds]


class _Round:
    """A question and what has been done about it so far."""

    def __init__(self, query: str) -> None:
        self._query = query
        self._calls: list[Call] = []
        self._waiting: dict[str, tuple[int, str]] = {}
        """Id of a call without a result → (its place, the field that made it)."""
        self._said: list[str] = []
        """Since the last call; joined once, for a history may hold tens of thousands of messages."""

    def add_turn(self, message: Mapping[str, Any], text: str, field: str, bad: list[Violation]) -> None:
        """What the assistant said, and the calls that it made."""
        if text := text.strip():
            self._said.append(text)
        calls = list(_read_calls(message, field, bad))
        for number, (identity, call) in enumerate(calls):
            if identity in self._waiting:
                bad.append(
                    Violation(f"{field}.tool_calls[{number}].id", f"{identity[:60]!r} is the id of another call")
                )
            self._waiting[identity] = len(self._calls), f"{field}.tool_calls[{number}]"
            self._calls.append(call._replace(lead="" if number else "\n".join(self._said)))
        if calls:
            self._said = []

    def add_result(self, message: Mapping[str, Any], text: str, field: str, bad: list[Violation]) -> None:
        """A tool's result; without an id it is that of the only call that waits for one."""
        identity = message.get("tool_call_id")
        if identity is None and len(self._waiting) == 1:
            identity = next(iter(self._waiting))
        if not isinstance(identity, str) or identity not in self._waiting:
            told = str(identity)[:60]
            bad.append(Violation(f"{field}.tool_call_id", f"{told!r} is not the id of a call that waits for a result"))
            return
        place, _ = self._waiting.pop(identity)
        self._calls[place] = self._calls[place]._replace(observation=text)

    def close(self, bad: list[Violation]) -> Round:
        """The round as it is rendered."""
        for identity, (_, field) in self._waiting.items():
            bad.append(
                Violation(field, f"has no result: a message of the role tool with tool_call_id {identity[:60]!r}")
            )
        return Round(self._query, Turn(tuple(self._calls), "\n".join(self._said)))


def _read_calls(message: Mapping[str, Any], field: str, bad: list[Violation]) -> Iterator[tuple[str, Call]]:
    if message.get("function_call"):
        bad.append(Violation(f"{field}.function_call", "came before tool_calls and has no id; use tool_calls"))
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        bad.append(Violation(f"{field}.tool_calls", "must be a list"))
        return
    for number, call in enumerate(calls):
        place = f"{field}.tool_calls[{number}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(call.get("id"), str):
            bad.append(Violation(place, "must be {id, type: function, function: {name, arguments}}"))
            continue
        name, arguments = function.get("name"), _read_arguments(function.get("arguments"))
        if not isinstance(name, str) or not name.strip() or FORBIDDEN_IN_NAMES & set(name):
            bad.append(Violation(f"{place}.function.name", f"{str(name)[:60]!r} is no tool's name"))
        if arguments is None:
            bad.append(Violation(f"{place}.function.arguments", "must be the JSON text of an object"))
        yield call["id"], Call(str(name), arguments or "{}")


def _read_arguments(told: Any) -> str | None:
    """One line of JSON, as rows have it; None when it is no object."""
    try:
        value = json.loads(told) if isinstance(told, str) and told.strip() else told or {}
    except (ValueError, RecursionError):
        return None
    return escape_halves(json.dumps(value, ensure_ascii=False)) if isinstance(value, dict) else None


def _read_text(message: Mapping[str, Any], field: str, bad: list[Violation]) -> str:
    """Text, or a list of text parts; null is no text."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content if content is not None else ""]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    known = [text for text in texts if isinstance(text, str)]
    if len(known) < len(texts):
        bad.append(Violation(f"{field}.content", "must be text, or a list of {type: text, text}"))
    return "".join(known)
