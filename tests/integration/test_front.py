"""The front door between two real servers on loopback: what a caller sees of a service behind it."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from google.protobuf import empty_pb2
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from fabrictune.v1 import artifact_pb2, artifact_pb2_grpc, job_pb2, training_pb2, training_pb2_grpc
from services.common.auth import Authenticator, TokenEntry
from services.common.config import ServerConfig
from services.common.errors import InvalidSpec, NotFound, Unavailable, Violation
from services.common.server import Server, service
from services.pipeline.channels import SERVICES, open_channels
from services.pipeline.front import FrontDoor

TRAINING = "fabrictune.v1.TrainingService"
JOB = "trainingJobs/t1"


class Training(training_pb2_grpc.TrainingServiceServicer):
    """Stands behind the front door and remembers what reached it."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}
        self.seconds_left = 0.0
        self.cancelled = asyncio.Event()
        self.watched = 0

    async def GetTrainingJob(
        self, request: training_pb2.GetTrainingJobRequest, context: Any
    ) -> training_pb2.TrainingJob:
        self.metadata, self.seconds_left = dict(context.invocation_metadata()), context.time_remaining() or 0.0
        if request.name == "trainingJobs/none":
            raise NotFound("there is no trainingJobs/none", {"name": request.name}, (Violation("name", "not known"),))
        if request.name == "trainingJobs/no-store":
            raise Unavailable("the object store does not answer")
        if request.name == "trainingJobs/slow":
            await self._wait()
        await context.send_initial_metadata((("x-served-by", "t-0"),))
        return training_pb2.TrainingJob(name=request.name)

    async def DeleteTrainingJob(self, request: training_pb2.DeleteTrainingJobRequest, context: Any) -> empty_pb2.Empty:
        return empty_pb2.Empty()

    async def WatchTrainingJob(
        self, request: training_pb2.WatchTrainingJobRequest, context: Any
    ) -> AsyncIterator[job_pb2.WatchEvent]:
        for number in range(3):
            self.watched += 1
            yield job_pb2.WatchEvent(resume_token=str(number))
        if request.name == "trainingJobs/slow":
            await self._wait()
        if request.name == "trainingJobs/none":
            raise NotFound("it was deleted meanwhile")

    async def _wait(self) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class Artifacts(artifact_pb2_grpc.ArtifactServiceServicer):
    """A service of the front door's own server."""

    async def GetArtifact(self, request: artifact_pb2.GetArtifactRequest, context: Any) -> artifact_pb2.Artifact:
        return artifact_pb2.Artifact(name=request.name)


class House:
    """The service behind, the front door, and a channel to the front door."""

    def __init__(self, authenticator: Authenticator | None = None) -> None:
        self.training = Training()
        self._authenticator = authenticator
        self._stack = AsyncExitStack()
        config = ServerConfig(port=0, metrics_port=0, drain_seconds=0)
        offered = service(self.training, training_pb2_grpc.add_TrainingServiceServicer_to_server)
        self.behind = Server([offered], config, authenticator)

    async def __aenter__(self) -> House:
        await self.behind.start()
        self._stack.push_async_callback(self.behind.close)
        address = f"127.0.0.1:{self.behind.port}"
        channels = open_channels(
            {**dict.fromkeys(SERVICES, f"127.0.0.1:{unused_port()}"), "training": address}, None, ""
        )
        for channel in channels.values():
            self._stack.push_async_callback(channel.close)
        front = FrontDoor({SERVICES[kind]: channel for kind, channel in channels.items()})
        own = service(Artifacts(), artifact_pb2_grpc.add_ArtifactServiceServicer_to_server)
        config = ServerConfig(port=0, metrics_port=0, drain_seconds=0)
        server = Server([own, *front.services], config, self._authenticator)
        await server.start()
        self._stack.push_async_callback(server.close)
        self.channel = await self._stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{server.port}"))
        self.stub: Any = training_pb2_grpc.TrainingServiceStub(self.channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def get(self, name: str, **more: Any) -> Any:
        return self.stub.GetTrainingJob(training_pb2.GetTrainingJobRequest(name=name), **more)

    def watch(self, name: str) -> Any:
        return self.stub.WatchTrainingJob(training_pb2.WatchTrainingJobRequest(name=name))


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with House() as made:
        yield made


async def test_a_call_and_its_answer_pass_with_metadata_and_deadline(house: House) -> None:
    call = house.get(
        JOB, timeout=30, metadata=(("x-request-id", "r-1"), ("authorization", "Bearer k"), ("a-bin", b"\0\1"))
    )
    assert (await call).name == JOB
    sent = house.training.metadata
    assert (sent["x-request-id"], sent["authorization"], sent["a-bin"]) == ("r-1", "Bearer k", b"\0\1")
    assert 29 < house.training.seconds_left < 31  # gRPC rounds a time-out up to three digits
    assert dict(await call.initial_metadata())["x-served-by"] == "t-0"
    assert dict(await call.trailing_metadata())["x-request-id"] == "r-1"


async def test_a_service_of_the_front_doors_own_server_is_not_passed_on(house: House) -> None:
    stub: Any = artifact_pb2_grpc.ArtifactServiceStub(house.channel)
    assert (await stub.GetArtifact(artifact_pb2.GetArtifactRequest(name="models/m"))).name == "models/m"


async def test_an_error_arrives_with_its_reason_and_every_bad_field(house: House) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await house.get("trainingJobs/none")
    status = rpc_status.from_call(refused.value)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status is not None and status.details[0].Unpack(info) and status.details[1].Unpack(bad)
    assert (refused.value.code(), info.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    assert [v.field for v in bad.field_violations] == ["name"]


async def test_a_stream_passes_message_by_message(house: House) -> None:
    stream = house.watch("trainingJobs/slow")
    assert [(await stream.read()).resume_token for _ in range(3)] == ["0", "1", "2"]  # while it is still open
    stream.cancel()
    whole = [event.resume_token async for event in house.watch(JOB)]
    assert whole == ["0", "1", "2"]


async def test_an_error_in_mid_stream_arrives_after_the_messages(house: House) -> None:
    seen = []
    with pytest.raises(grpc.aio.AioRpcError) as broken:
        async for event in house.watch("trainingJobs/none"):
            seen.append(event.resume_token)
    assert seen == ["0", "1", "2"]
    assert (broken.value.code(), broken.value.details()) == (grpc.StatusCode.NOT_FOUND, "it was deleted meanwhile")


@pytest.mark.parametrize("form", ["unary", "stream", "unread stream"])
async def test_a_caller_that_goes_away_ends_the_call_behind(house: House, form: str) -> None:
    if form == "unary":
        call = house.get("trainingJobs/slow")
        while not house.training.metadata:
            await asyncio.sleep(0.01)
    else:
        call = house.watch("trainingJobs/slow")
        while house.training.watched < 3:
            await (call.read() if form == "stream" else asyncio.sleep(0.01))
    call.cancel()
    await asyncio.wait_for(house.training.cancelled.wait(), 5)


async def test_a_deadline_ends_the_call_behind(house: House) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await house.get("trainingJobs/slow", timeout=0.3)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(house.training.cancelled.wait(), 5)


async def test_a_service_that_cannot_be_reached_is_named(house: House) -> None:
    await house.behind.close()
    with pytest.raises(grpc.aio.AioRpcError) as away:
        await house.get(JOB)
    assert away.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "cannot reach TrainingService" in str(away.value.details())
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(away.value)
    assert status is not None and status.details[0].Unpack(info)
    assert info.metadata["service"] == TRAINING


async def test_a_service_that_dies_in_mid_stream_is_named(house: House) -> None:
    stream = house.watch("trainingJobs/slow")
    for _ in range(3):
        await stream.read()
    await house.behind.close()
    with pytest.raises(grpc.aio.AioRpcError) as away:
        await stream.read()
    assert away.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "TrainingService" in str(away.value.details())


async def test_an_answer_that_is_itself_unavailable_keeps_its_own_words(house: House) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as away:
        await house.get("trainingJobs/no-store")
    assert away.value.details() == "the object store does not answer"


async def test_a_service_that_comes_back_is_found_again(house: House) -> None:
    port = house.behind.port
    await house.behind.close()
    with pytest.raises(grpc.aio.AioRpcError):
        await house.get(JOB)
    config = ServerConfig(port=port, metrics_port=0, drain_seconds=0)
    offered = service(house.training, training_pb2_grpc.add_TrainingServiceServicer_to_server)
    again = Server([offered], config, None)
    await again.start()
    try:
        async with asyncio.timeout(10):
            while True:
                try:
                    assert (await house.get(JOB)).name == JOB
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.1)
    finally:
        await again.close()


async def test_reflection_at_the_front_door_lists_and_explains_every_service(house: House) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(house.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        *(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in SERVICES.values()),
    ]
    listed, *files = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
    assert set(SERVICES.values()) <= {s.name for s in listed.list_services_response.service}
    assert all(f.file_descriptor_response.file_descriptor_proto for f in files)


async def test_tokens_are_asked_for_at_the_door_and_the_callers_own_goes_on() -> None:
    entry = TokenEntry(name="ann", role="viewer", sha256=hashlib.sha256(b"key").hexdigest())
    async with House(Authenticator([entry])) as house:
        assert (await house.get(JOB, metadata=(("authorization", "Bearer key"),))).name == JOB
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await house.get(JOB)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        request = training_pb2.DeleteTrainingJobRequest(name=JOB)
        with pytest.raises(grpc.aio.AioRpcError, match="needs operator") as refused:
            await house.stub.DeleteTrainingJob(request, metadata=(("authorization", "Bearer key"),))
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_the_pipelines_own_channels_send_its_token_with_calls_and_streams(house: House) -> None:
    address = f"127.0.0.1:{house.behind.port}"
    channels = open_channels(dict.fromkeys(SERVICES, address), None, "secret")
    try:
        stub: Any = training_pb2_grpc.TrainingServiceStub(channels["training"])
        await stub.GetTrainingJob(training_pb2.GetTrainingJobRequest(name=JOB))
        assert house.training.metadata["authorization"] == "Bearer secret"
        events = [e async for e in stub.WatchTrainingJob(training_pb2.WatchTrainingJobRequest(name=JOB))]
        assert len(events) == 3
    finally:
        for channel in channels.values():
            await channel.close()


def test_a_missing_address_is_named() -> None:
    misspelt = {("trainning" if kind == "training" else kind): "a:1" for kind in SERVICES}
    with pytest.raises(InvalidSpec, match=r"FABRICTUNE_ENDPOINTS.*look at training, trainning"):
        open_channels(misspelt, None, "")
