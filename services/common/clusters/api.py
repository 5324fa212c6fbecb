"""The API server: a client for the chart's hooks, and what anybody's refused or lost request means, as our errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx2  # what lightkube 1.0 speaks HTTP with; its errors are these
from lightkube import Client
from lightkube.core.exceptions import ApiError, ConfigError

from services.common.errors import (
    FabrictuneError,
    FailedPrecondition,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)


def open_client(namespace: str) -> Client:
    """A client for one namespace: the pod's ServiceAccount, else KUBECONFIG. Raises FailedPrecondition."""
    try:
        return Client(namespace=namespace)
    except ConfigError as error:
        raise no_cluster(error) from None


def no_cluster(error: ConfigError) -> FailedPrecondition:
    """What to do when no client can be made."""
    return FailedPrecondition(
        f"no Kubernetes can be found: {error}. In a pod the ServiceAccount is used (is its token mounted?), elsewhere "
        "KUBECONFIG"
    )


@contextmanager
def explained(verb: str, resource: str, what: str = "") -> Iterator[None]:
    """Turn what goes wrong inside into one of our errors. verb, resource: a right as a Role names it, such as "create",
    "secrets"; what: the object's name.
    """
    tried = f"{verb} {resource}" + (f" {what}" if what else "")
    try:
        yield
    except ApiError as error:
        raise refusal(error.status.code or 0, error.status.message or error.status.reason or "", tried) from None
    except httpx2.HTTPStatusError as error:
        raise Unavailable(f"cannot {tried}: the API server answers {error.response.status_code}") from None
    except httpx2.HTTPError as error:
        raise Unavailable(
            f"cannot {tried}: the API server does not answer ({type(error).__name__}); does a NetworkPolicy keep this pod "
            "from it?"
        ) from None


def refusal(code: int, said: str, tried: str) -> FabrictuneError:
    """What the API server's answer means. tried: such as "create jobs training-x"."""
    lower = said.lower()
    if "exceeded quota" in lower:
        return ResourceExhausted(f"cannot {tried}: {said}. Raise the namespace's ResourceQuota, or ask for less")
    if "failed calling webhook" in lower:
        return Unavailable(f"cannot {tried}: an admission webhook does not answer. {said}")
    if code in (401, 403):
        verb, resource, *_ = tried.split()
        return PermissionDenied(
            f"the API server refuses to {tried}: {said}. The Role must hold the verb {verb!r} for {resource} (`helm upgrade` "
            "restores it), unless an admission policy is what forbids it"
        )
    if code in (400, 422):
        return FailedPrecondition(f"cannot {tried}, the template does not fit: {said}")
    return Unavailable(f"cannot {tried}: the API server answers {code} {said}")
