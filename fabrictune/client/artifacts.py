"""Datasets, models, adapters and reports."""

from __future__ import annotations

import builtins
from collections.abc import Iterator

from fabrictune.client.calls import Calls
from fabrictune.v1 import artifact_pb2, artifact_pb2_grpc


class Artifacts:
    """Datasets, models, adapters and reports."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._stub = calls.stub(artifact_pb2_grpc.ArtifactServiceStub)

    def get(self, name: str) -> artifact_pb2.Artifact:
        """One artifact."""
        artifact: artifact_pb2.Artifact = self._calls.call(
            self._stub.GetArtifact, artifact_pb2.GetArtifactRequest(name=name)
        )
        return artifact

    def list(self, collection: str) -> Iterator[artifact_pb2.Artifact]:
        """All artifacts of a collection, page by page."""
        token = ""
        while True:
            request = artifact_pb2.ListArtifactsRequest(collection=collection, page_token=token)
            page = self._calls.call(self._stub.ListArtifacts, request)
            yield from page.artifacts
            token = page.next_page_token
            if not token:
                return

    def delete(self, name: str) -> None:
        """Delete an artifact."""
        self._calls.call(self._stub.DeleteArtifact, artifact_pb2.DeleteArtifactRequest(name=name))

    def lineage(self, name: str) -> builtins.list[artifact_pb2.Artifact]:
        """The artifact and all that it was made from, breadth first."""
        return list(self._calls.call(self._stub.GetLineage, artifact_pb2.GetLineageRequest(name=name)).artifacts)

    def begin_download(self, name: str) -> artifact_pb2.Download:
        """Signed addresses of an artifact's files."""
        download: artifact_pb2.Download = self._calls.call(
            self._stub.CreateDownload, artifact_pb2.CreateDownloadRequest(name=name)
        )
        return download

    def begin_upload(self, request: artifact_pb2.CreateUploadRequest) -> artifact_pb2.Upload:
        """Signed addresses to send files to."""
        upload: artifact_pb2.Upload = self._calls.call(self._stub.CreateUpload, request)
        return upload

    def seal(self, upload_id: str) -> artifact_pb2.Artifact:
        """Make an uploaded artifact exist."""
        artifact: artifact_pb2.Artifact = self._calls.call(
            self._stub.SealUpload, artifact_pb2.SealUploadRequest(upload_id=upload_id)
        )
        return artifact
