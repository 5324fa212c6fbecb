"""The list of turns that rows of most forms hold: `conversations` (from/value) or `messages` (role/content)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from services.common.errors import enumerated
from services.common.fabric import Turn
from services.conversion.literals import decode_literal
from services.conversion.refusals import EMPTY_CONVERSATIONS, INCOMPLETE_TURN, NO_SYSTEM_TURN, ROLE_ORDER, Refused


def list_turns(row: Mapping[str, Any]) -> list[Any]:
    """The turns as they are; text is read as the Python literal that the published data set holds. Raises Refused."""
    turns = row.get("conversations", row.get("messages"))
    if isinstance(turns, str):
        try:
            turns = decode_literal(turns)
            orjson.dumps(turns)  # half a surrogate pair, written "\ud800", is no text, and bytes are none
        except (ValueError, TypeError, RecursionError):
            raise Refused(EMPTY_CONVERSATIONS, "the text in `conversations` is no Python list") from None
    if not isinstance(turns, list) or not turns:
        raise Refused(EMPTY_CONVERSATIONS, "no turns")
    return turns


def read_turn(turn: Any) -> tuple[str, str]:
    """(role, text) of one turn. Raises Refused."""
    if not isinstance(turn, dict):
        raise Refused(EMPTY_CONVERSATIONS, "a turn that is no object")
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(role, str) or not isinstance(text, str):
        raise Refused(EMPTY_CONVERSATIONS, "a turn without a role and text")
    return role, text


def split_rounds(turns: Sequence[Any], needs_system: bool = True) -> tuple[str | None, list[tuple[str, str]]]:
    """(system prompt, [(user's text, assistant's text)]); None where there is no system turn and none is needed."""
    told: list[tuple[str, str]] = []
    for turn in turns:
        # Nearly all turns are of this form, and a function's call costs more than the look at it.
        if type(turn) is dict and type(turn.get("from")) is str and type(turn.get("value")) is str:
            told.append((turn["from"], turn["value"]))
        else:
            told.append(read_turn(turn))
    system: str | None = None
    if told[0][0] == "system":
        system, told = told[0][1], told[1:]
    elif needs_system:
        raise Refused(NO_SYSTEM_TURN, f"the first turn is the {told[0][0]}'s")
    if len(told) == 2 and told[0][0] == "user" and told[1][0] == "assistant":
        return system, [(told[0][1], told[1][1])]
    roles = [role for role, _ in told]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise Refused(ROLE_ORDER, enumerated(roles, 8) or "no turns after the system's")
    return system, [(told[i][1], told[i + 1][1]) for i in range(0, len(told), 2)]


def row_id(row: Mapping[str, Any]) -> str:
    """The row's own id as text, "" when it has none."""
    return str(row.get("id") or "")


def check_turns(turns: Sequence[Turn]) -> None:
    """Refuse what could not be rendered: a turn that says nothing, a call without a result that is not the very last one."""
    for number, turn in enumerate(turns, 1):
        calls, answer = turn
        if not calls and not answer:
            raise Refused(INCOMPLETE_TURN, f"assistant turn {number} is empty")
        for call in calls[:-1] if number == len(turns) and not answer else calls:
            if call.observation is None:
                raise Refused(INCOMPLETE_TURN, f"the call of {call.name} in assistant turn {number} has no result")
