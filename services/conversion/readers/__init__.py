"""One reader for each form that rows come in. A source names its form; a row that has another one is refused, never guessed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from services.conversion.readers import agentfabric, chat, ms_agent, openai_tools
from services.conversion.rows import Conversation

READERS: Mapping[str, Callable[[Mapping[str, Any]], Conversation]] = {
    "ms_agent": ms_agent.read,
    "agentfabric": agentfabric.read,
    "openai": openai_tools.read,
    "chat": chat.read,
}
"""A source's `format` → row → conversation. Readers raise Refused."""
