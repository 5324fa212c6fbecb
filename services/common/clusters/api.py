"""The API server as the chart's hooks ask it, one request after another: a client, and refusals as our errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx2  # what lightkube 1.0 speaks HTTP with; its errors are these
from lightkube import Client
from lightkube.core.exceptions import ApiError, ConfigError

from services.common.errors import FailedPrecondition, PermissionDenied, Unavailable


def open_client(namespace: str) -> Client:
    """A client for one namespace: the pod's ServiceAccount, else KUBECONFIG. Raises FailedPrecondition."""
    try:
        return Client(namespace=namespace)
    except ConfigError as error:
        raise FailedPrecondition(
            f"no Kubernetes can be found: {error}. In a pod the ServiceAccount is used (is its token mounted?), elsewhere "
            "KUBECONFIG"
        ) from None


@contextmanager
def explained(verb: str, resource: str, what: str = "") -> Iterator[None]:
    """Turn what goes wrong inside into PermissionDenied or Unavailable. verb, resource: a right as a Role names it,
    such as "create", "secrets"; what: the object's name.
    """
    tried = f"{verb} {resource}" + (f" {what}" if what else "")
    try:
        yield
    except ApiError as error:
        said = error.status.message or error.status.reason or ""
        if error.status.code in (401, 403):
            raise PermissionDenied(
                f"the API server refuses to {tried}: {said}. The hook's Role must hold the verb {verb!r} for {resource}, "
                "unless an admission policy or a quota is what forbids it"
            ) from None
        raise Unavailable(f"cannot {tried}: the API server answers {error.status.code} {said}") from None
    except httpx2.HTTPStatusError as error:
        raise Unavailable(f"cannot {tried}: the API server answers {error.response.status_code}") from None
    except httpx2.HTTPError as error:
        raise Unavailable(
            f"cannot {tried}: the API server does not answer ({type(error).__name__}); does a NetworkPolicy keep this pod "
            "from it?"
        ) from None
