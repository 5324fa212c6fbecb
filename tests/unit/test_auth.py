"""Who may ask: keys, JWTs, roles, and the refusal to serve in the open."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from services.common.auth import Authenticator, TokenEntry, bearer, check_exposure, is_loopback, read_tokens
from services.common.config import ServerConfig
from services.common.errors import FailedPrecondition, InvalidSpec, PermissionDenied, Unauthenticated

GET = "/fabrictune.v1.TrainingService/GetTrainingJob"
CREATE = "/fabrictune.v1.TrainingService/CreateTrainingJob"
FORGET = "/fabrictune.v1.InferenceService/DeleteRevision"
DELETE = "/fabrictune.v1.ArtifactService/DeleteArtifact"
KEY = rsa.generate_private_key(65537, 2048)


def entry(name: str, role: Any) -> TokenEntry:
    return TokenEntry(name=name, role=role, sha256=hashlib.sha256(f"key of {name}".encode()).hexdigest())


AUTHENTICATOR = Authenticator([entry("ann", "viewer"), entry("bob", "operator"), entry("cy", "admin")])


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("ann", {GET, "/v1/models", "/v1/models/x@a"}),
        ("bob", {GET, CREATE, FORGET, "/v1/models", "/v1/models/x@a", "/v1/chat/completions"}),
        ("cy", None),
    ],
)
def test_roles(name: str, allowed: set[str] | None) -> None:
    for method in (GET, CREATE, FORGET, DELETE, "/v1/models", "/v1/models/x@a", "/v1/chat/completions"):
        if allowed is None or method in allowed:
            assert AUTHENTICATOR.allow(f"key of {name}", method).name == name
        else:
            with pytest.raises(PermissionDenied, match=f"{name} is"):
                AUTHENTICATOR.allow(f"key of {name}", method)


def test_what_people_asked_and_were_told_is_for_admins() -> None:
    method = "/fabrictune.v1.InferenceService/ExportTraffic"
    assert AUTHENTICATOR.allow("key of cy", method).name == "cy"
    for name in ("ann", "bob"):
        with pytest.raises(PermissionDenied, match="needs admin"):
            AUTHENTICATOR.allow(f"key of {name}", method)


def test_unknown_keys_and_unknown_methods_are_denied() -> None:
    for token in ("", "wrong", "a.b.c", "\udcff"):  # the last one is a header's byte that is no text
        with pytest.raises(Unauthenticated):
            AUTHENTICATOR.allow(token, GET)
    with pytest.raises(PermissionDenied, match="no role"):
        AUTHENTICATOR.allow("key of cy", "/other.Service/Anything")


@pytest.mark.parametrize("header", ["", "Basic abc", "Bearer ", "token"])
def test_headers_without_a_bearer_token(header: str) -> None:
    with pytest.raises(Unauthenticated):
        bearer(header)


def test_bearer() -> None:
    assert bearer("bearer abc") == "abc"


@pytest.fixture(scope="module")
def issuer() -> Iterator[str]:
    """An OIDC issuer on loopback."""
    public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(KEY.public_key()))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys = {"keys": [{**public, "kid": "k", "alg": "RS256", "use": "sig"}]}
            told = {"jwks_uri": f"http://127.0.0.1:{server.server_port}/keys"} if "well-known" in self.path else keys
            body = json.dumps(told).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def token_of(issuer: str, **claims: Any) -> str:
    now = int(time.time())
    told = {"iss": issuer, "aud": "fabrictune", "sub": "dora", "exp": now + 60, "role": "operator", **claims}
    return jwt.encode(told, KEY, "RS256", headers={"kid": "k"})


def test_jwts(issuer: str) -> None:
    authenticator = Authenticator([], issuer, "fabrictune", "role")
    assert authenticator.allow(token_of(issuer), CREATE).name == "dora"
    with pytest.raises(PermissionDenied):
        authenticator.allow(token_of(issuer), DELETE)
    with pytest.raises(PermissionDenied, match="claim role is absent"):
        authenticator.allow(token_of(issuer, role=""), GET)
    for wrong in ({"exp": 1}, {"aud": "other"}, {"iss": "http://other"}):
        with pytest.raises(Unauthenticated, match="the JWT is refused"):
            authenticator.allow(token_of(issuer, **wrong), GET)
    forged = jwt.encode({"iss": issuer, "aud": "fabrictune", "role": "admin"}, "x" * 32, "HS256", headers={"kid": "k"})
    with pytest.raises(Unauthenticated):
        authenticator.allow(forged, GET)


def test_a_token_that_is_no_text_is_no_jwt(issuer: str) -> None:
    with pytest.raises(Unauthenticated):
        Authenticator([], issuer, "fabrictune", "role").allow(token_of(issuer) + "\udcff", GET)


def test_an_issuer_that_is_away() -> None:
    with pytest.raises(Unauthenticated, match="does not tell its keys"):
        Authenticator([], "http://127.0.0.1:9", "fabrictune", "role").allow("a.b.c", GET)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- {name: a, role: king, sha256: x}", r"\[0\]\.role"),
        ("- {name: a, role: viewer}", r"\[0\]\.sha256"),
        ("a: [", "not YAML"),
        ("hello", "is wrong"),
    ],
)
def test_bad_tokens_files(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "tokens.yaml").write_text(text)
    with pytest.raises(InvalidSpec, match=said):
        read_tokens(tmp_path / "tokens.yaml")
    with pytest.raises(InvalidSpec, match="cannot be read"):
        read_tokens(tmp_path / "missing.yaml")


def config(**settings: Any) -> ServerConfig:
    return ServerConfig.model_validate({"host": "127.0.0.1", **settings})


def test_loopback_needs_nothing() -> None:
    check_exposure(config())
    check_exposure(config(host="::1"))
    check_exposure(config(host="localhost"))
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("example.org")


def test_beyond_loopback_needs_tls_and_tokens(tmp_path: Path) -> None:
    tls = {"tls_certificate": tmp_path / "c.pem", "tls_key": tmp_path / "k.pem"}
    with pytest.raises(FailedPrecondition, match=r"without TLS files.*and tokens"):
        check_exposure(config(host="0.0.0.0"))
    with pytest.raises(FailedPrecondition, match=r"without tokens"):
        check_exposure(config(host="0.0.0.0", **tls))
    with pytest.raises(FailedPrecondition, match=r"without TLS files"):
        check_exposure(config(host="0.0.0.0", tokens_file=tmp_path / "t.yaml"))
    check_exposure(config(host="0.0.0.0", **tls, tokens_file=tmp_path / "t.yaml"))
    check_exposure(config(host="0.0.0.0", insecure=True))
    with pytest.raises(InvalidSpec, match="TLS needs both"):
        check_exposure(config(tls_key=tmp_path / "k.pem"))
