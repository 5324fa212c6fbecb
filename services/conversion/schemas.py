"""A tool's parameters out of a row: the shared reading of them, refused by conversion's own name."""

from __future__ import annotations

from typing import Any

from services.common import tool_schemas
from services.conversion.refusals import INVALID_PARAMETERS, Refused


def make_schema(raw: Any, name: str) -> dict[str, Any]:
    """{"type": "object", "properties", "required", …}; see `tool_schemas.make_schema`. Raises Refused."""
    try:
        return tool_schemas.make_schema(raw, name)
    except tool_schemas.BadSchema as error:
        raise Refused(INVALID_PARAMETERS, str(error)) from None
