"""One tree of errors from the GPU to the client.

    FabrictuneError                 INTERNAL             exit 70
    ├── InvalidSpec                 INVALID_ARGUMENT     exit 64   names every bad field at once
    ├── InvalidData                 INVALID_ARGUMENT     exit 65   rows, weights or files that cannot be used
    ├── NotFound                    NOT_FOUND            exit 66
    ├── AlreadyExists               ALREADY_EXISTS       exit 64
    ├── FailedPrecondition          FAILED_PRECONDITION  exit 78   something must be done first
    │   └── GateNotMet                                   exit 78
    ├── DataLoss                    DATA_LOSS            exit 65   a hash differs, a file is truncated
    ├── ResourceExhausted           RESOURCE_EXHAUSTED   exit 75   disk, memory, quota, queue
    ├── Unavailable                 UNAVAILABLE          exit 75   try again
    ├── DeadlineExceeded            DEADLINE_EXCEEDED    exit 78
    ├── Unauthenticated             UNAUTHENTICATED      exit 77
    ├── PermissionDenied            PERMISSION_DENIED    exit 77
    ├── Cancelled                   CANCELLED            exit 143
    └── WorkerLost                  ABORTED              exit 75   a process or its node has gone

Each class carries its google.rpc.Code, the reason of its google.rpc.ErrorInfo and the exit code (sysexits.h) of a
worker that ends with it. Errors are raised where the fact is known and mapped here, once. This module knows protobuf,
not gRPC: workers use it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

DOMAIN = "fabrictune.dev"


@dataclass(frozen=True)
class Violation:
    """One bad field. field: its path, such as "spec.sources[0].uri"; description: what is wrong and what to do."""

    field: str
    description: str


@dataclass(eq=False)
class FabrictuneError(Exception):
    """Something went wrong; `message` says what, where, and what to do."""

    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: Sequence[Violation] = ()
    reason_override: str = ""
    retry_seconds: float = 0
    """When another attempt may succeed: a RetryInfo in the status, Retry-After in HTTP. 0: nothing is known."""

    code: ClassVar[int] = code_pb2.INTERNAL
    reason: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 70

    def __post_init__(self) -> None:
        super().__init__(self.message)

    def __str__(self) -> str:
        if not self.violations:
            return self.message
        return "\n".join([self.message, *(f"  {v.field}: {v.description}" for v in self.violations)])

    def __reduce__(self) -> tuple[Any, ...]:
        plain = (self.message, dict(self.metadata), tuple(self.violations), self.reason_override, self.retry_seconds)
        return type(self), plain

    def to_status(self) -> status_pb2.Status:
        """The error as a google.rpc.Status with ErrorInfo, for bad input BadRequest, and RetryInfo when it is known."""
        info = error_details_pb2.ErrorInfo(
            reason=self.reason_override or self.reason, domain=DOMAIN, metadata=dict(self.metadata)
        )
        details = [_pack(info)]
        if self.violations:
            bad = error_details_pb2.BadRequest()
            for violation in self.violations:
                bad.field_violations.add(field=violation.field, description=violation.description)
            details.append(_pack(bad))
        if self.retry_seconds:
            hint = error_details_pb2.RetryInfo()
            hint.retry_delay.FromMilliseconds(int(self.retry_seconds * 1000))
            details.append(_pack(hint))
        return status_pb2.Status(code=self.code, message=self.message, details=details)


class InvalidSpec(FabrictuneError):
    """A request, a YAML file or a flag is wrong; `violations` names every bad field."""

    code, reason, exit_code = code_pb2.INVALID_ARGUMENT, "INVALID_SPEC", 64


class InvalidData(FabrictuneError):
    """Rows, weights or files that cannot be used."""

    code, reason, exit_code = code_pb2.INVALID_ARGUMENT, "INVALID_DATA", 65


class NotFound(FabrictuneError):
    """No such job, artifact, preset or file."""

    code, reason, exit_code = code_pb2.NOT_FOUND, "NOT_FOUND", 66


class AlreadyExists(FabrictuneError):
    """The name is taken by something else."""

    code, reason, exit_code = code_pb2.ALREADY_EXISTS, "ALREADY_EXISTS", 64


class FailedPrecondition(FabrictuneError):
    """Something must be done first; the message says what."""

    code, reason, exit_code = code_pb2.FAILED_PRECONDITION, "FAILED_PRECONDITION", 78


class GateNotMet(FailedPrecondition):
    """An evaluation's figures are below its thresholds."""

    reason = "GATE_NOT_MET"


class DataLoss(FabrictuneError):
    """Stored bytes are not what they should be: a hash differs or a file is truncated."""

    code, reason, exit_code = code_pb2.DATA_LOSS, "DATA_LOSS", 65


class ResourceExhausted(FabrictuneError):
    """Too little disk, memory or room in a queue."""

    code, reason, exit_code = code_pb2.RESOURCE_EXHAUSTED, "RESOURCE_EXHAUSTED", 75


class Unavailable(FabrictuneError):
    """A server or the store cannot be reached at present."""

    code, reason, exit_code = code_pb2.UNAVAILABLE, "UNAVAILABLE", 75


class DeadlineExceeded(FabrictuneError):
    """A queue or run timeout has passed."""

    code, reason, exit_code = code_pb2.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", 78


class Unauthenticated(FabrictuneError):
    """Credentials are missing or wrong."""

    code, reason, exit_code = code_pb2.UNAUTHENTICATED, "UNAUTHENTICATED", 77


class PermissionDenied(FabrictuneError):
    """The caller's role does not allow it, or the store refuses the key."""

    code, reason, exit_code = code_pb2.PERMISSION_DENIED, "PERMISSION_DENIED", 77


class Cancelled(FabrictuneError):
    """Told to stop."""

    code, reason, exit_code = code_pb2.CANCELLED, "CANCELLED", 143


class WorkerLost(FabrictuneError):
    """A worker's process, pod or node has gone without an outcome."""

    code, reason, exit_code = code_pb2.ABORTED, "WORKER_LOST", 75


NEVER_RETRY = frozenset({64, 65, 66, 77, 78})
"""Exit codes after which another attempt would end the same way."""


def enumerated(names: Sequence[str], at_most: int = 5) -> str:
    """The names as a message lists them: "a, b, c"; of many the first at_most: "a, b and 7 more"."""
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")


def internal_status(request_id: str) -> status_pb2.Status:
    """What a client may know of an unknown exception: a request id to ask the operator about, nothing else."""
    error = FabrictuneError(
        f"internal error; the server's log has it under request {request_id}", {"request_id": request_id}
    )
    return error.to_status()


def _pack(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
