"""Names that commands know before they call a server."""

from __future__ import annotations

from fabrictune.v1 import job_pb2

SUCCEEDED, FAILED, CANCELLED = job_pb2.Execution.SUCCEEDED, job_pb2.Execution.FAILED, job_pb2.Execution.CANCELLED
ENDED = (SUCCEEDED, FAILED, CANCELLED)
COLLECTIONS = ("datasets", "models", "adapters", "reports")
"""Of artifacts, by what they are."""
