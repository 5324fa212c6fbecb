"""Between protobuf and Jobs: what the Create, Get, List, Cancel, Delete and Watch of every kind of job have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

from google.protobuf import empty_pb2, json_format
from google.protobuf.message import Message

from fabrictune.v1 import job_pb2
from services.common.artifacts import Artifacts
from services.common.clusters import Cluster, Workload
from services.common.errors import InvalidSpec
from services.common.job_state import JobView, execution_of, progress_message
from services.common.jobs import Jobs
from services.common.server import Service, service
from services.common.stage import Stage
from services.common.watching import Event, watch_job


class Page(Protocol):
    """What all List responses carry beside their resources."""

    next_page_token: str


R = TypeVar("R", bound=Message)
P = TypeVar("P", bound=Page)


class CreateRequest(Protocol):
    """What all Create requests carry beside the resource and its id."""

    request_id: str
    validate_only: bool


class JobApi(Generic[R]):
    """The RPCs of one kind of job. resource: its message class, such as TrainingJob."""

    def __init__(self, jobs: Jobs, cluster: Cluster, resource: type[R]) -> None:
        self._jobs, self._cluster, self._resource = jobs, cluster, resource

    @property
    def artifacts(self) -> Artifacts:
        """Where the jobs' inputs and outputs are."""
        return self._jobs.artifacts

    async def create(self, job: Any, job_id: str, request: CreateRequest) -> R:
        """Accept a job, or, with validate_only, return its plan."""
        if not job.HasField("spec"):
            raise InvalidSpec("the request carries no spec")
        view, workload = await self._jobs.create(
            spec_dict(job.spec),
            job_id=job_id,
            request_id=request.request_id,
            output=job.output,
            labels=dict(job.labels),
            validate_only=request.validate_only,
        )
        message: Any = self._message(view)
        if request.validate_only:
            message.ClearField("execution")
            message.plan.CopyFrom(plan_message(workload, self._cluster))
            message.plan.commands.extend(child_commands(self._jobs.stage, view.record.spec))
        return cast(R, message)

    async def get(self, name: str) -> R:
        """One job."""
        return self._message(await self._jobs.get(name))

    async def list(self, request: Any, response: P, field: str) -> P:
        """A page of jobs, put into `response.field`."""
        views, token = await self._jobs.list(request.page_size, request.page_token)
        getattr(response, field).extend(self._message(view) for view in views)
        response.next_page_token = token
        return response

    async def cancel(self, name: str) -> R:
        """Ask it to stop."""
        return self._message(await self._jobs.cancel(name))

    async def delete(self, name: str) -> empty_pb2.Empty:
        """Forget it."""
        await self._jobs.delete(name)
        return empty_pb2.Empty()

    async def resume(self, name: str) -> R:
        """Begin it again."""
        return self._message(await self._jobs.resume(name))

    async def watch(self, request: Any) -> AsyncIterator[job_pb2.WatchEvent]:
        """Events of a job."""
        async for event in watch_job(self._jobs, request.name, request.resume_token):
            yield event_message(event)

    def _message(self, view: JobView) -> R:
        record = view.record
        message: Any = cast(Any, self._resource)(name=record.name, output=record.output, labels=dict(record.labels))
        json_format.ParseDict(dict(record.spec), message.spec)
        message.execution.CopyFrom(execution_of(view))
        return cast(R, message)


@dataclass(frozen=True)
class Offer:
    """One kind of job, as a server offers it; a constant of its service."""

    stage: Stage[Any]
    resource: type[Any]
    """Its message class, such as TrainingJob."""
    servicer: Callable[[JobApi[Any]], Any]
    add: Callable[[Any, Any], None]
    """The generated add_…Servicer_to_server."""

    def serve(self, jobs: Jobs, cluster: Cluster) -> Service:
        """The service, for a server."""
        return service(self.servicer(JobApi(jobs, cluster, self.resource)), self.add)


def spec_dict(spec: Message) -> dict[str, Any]:
    """A spec as the dict that its pydantic model reads; fields that were not set are absent."""
    return json_format.MessageToDict(spec, preserving_proto_field_name=True)


def plan_message(workload: Workload, cluster: Cluster) -> job_pb2.Plan:
    """The printable plan of a workload."""
    command = job_pb2.Command(argv=workload.argv, env=dict(workload.env))
    return job_pb2.Plan(commands=[command], manifest=cluster.render(workload), digest=workload.digest)


def child_commands(stage: Stage[Any], spec: Mapping[str, Any]) -> list[job_pb2.Command]:
    """The processes that a job's worker will start."""
    if stage.children is None:
        return []
    children = stage.children(stage.spec.model_validate(spec))
    return [job_pb2.Command(argv=child.argv, env=dict(child.env)) for child in children]


def event_message(event: Event) -> job_pb2.WatchEvent:
    """The protobuf form of an event."""
    message = job_pb2.WatchEvent(resume_token=event.token)
    message.time.FromMilliseconds(int(event.time * 1000))
    if event.state is not None:
        message.state.CopyFrom(event.state)
    elif event.progress is not None:
        message.progress.CopyFrom(progress_message(event.progress))
    elif event.log is not None:
        message.log.CopyFrom(job_pb2.LogLine(severity=str(event.log["severity"]), text=str(event.log["text"])))
    elif event.artifact is not None:
        message.artifact.CopyFrom(job_pb2.ArtifactEvent(**event.artifact))
    return message
