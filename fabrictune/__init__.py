"""The client of fabrictune: `Client` talks to a server, `ApiError` is what it raises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabrictune.errors import ApiError

if TYPE_CHECKING:
    from fabrictune.client import Client

__all__ = ["ApiError", "Client"]


def __getattr__(name: str) -> Any:
    """`Client` brings gRPC with it: whoever only imports a module of this package starts without (PEP 562)."""
    if name == "Client":
        from fabrictune.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
