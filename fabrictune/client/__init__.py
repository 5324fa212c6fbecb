"""The client library: one `Client` for all services of an endpoint.

    with Client() as client:                       # FABRICTUNE_ENDPOINT, or the `fabrictune up` of this folder
        job = client.training.create({"dataset": "datasets/d1", "base_model": "models/m1"})
        for event in client.training.watch(job.name): ...

Specs are plain dicts in the API's own field names; answers are protobuf messages. Errors are `ApiError`.
"""

from __future__ import annotations

from pathlib import Path

from fabrictune.channel import DEADLINE_SECONDS, open_channel
from fabrictune.client.artifacts import Artifacts
from fabrictune.client.calls import Calls
from fabrictune.client.inference import Inference
from fabrictune.client.jobs import KINDS, Jobs
from fabrictune.connection import find_endpoint
from fabrictune.errors import ApiError

__all__ = ["KINDS", "Artifacts", "Client", "Inference", "Jobs"]


class Client:
    """A connection to a fabrictune server. Thread-safe. Close it, or use it in a `with`."""

    def __init__(
        self, endpoint: str = "", token: str = "", ca_file: Path | None = None, timeout: float = DEADLINE_SECONDS
    ) -> None:
        self.endpoint = endpoint or find_endpoint()
        self._channel = open_channel(self.endpoint, token, ca_file, timeout)
        calls = Calls(self._channel, self.endpoint)
        self.conversion = Jobs(calls, "conversion")
        self.training = Jobs(calls, "training")
        self.merging = Jobs(calls, "merging")
        self.evaluation = Jobs(calls, "evaluation")
        self.pipelines = Jobs(calls, "pipeline")
        self.artifacts = Artifacts(calls)
        self.inference = Inference(calls)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def jobs_of(self, name: str) -> Jobs:
        """The API of the job that `name` names. Raises ApiError when it names none."""
        for api in (self.conversion, self.training, self.merging, self.evaluation, self.pipelines):
            if name.startswith(api.kind.collection + "/"):
                return api
        known = ", ".join(k.collection for k in KINDS.values())
        raise ApiError(f"{name!r} names no job: it must begin with one of {known}", "INVALID_ARGUMENT")
