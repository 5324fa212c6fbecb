"""What a server says when it refuses: the message, a reason for programs, and every bad field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status


@dataclass(eq=False)
class ApiError(Exception):
    """An RPC was refused, or a job has failed."""

    message: str
    code: str = "UNKNOWN"
    """A google.rpc.Code, such as "NOT_FOUND"."""
    reason: str = ""
    """ErrorInfo.reason, such as "REQUEST_ID_REUSED"; domain fabrictune.dev."""
    violations: Sequence[tuple[str, str]] = ()
    """(field, what is wrong) for bad input."""

    def __post_init__(self) -> None:
        super().__init__(self.message)

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  {field}: {text}" for field, text in self.violations)])


def from_status(status: status_pb2.Status) -> ApiError:
    """The exception for a google.rpc.Status."""
    reason, violations = "", []
    for detail in status.details:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
            reason = info.reason
        elif detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
            violations = [(v.field, v.description) for v in bad.field_violations]
    return ApiError(status.message, code_pb2.Code.Name(status.code), reason, violations)


def from_rpc(error: grpc.RpcError, endpoint: str) -> ApiError:
    """The exception for a failed call."""
    status = rpc_status.from_call(error)
    if status is not None:
        return from_status(status)
    code = error.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        text = (
            f"no fabrictune server answers at {endpoint}: start one with `fabrictune up`, or name one with --endpoint"
        )
        return ApiError(text, code.name)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ApiError(f"the server at {endpoint} did not answer in time", code.name)
    return ApiError(error.details() or code.name, code.name)
