"""What a prompt may be, checked before the engine sees it; the gateway and `generate` ask it alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.common.errors import InvalidData
from services.inference.routes import Target


def check_prompt(body: Mapping[str, Any], target: Target) -> None:
    """Raises InvalidData.

    Reason PROMPT_TOO_LONG: a prompt has more characters than the revision's spec allows; TOOLS_NOT_SUPPORTED: it has `tools`,
    and the revision's engine can neither hold an answer to them nor read calls out of it.
    """
    if body.get("tools") and not target.tools:
        raise InvalidData(
            f"the engine of {target.deployment} takes no `tools` (spec.engine); write them into the prompt, as AgentFabric "
            "does, or serve the model with engine: vllm",
            reason_override="TOOLS_NOT_SUPPORTED",
        )
    if not target.max_prompt_characters:
        return
    try:
        found = _characters(body.get("messages")) + _characters(body.get("prompt"))
    except RecursionError:
        raise InvalidData("the prompt is nested too deeply to be counted") from None
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
