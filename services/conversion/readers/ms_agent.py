"""ms_agent's ReAct rows: iic/ms_agent and what is written in its form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.common.fabric import Round
from services.conversion.react import parse_system_prompt, parse_turn
from services.conversion.readers.turns import check_turns, list_turns, row_id, split_rounds
from services.conversion.rows import Conversation


def read(row: Mapping[str, Any]) -> Conversation:
    """A row in ms_agent's form. Raises Refused."""
    system, rounds = split_rounds(list_turns(row))
    tools = parse_system_prompt(system or "")
    told = [Round(query, parse_turn(text, tools)) for query, text in rounds]
    check_turns([each.turn for each in told])
    return Conversation(row_id(row), tools, tuple(told))
