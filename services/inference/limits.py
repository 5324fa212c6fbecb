"""What a prompt may be, checked before the engine sees it; the gateway and `generate` ask it alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.common.errors import InvalidData
from services.inference.routes import Target


def check_prompt(body: Mapping[str, Any], target: Target) -> None:
    """Raises InvalidData, reason PROMPT_TOO_LONG, when a prompt has more characters than the revision's spec allows."""
    if not target.max_prompt_characters:
        return
    found = _characters(body.get("messages")) + _characters(body.get("prompt"))
    if found > target.max_prompt_characters:
        raise InvalidData(
            f"the prompt has {found} characters; {target.deployment} takes {target.max_prompt_characters} "
            "(spec.limits.max_prompt_characters)",
            reason_override="PROMPT_TOO_LONG",
        )


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_characters(v) for k, v in value.items() if k != "role")
    return sum(map(_characters, value)) if isinstance(value, list) else 0
