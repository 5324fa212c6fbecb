"""The server over a real socket: TLS, tokens, health, reflection, ports in use, errors that say nothing they should not."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import ipaddress
import os
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from fabrictune.client import Client
from fabrictune.errors import ApiError
from fabrictune.v1 import artifact_pb2, artifact_pb2_grpc
from services.common import main
from services.common.artifacts import Artifacts as StoredArtifacts
from services.common.auth import Authenticator, TokenEntry, load_authenticator
from services.common.config import ServerConfig, StoreConfig
from services.common.errors import NotFound, Unavailable
from services.common.main import House, serve_until_stopped, wait_for_store
from services.common.server import Server, service
from services.common.store import Store
from services.common.tls import http_context
from services.inference.gateway import Gateway
from services.inference.routes import RouteTable


class Artifacts(artifact_pb2_grpc.ArtifactServiceServicer):
    """Answers one name, fails on two others, and is slow with a third."""

    async def GetArtifact(self, request: artifact_pb2.GetArtifactRequest, context: Any) -> artifact_pb2.Artifact:
        if request.name == "models/broken":
            raise RuntimeError("a secret: hunter2")
        if request.name == "models/slow":
            await asyncio.sleep(60)
        if request.name != "models/m":
            raise NotFound(f"there is no artifact {request.name}", {"name": request.name})
        return artifact_pb2.Artifact(name=request.name)


def make_server(authenticator: Authenticator | None = None, inside: str = "", **settings: Any) -> Server:
    config = ServerConfig.model_validate({"port": 0, "metrics_port": 0, "drain_seconds": 0, **settings})
    offered = service(Artifacts(), artifact_pb2_grpc.add_ArtifactServiceServicer_to_server)
    return Server([offered], config, authenticator, inside)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = make_server()
    await server.start()
    yield server
    await server.close()


async def get(target: grpc.aio.Channel, name: str, **more: Any) -> artifact_pb2.Artifact:
    stub: Any = artifact_pb2_grpc.ArtifactServiceStub(target)
    answer: artifact_pb2.Artifact = await stub.GetArtifact(artifact_pb2.GetArtifactRequest(name=name), **more)
    return answer


async def test_a_store_that_starts_beside_the_server_is_waited_for_but_not_for_ever(
    object_store: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = urlsplit(object_store.endpoint)
    relays = list[asyncio.Task[None]]()

    def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relays.append(asyncio.create_task(hand_on(reader, writer)))

    async def hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs = await asyncio.open_connection(there.hostname, there.port)
        try:
            await asyncio.gather(copy(reader, theirs[1]), copy(theirs[0], writer))
        finally:
            writer.close()
            theirs[1].close()
            await asyncio.gather(writer.wait_closed(), theirs[1].wait_closed(), return_exceptions=True)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
        writer.close()

    def at(held: socket.socket) -> StoreConfig:
        """The store behind an address that refuses connections until somebody listens there; nobody else gets it."""
        held.bind(("127.0.0.1", 0))
        return object_store.model_copy(update={"endpoint": f"http://127.0.0.1:{held.getsockname()[1]}"})

    with socket.socket() as held, socket.socket() as never:
        waiting = asyncio.create_task(wait_for_store(at(held)))
        await asyncio.sleep(2)
        assert not waiting.done()
        async with await asyncio.start_server(take, sock=held):
            assert (await asyncio.wait_for(waiting, 20)).bucket == object_store.bucket
            for relay in relays:  # clients keep connections open, and with them the relays
                relay.cancel()
            await asyncio.gather(*relays, return_exceptions=True)
        monkeypatch.setattr(main, "STORE_PATIENCE_SECONDS", 0)
        absent = at(never)
        with pytest.raises(Unavailable, match=f"{urlsplit(absent.endpoint).netloc} does not answer"):
            await wait_for_store(absent)


async def test_health_reflection_and_metrics(server: Server) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "fabrictune.v1.ArtifactService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        stream = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        listed = [s.name async for a in stream for s in a.list_services_response.service]
        assert "fabrictune.v1.ArtifactService" in listed
        await get(channel, "models/m")
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"http://127.0.0.1:{server.metrics_port}/metrics")).text
    assert "/fabrictune.v1.ArtifactService/GetArtifact" in text


async def test_errors_carry_reason_and_metadata(server: Server) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await get(channel, "models/none")
    status = rpc_status.from_call(refused.value)
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    assert (info.reason, info.domain, dict(info.metadata)) == ("NOT_FOUND", "fabrictune.dev", {"name": "models/none"})


async def test_a_bug_says_a_request_id_and_nothing_else(server: Server) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await get(channel, "models/broken", metadata=(("x-request-id", "r-77"),))
    assert refused.value.code() is grpc.StatusCode.INTERNAL
    assert "r-77" in str(refused.value.details())
    assert "hunter2" not in str(refused.value.details())


async def test_a_port_in_use_is_one_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=f"cannot listen on 127.0.0.1:{port}.*FABRICTUNE_PORT"):
            await make_server(port=port).start()
        with pytest.raises(Unavailable, match="FABRICTUNE_METRICS_PORT"):
            await make_server(metrics_port=port).start()


def write_certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fabrictune test")])
    now = datetime.datetime.now(datetime.UTC)
    hosts = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    built = built.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(1))
    signed = built.not_valid_after(now + datetime.timedelta(1)).add_extension(hosts, False).sign(key, hashes.SHA256())
    certificate, private = folder / "c.pem", folder / "k.pem"
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return certificate, private


async def test_tls_and_tokens(tmp_path: Path) -> None:
    certificate, private = write_certificate(tmp_path)
    entry = TokenEntry(name="ann", role="viewer", sha256=hashlib.sha256(b"key").hexdigest())
    inside = f"unix:{tmp_path}/inside.sock"
    server = make_server(Authenticator([entry]), inside, tls_certificate=certificate, tls_key=private)
    await server.start()
    try:
        credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{server.port}", credentials) as channel:
            answer = await get(channel, "models/m", metadata=(("authorization", "Bearer key"),))
            assert answer.name == "models/m"
            for metadata in ((), (("authorization", "Bearer wrong"),)):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await get(channel, "models/m", metadata=metadata)
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())  # probes have no token
        async with grpc.aio.insecure_channel(inside) as channel:
            assert (await get(channel, "models/m")).name == "models/m"  # this process talks to itself
    finally:
        await server.close()


class MountedSecret:
    """A folder as the kubelet mounts a Secret: names lead through a link, and an update puts another folder behind it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._version = folder, 0

    def put(self, **files: bytes) -> None:
        self._version += 1
        behind = self._folder / f"..{self._version}"
        behind.mkdir()
        for name, data in files.items():
            (behind / name).write_bytes(data)
            if not (self._folder / name).is_symlink():
                (self._folder / name).symlink_to(f"..data/{name}")
        (self._folder / "..new").symlink_to(behind.name)
        (self._folder / "..new").replace(self._folder / "..data")

    def renew_certificate(self) -> str:
        """Put another certificate there; its PEM."""
        certificate, key = write_certificate(self._folder)
        self.put(crt=certificate.read_bytes(), key=key.read_bytes())
        return certificate.read_text()


@pytest.fixture
def secret(tmp_path: Path) -> MountedSecret:
    (tmp_path / "secret").mkdir()
    return MountedSecret(tmp_path / "secret")


async def shown_certificate(host: str, port: int) -> str:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    _, writer = await asyncio.open_connection(host, port, ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()  # no farewell: the server may still be sending its settings
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return ssl.DER_cert_to_PEM_cert(shown)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])  # the one is named in the handshake, the other is not
async def test_a_renewed_certificate_is_served_without_a_restart(
    secret: MountedSecret, tmp_path: Path, host: str
) -> None:
    first = secret.renew_certificate()
    files = (tmp_path / "secret/crt", tmp_path / "secret/key")
    server = make_server(tls_certificate=files[0], tls_key=files[1])
    await server.start()
    gateway = Gateway(RouteTable())
    ports = (server.port, await gateway.start("127.0.0.1", 0, http_context(*files)))
    try:
        assert [await shown_certificate(host, port) for port in ports] == [first, first]
        second = secret.renew_certificate()
        assert second != first
        assert [await shown_certificate(host, port) for port in ports] == [second, second]
        async with grpc.aio.secure_channel(
            f"localhost:{server.port}", grpc.ssl_channel_credentials(second.encode())
        ) as channel:
            assert (await get(channel, "models/m")).name == "models/m"
        secret.put(crt=b"half", key=b"written")
        assert [await shown_certificate(host, port) for port in ports] == [second, second]
        third = secret.renew_certificate()
        assert [await shown_certificate(host, port) for port in ports] == [third, third]
    finally:
        await gateway.close()
        await server.close()


async def test_a_token_that_is_removed_from_its_file_is_refused_without_a_restart(
    secret: MountedSecret, tmp_path: Path
) -> None:
    def line(name: str) -> bytes:
        digest = hashlib.sha256(f"key of {name}".encode()).hexdigest()
        return f"- {{name: {name}, role: viewer, sha256: {digest}}}\n".encode()

    async def may_ask(name: str) -> bool:
        try:
            await get(channel, "models/m", metadata=(("authorization", f"Bearer key of {name}"),))
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            return False
        return True

    secret.put(tokens=line("ann") + line("bob"))
    server = make_server(load_authenticator(ServerConfig(tokens_file=tmp_path / "secret/tokens")))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            assert [await may_ask(name) for name in ("ann", "bob", "cy")] == [True, True, False]
            secret.put(tokens=line("bob") + line("cy"))
            assert [await may_ask(name) for name in ("ann", "bob", "cy")] == [False, True, True]
            secret.put(tokens=b"- {name: bob")
            assert [await may_ask(name) for name in ("ann", "bob", "cy")] == [False, True, True]
    finally:
        await server.close()


async def test_what_is_in_flight_elsewhere_ends_in_the_same_time_as_the_calls(
    store: Store, artifacts: StoredArtifacts, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = ServerConfig(port=port, metrics_port=0, drain_seconds=1)
    offered = service(Artifacts(), artifact_pb2_grpc.add_ArtifactServiceServicer_to_server)
    async with AsyncExitStack() as stack, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        house = House(config, tmp_path, None, store, artifacts)
        serving = asyncio.create_task(serve_until_stopped(stack, house, [offered], lambda: asyncio.sleep(1)))
        await channel.channel_ready()
        slow = asyncio.ensure_future(get(channel, "models/slow"))
        await asyncio.sleep(0.3)
        begin = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        await serving
        assert 0.9 < time.monotonic() - begin < 1.6
        with pytest.raises(grpc.aio.AioRpcError):
            await slow


def test_the_client_says_what_to_do_when_no_server_answers() -> None:
    with Client("127.0.0.1:9") as client, pytest.raises(ApiError, match="`fabrictune up`") as refused:
        client.artifacts.get("models/m")
    assert refused.value.code == "UNAVAILABLE"
