"""`python -m services.common.hooks.selfcheck`: what `helm test` runs, with the pipeline server's own settings.

Looks at everything, also after something has failed, a line each: what is fine, and for what is not, what to do. Ends with 0
or 78. It changes nothing but an object of its own in the store, which it deletes, and the bucket, which it makes.
"""

from __future__ import annotations

import secrets
import ssl
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.auth import read_tokens
from services.common.config import ServerConfig, load_server, load_store
from services.common.errors import FabrictuneError, FailedPrecondition, InvalidSpec, PermissionDenied, Unavailable
from services.common.hooks.certificates import read_certificate
from services.common.store import open_store

SECONDS = 5.0
# What to ask each kind of service for: every role may, and an empty request is a valid one.
LISTS: Mapping[str, str] = {
    "conversion": "/fabrictune.v1.ConversionService/ListConversionJobs",
    "training": "/fabrictune.v1.TrainingService/ListTrainingJobs",
    "merging": "/fabrictune.v1.MergingService/ListMergeJobs",
    "evaluation": "/fabrictune.v1.EvaluationService/ListEvaluationJobs",
    "inference": "/fabrictune.v1.InferenceService/ListDeployments",
    "pipeline": "/fabrictune.v1.PipelineService/ListPipelineRuns",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. text: what was found, or what is wrong and what to do."""

    what: str
    fine: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok' if self.fine else 'failed':8}{self.what}: {'; '.join(self.text.splitlines())}"


def examine() -> Iterator[Finding]:
    """Look at everything, a finding each."""
    yield _attempt("store", _check_store)
    try:
        config = load_server()
    except FabrictuneError as error:
        yield Finding("settings", False, f"{error}; nothing else can be looked at")
        return
    yield Finding("settings", True, "can be read")
    yield _attempt("TLS", lambda: _check_tls(config))
    yield _attempt("tokens", lambda: _check_tokens(config))
    for kind, address in _addresses(config).items():
        yield _attempt(f"{kind} answers", partial(_check_health, config, address))
        yield _attempt(f"{kind} asks for a token", partial(_check_access, config, address, kind))
    yield _attempt("gateway", lambda: _check_gateway(config))


def _attempt(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, check())
    except FabrictuneError as error:
        return Finding(what, False, str(error))


def _check_store() -> str:
    config = load_store()
    store = open_store(config)
    key, value = f"selfcheck/{secrets.token_hex(8)}.json", {"written": "by a self-check"}
    if not store.put_json(key, value, only_if_absent=True):
        raise FailedPrecondition(f"{config.endpoint} says that {key} exists, which nobody has written")
    try:
        if store.get_json(key) != value:
            raise FailedPrecondition(f"{config.endpoint} gave back something else than was written")
        if store.put_json(key, value, only_if_absent=True):
            raise FailedPrecondition(
                f"{config.endpoint} ignores If-None-Match, so two attempts of a job could overwrite each other; use a "
                "store that has conditional writes"
            )
    finally:
        store.delete(key)
    if store.get_json(key) is not None:
        raise FailedPrecondition(f"{config.endpoint} still has {key} after it was deleted")
    return f"{config.endpoint}, bucket {config.bucket}: read, written, written only if absent, deleted"


def _check_tls(config: ServerConfig) -> str:
    if not (config.tls_certificate and config.tls_key):
        return "off"
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(config.tls_certificate, config.tls_key)
        facts = read_certificate(config.tls_certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise FailedPrecondition(
            f"{config.tls_certificate} and {config.tls_key} cannot be used: {error}; the TLS Secret must hold a certificate "
            "and its key"
        ) from None
    if facts.expires < datetime.now(UTC):
        raise FailedPrecondition(f"the certificate has expired on {facts.expires:%Y-%m-%d}; renew the TLS Secret")
    hosts = {address.rpartition(":")[0] for address in _addresses(config).values()}
    hosts |= {urlsplit(config.gateway_url).hostname or ""} - {""}
    lacking = sorted(host for host in hosts if not facts.covers(host))
    if lacking:
        raise FailedPrecondition(
            f"the certificate does not hold {', '.join(lacking)}, by which the services are called; it holds "
            f"{', '.join(sorted(facts.names)) or 'no names'}. Put one that does into the TLS Secret"
        )
    return f"valid until {facts.expires:%Y-%m-%d}, for {', '.join(sorted(hosts))}"


def _check_tokens(config: ServerConfig) -> str:
    if config.tokens_file is None:
        return f"JWTs of {config.oidc_issuer}" if config.oidc_issuer else "off"
    entries = read_tokens(config.tokens_file)
    return ", ".join(f"{e.name} ({e.role})" for e in entries) or "none"


def _addresses(config: ServerConfig) -> dict[str, str]:
    """The other services', and in a cluster the pipeline's own: the front door."""
    own = {"pipeline": f"{config.release}.{config.namespace}.svc:8470"} if config.namespace else {}
    return {**config.endpoints, **own}


def _open(config: ServerConfig, address: str) -> grpc.Channel:
    if config.ca_file is None:
        return grpc.insecure_channel(address)
    try:
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(config.ca_file.read_bytes()))
    except OSError as error:
        raise FailedPrecondition(f"FABRICTUNE_CA_FILE {config.ca_file} cannot be read: {error.strerror}") from None


def _check_health(config: ServerConfig, address: str) -> str:
    try:
        with _open(config, address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            status = stub.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS).status
    except grpc.RpcError as error:
        raise Unavailable(
            f"{address} does not answer ({error.details()}); is its pod running and ready, is FABRICTUNE_CA_FILE its "
            "authority, does a NetworkPolicy keep this pod from it?"
        ) from None
    if status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable(f"{address} answers, but does not serve; look at its pod's log")
    return address


def _check_access(config: ServerConfig, address: str, kind: str) -> str:
    method = LISTS.get(kind)
    if method is None:
        raise InvalidSpec(f"FABRICTUNE_ENDPOINTS names {kind!r}, which is no service; there are {', '.join(LISTS)}")
    code, said = _ask(config, address, method, config.token.get_secret_value())
    if code is not grpc.StatusCode.OK:
        raise PermissionDenied(
            f"{method} is refused with {code.name} ({said}); does the services' token, FABRICTUNE_TOKEN, stand in the "
            "tokens file of that service? Restart its pod when the Secret has changed"
        )
    if config.tokens_file is None and not config.oidc_issuer:
        return "no: whoever reaches it may ask (auth is off)"
    code, _ = _ask(config, address, method, "")
    if code is not grpc.StatusCode.UNAUTHENTICATED:
        raise FailedPrecondition(
            f"{method} without a token is answered with {code.name}: that server has no tokens file; give it "
            "FABRICTUNE_TOKENS_FILE"
        )
    return "takes ours, refuses a call without one"


def _ask(config: ServerConfig, address: str, method: str, token: str) -> tuple[grpc.StatusCode, str]:
    try:
        with _open(config, address) as channel:
            call: Any = channel.unary_unary(method)
            call(b"", timeout=SECONDS, metadata=[("authorization", f"Bearer {token}")] if token else [])
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


def _check_gateway(config: ServerConfig) -> str:
    address = f"{config.gateway_url}/healthz"
    if not config.gateway_url:
        raise InvalidSpec("FABRICTUNE_GATEWAY_URL is not set")
    try:
        trust = ssl.create_default_context(cafile=config.ca_file) if config.ca_file else True
        httpx.get(address, verify=trust, timeout=SECONDS).raise_for_status()
    except (httpx.HTTPError, OSError) as error:
        raise Unavailable(
            f"{address} does not answer ({error}); is the inference service's pod running and ready?"
        ) from None
    return address


def main() -> None:
    """The test's entry."""
    fine = True
    for finding in examine():
        print(finding, flush=True)
        fine = fine and finding.fine
    sys.exit(0 if fine else FailedPrecondition.exit_code)


if __name__ == "__main__":
    main()
