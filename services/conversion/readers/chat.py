"""Plain chat, such as iic/ms_bench: questions and answers without tools, beside which a model keeps its general skills."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from services.common.fabric import INSTRUCTIONS, TOOLS, Round, Turn
from services.conversion.fabric_grammar import CALL
from services.conversion.literals import unify_line_ends
from services.conversion.react import MARKER
from services.conversion.readers.turns import check_turns, list_turns, row_id, split_rounds
from services.conversion.refusals import UNEXPECTED_TOOL_CALL, Refused
from services.conversion.rows import Conversation

TOOL_KEYS = ("tools", "functions", "tool_calls", "function_call")
TOOL_ROLES = frozenset({"tool", "function", "tool_call", "tool_response", "observation"})
PROMPTS = (
    MARKER,
    *(text.partition("{descs}")[0].strip() for text in TOOLS.values()),
    *(text.partition("{role}")[2].strip() for text in INSTRUCTIONS.values()),
)
"""What tells a prompt of ms_agent or AgentFabric."""
_CALL = re.compile(rf"{CALL.pattern}|<\|startofthink\|>|<tool_call>|✿FUNCTION✿")
"""A call in the text of AgentFabric and ms_agent, of MSAgent-Bench, of Hermes, of Qwen."""


def read(row: Mapping[str, Any]) -> Conversation:
    """A row of plain chat; its system prompt, if any, is kept word for word. Raises Refused."""
    turns = list_turns(row)
    for each in (row, *(turn for turn in turns if isinstance(turn, dict))):
        _refuse_tools(each)
    system, told = split_rounds(turns, needs_system=False)
    if any(prompt in unify_line_ends(system or "") for prompt in PROMPTS):
        raise Refused(UNEXPECTED_TOOL_CALL, "a system prompt of ms_agent or AgentFabric")
    if call := next(filter(None, (_CALL.search(unify_line_ends(text)) for _, text in told)), None):
        raise Refused(UNEXPECTED_TOOL_CALL, f"{call[0][:80]!r}")
    rounds = tuple(Round(query, Turn(answer=text.strip()), "") for query, text in told)
    check_turns([each.turn for each in rounds])
    return Conversation(row_id(row), (), rounds, system or "")


def _refuse_tools(told: Mapping[str, Any]) -> None:
    if found := next((key for key in TOOL_KEYS if told.get(key)), None):
        raise Refused(UNEXPECTED_TOOL_CALL, f"`{found}`")
    role = told.get("from", told.get("role"))
    if isinstance(role, str) and role in TOOL_ROLES:
        raise Refused(UNEXPECTED_TOOL_CALL, f"a turn of the role {role!r}")
