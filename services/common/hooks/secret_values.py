"""The Secrets that an installation makes for itself, as values. Pure but for the randomness in them.

Servers get hashes of tokens; the tokens themselves lie in a Secret each, so that RBAC can give out one of them.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import yaml

from services.common.hooks.certificates import issue

ROLES: Mapping[str, str] = {"admin": "admin", "services": "operator"}
"""Whose token: its Secret is {release}-token-{name} → what it may do."""


@dataclass(frozen=True)
class SecretValue:
    """A Secret to be made."""

    name: str
    data: Mapping[str, bytes] = field(repr=False)
    type: str = "Opaque"


def server_names(release: str, namespace: str, services: Sequence[str], hosts: Sequence[str]) -> list[str]:
    """All that the servers are called, inside the cluster and through a port-forward."""
    short = [release, *(f"{release}-{service}" for service in services)]
    ends = ("", f".{namespace}", f".{namespace}.svc", f".{namespace}.svc.cluster.local")
    inside = [f"{name}{end}" for name in short for end in ends]
    return list(dict.fromkeys([*inside, "localhost", "127.0.0.1", *hosts]))


def tls_secret(name: str, names: Sequence[str], now: datetime) -> SecretValue:
    """A new certificate with its authority."""
    issued = issue(names, now)
    data = {"tls.crt": issued.certificate, "tls.key": issued.key, "ca.crt": issued.authority}
    return SecretValue(name, data, "kubernetes.io/tls")


def token_secret(name: str) -> SecretValue:
    """A new API key: 32 random bytes."""
    return SecretValue(name, {"token": f"ft_{secrets.token_urlsafe(32)}".encode()})


def tokens_secret(name: str, tokens: Mapping[str, bytes]) -> SecretValue:
    """The tokens file of the servers, which holds hashes only: the same for the same tokens. tokens: of ROLES."""
    entries = [
        {"name": holder, "role": role, "sha256": hashlib.sha256(tokens[holder]).hexdigest()}
        for holder, role in ROLES.items()
    ]
    return SecretValue(name, {"tokens.yaml": yaml.safe_dump(entries, sort_keys=False).encode()})


def store_secret(name: str) -> SecretValue:
    """A new key of the object store."""
    return SecretValue(
        name, {"access-key": secrets.token_hex(10).encode(), "secret-key": secrets.token_urlsafe(30).encode()}
    )
