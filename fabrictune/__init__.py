"""The client of fabrictune: `Client` talks to a server, `ApiError` is what it raises."""

from __future__ import annotations

from fabrictune.client import Client
from fabrictune.errors import ApiError

__all__ = ["ApiError", "Client"]
