"""A server's certificate, for gRPC and for HTTP. It is renewed while the server runs (cert-manager does it weeks before it
ends), so that each new connection looks whether its files have changed.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from services.common.errors import FabrictuneError, FailedPrecondition, Unavailable
from services.common.logs import get_logger
from services.common.watched_files import WatchedFiles


def grpc_credentials(certificate: Path, key: Path) -> grpc.ServerCredentials:
    """For a gRPC server. Raises Unavailable when a file cannot be read; later the last good ones are kept."""
    watched = WatchedFiles(certificate, key)

    def read() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(_read(key), _read(certificate))])

    newest = read()

    def renew() -> grpc.ServerCertificateConfiguration:
        nonlocal newest
        if watched.changed():
            try:
                newest = read()
            except FabrictuneError as error:
                _tell(error)
        return newest

    return grpc.dynamic_ssl_server_credentials(newest, renew)


def http_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """For an HTTP server. Raises FailedPrecondition when the files cannot be used; later the last good ones are kept."""
    watched = WatchedFiles(certificate, key)
    context = newest = _load(certificate, key)

    def renew(handshake: ssl.SSLObject, name: str, first: ssl.SSLContext) -> None:
        # Called at the start of every handshake, whether the client names the server or not.
        nonlocal newest
        if watched.changed():
            try:
                newest = _load(certificate, key)
            except FabrictuneError as error:
                _tell(error)
        handshake.context = newest

    context.sni_callback = renew
    return context


def _load(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise FailedPrecondition(f"the TLS files cannot be used: {error}") from None
    return context


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise Unavailable(f"the TLS file {file} cannot be read: {error.strerror}") from None


def _tell(error: FabrictuneError) -> None:
    get_logger("tls").error("the certificate cannot be renewed; the last one stays", error=str(error))
