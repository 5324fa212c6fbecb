"""Who may ask: static API keys (hashed at rest) or OIDC JWTs, three roles, deny by default.

A server on loopback asks nobody unless it has been given tokens or an issuer. One that listens beyond loopback needs TLS
files and one of the two, or refuses to start (`check_exposure`). The gateway asks the same Authenticator.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import jwt
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from services.common.config import ServerConfig
from services.common.errors import FailedPrecondition, InvalidSpec, PermissionDenied, Unauthenticated
from services.common.logs import get_logger
from services.common.validation import violations_of
from services.common.watched_files import WatchedFiles


class Role(IntEnum):
    """Each may do what the ones before it may."""

    VIEWER = 1
    OPERATOR = 2
    ADMIN = 3


# The first pattern that a method's name matches decides; a method that matches none is for nobody.
RULES: Sequence[tuple[re.Pattern[str], Role]] = (
    (re.compile(r"/grpc\.reflection\.v1(alpha)?\.ServerReflection/.*"), Role.VIEWER),
    (re.compile(r"/fabrictune\.v1\.\w+/(Get|List|Watch|Preview|Estimate|CreateDownload)\w*"), Role.VIEWER),
    (re.compile(r"/fabrictune\.v1\.\w+/(Create|Seal|Cancel|Resume|Update|Generate)\w*"), Role.OPERATOR),
    # What people asked and were told.
    (re.compile(r"/fabrictune\.v1\.\w+/ExportTraffic"), Role.ADMIN),
    # What an operator has started, an operator may forget; artifacts and deployments are an admin's.
    (re.compile(r"/fabrictune\.v1\.\w+/Delete(\w+Job|PipelineRun|Revision)"), Role.OPERATOR),
    (re.compile(r"/fabrictune\.v1\.\w+/Delete\w*"), Role.ADMIN),
    (re.compile(r"/v1/models(/.*)?"), Role.VIEWER),
    (re.compile(r"/v1/(chat/)?completions"), Role.OPERATOR),
)
OPEN_PREFIX = "/grpc.health.v1.Health/"


class TokenEntry(BaseModel):
    """One API key in the tokens file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    role: Literal["viewer", "operator", "admin"]
    sha256: str
    """Lower-case hex of the key's SHA-256; keys are 32 random bytes, so no salt is needed."""


@dataclass(frozen=True)
class Caller:
    """Somebody who has proved who they are."""

    name: str
    role: Role


class Authenticator:
    """Turns a bearer token into a Caller."""

    def __init__(
        self, tokens: Sequence[TokenEntry], issuer: str = "", audience: str = "", roles_claim: str = "",
        tokens_file: Path | None = None,
    ) -> None:  # fmt: skip
        """tokens_file: where the tokens come from; they are read again when it changes."""
        self._tokens, self._file = tokens, tokens_file
        self._watched = WatchedFiles(tokens_file) if tokens_file else WatchedFiles()
        self._issuer, self._audience, self._roles_claim = issuer, audience, roles_claim
        self._keys: jwt.PyJWKClient | None = None

    def identify(self, token: str) -> Caller:
        """Who holds this token. Raises Unauthenticated. May ask the issuer for its keys, once."""
        token = token.encode(errors="replace").decode()  # a header's bytes need not be text
        if self._file is not None and self._watched.changed():
            self._read_again(self._file)
        digest = hashlib.sha256(token.encode()).hexdigest()
        for entry in self._tokens:
            if hmac.compare_digest(entry.sha256.lower(), digest):
                return Caller(entry.name, Role[entry.role.upper()])
        if self._issuer and token.count(".") == 2:
            return self._identify_jwt(token)
        raise Unauthenticated("the token is not known here; send 'authorization: Bearer TOKEN' with a valid one")

    def allow(self, token: str, method: str) -> Caller:
        """The caller, if it may call `method` ("/package.Service/Name" or an HTTP path).

        Raises Unauthenticated, PermissionDenied.
        """
        caller = self.identify(token)
        needed = next((role for pattern, role in RULES if pattern.fullmatch(method)), None)
        if needed is None or caller.role < needed:
            wanted = needed.name.lower() if needed else "no role"
            raise PermissionDenied(f"{caller.name} is {caller.role.name.lower()}; {method} needs {wanted}")
        return caller

    def _read_again(self, file: Path) -> None:
        try:
            self._tokens = read_tokens(file)
        except InvalidSpec as error:  # a slip of somebody who edits it must not lock everybody out
            get_logger("auth").error("the tokens cannot be renewed; the last ones stay", error=str(error))

    def _identify_jwt(self, token: str) -> Caller:
        try:
            if self._keys is None:
                self._keys = jwt.PyJWKClient(_find_jwks(self._issuer), timeout=5)
            key = self._keys.get_signing_key_from_jwt(token)
            claims: dict[str, Any] = jwt.decode(
                token, key.key, algorithms=["RS256", "ES256"], audience=self._audience, issuer=self._issuer
            )
        except jwt.PyJWTError as error:
            raise Unauthenticated(f"the JWT is refused: {error}") from None
        role = str(claims.get(self._roles_claim, "")).upper()
        if role not in Role.__members__:
            raise PermissionDenied(
                f"the JWT's claim {self._roles_claim} is {role.lower() or 'absent'}; roles are viewer, operator, admin"
            )
        return Caller(str(claims.get("sub", "?")), Role[role])


def load_authenticator(config: ServerConfig) -> Authenticator | None:
    """The server's Authenticator, or None when it has neither tokens nor an issuer. Raises InvalidSpec."""
    if config.tokens_file is None and not config.oidc_issuer:
        return None
    tokens = read_tokens(config.tokens_file) if config.tokens_file else []
    return Authenticator(tokens, config.oidc_issuer, config.oidc_audience, config.oidc_roles_claim, config.tokens_file)


def read_tokens(file: Path) -> list[TokenEntry]:
    """The entries of a tokens file: a YAML list of {name, role, sha256}. Raises InvalidSpec."""
    try:
        return TypeAdapter(list[TokenEntry]).validate_python(yaml.safe_load(file.read_text()) or [])
    except OSError as error:
        raise InvalidSpec(f"the tokens file {file} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InvalidSpec(f"the tokens file {file} is not YAML: {error}") from None
    except ValidationError as error:
        raise InvalidSpec(f"the tokens file {file} is wrong", violations=violations_of(error, "")) from None


def check_exposure(config: ServerConfig) -> None:
    """Refuse to serve beyond loopback without TLS and tokens. Raises FailedPrecondition, InvalidSpec."""
    if bool(config.tls_certificate) != bool(config.tls_key):
        raise InvalidSpec("TLS needs both FABRICTUNE_TLS_CERTIFICATE and FABRICTUNE_TLS_KEY")
    if is_loopback(config.host) or config.insecure:
        return
    missing = []
    if not config.tls_certificate:
        missing.append("TLS files (FABRICTUNE_TLS_CERTIFICATE, FABRICTUNE_TLS_KEY)")
    if not config.tokens_file and not config.oidc_issuer:
        missing.append("tokens (FABRICTUNE_TOKENS_FILE or FABRICTUNE_OIDC_ISSUER)")
    if missing:
        raise FailedPrecondition(
            f"refusing to listen on {config.host} without {' and '.join(missing)}: anybody who reaches it could train and "
            "delete. Listen on 127.0.0.1, give what is missing, or say FABRICTUNE_INSECURE=true if you mean it"
        )


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bearer(header: str) -> str:
    """The token in an authorization header. Raises Unauthenticated."""
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("this server asks for a token: send 'authorization: Bearer TOKEN'")
    return token.strip()


def _find_jwks(issuer: str) -> str:
    import httpx

    try:
        answer = httpx.get(issuer.rstrip("/") + "/.well-known/openid-configuration", timeout=5)
        return str(answer.raise_for_status().json()["jwks_uri"])
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise Unauthenticated(f"the issuer {issuer} does not tell its keys: {error}") from None
