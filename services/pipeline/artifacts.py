"""The artifact service: reads, moves and explains artifacts. Files travel by signed addresses, never over gRPC."""

from __future__ import annotations

import asyncio
from typing import Any

from google.protobuf import empty_pb2, json_format

from fabrictune.v1 import artifact_pb2, artifact_pb2_grpc
from services.common.artifacts import Artifacts, new_attempt
from services.common.errors import AlreadyExists, DataLoss, InvalidSpec, NotFound, Violation, enumerated
from services.common.manifests import File, Manifest, check_files, digest_of_files
from services.common.provenance import versions
from services.common.store import Store
from services.pipeline.lineage import lineage_key

KINDS = ("dataset", "rows", "model", "adapter", "report")


class ArtifactService(artifact_pb2_grpc.ArtifactServiceServicer):
    """Serves fabrictune.v1.ArtifactService."""

    def __init__(self, store: Store, artifacts: Artifacts) -> None:
        self._store, self._artifacts = store, artifacts

    async def GetArtifact(self, request: artifact_pb2.GetArtifactRequest, context: Any) -> artifact_pb2.Artifact:
        """One artifact."""
        return artifact_message(await asyncio.to_thread(self._artifacts.get, request.name))

    async def ListArtifacts(
        self, request: artifact_pb2.ListArtifactsRequest, context: Any
    ) -> artifact_pb2.ListArtifactsResponse:
        """A page of a collection, by id."""
        found, token = await asyncio.to_thread(
            self._artifacts.list, request.collection, request.page_size, request.page_token
        )
        return artifact_pb2.ListArtifactsResponse(artifacts=map(artifact_message, found), next_page_token=token)

    async def DeleteArtifact(self, request: artifact_pb2.DeleteArtifactRequest, context: Any) -> empty_pb2.Empty:
        """Delete an artifact, its manifest first."""
        await asyncio.to_thread(self._artifacts.delete, request.name)
        return empty_pb2.Empty()

    async def GetLineage(self, request: artifact_pb2.GetLineageRequest, context: Any) -> artifact_pb2.Lineage:
        """The artifact, or the deployment, and all that it was made from."""
        found = await asyncio.to_thread(self._lineage, request.name)
        return artifact_pb2.Lineage(artifacts=found)

    async def CreateDownload(self, request: artifact_pb2.CreateDownloadRequest, context: Any) -> artifact_pb2.Download:
        """Signed addresses to read from."""
        manifest = await asyncio.to_thread(self._artifacts.get, request.name)
        root = f"{manifest.name}/{manifest.attempt}"
        addresses = {f.path: self._store.presign("GET", f"{root}/{f.path}") for f in manifest.files}
        return artifact_pb2.Download(artifact=artifact_message(manifest), addresses=addresses)

    async def CreateUpload(self, request: artifact_pb2.CreateUploadRequest, context: Any) -> artifact_pb2.Upload:
        """Signed addresses to write to. What is planned is kept in the store, so any server can seal it."""
        if request.kind not in KINDS:
            raise InvalidSpec(
                "the upload is refused", violations=[Violation("kind", f"must be one of {', '.join(KINDS)}")]
            )
        check_files(request.name, request.kind, [f.path for f in request.files])
        files = [File(f.path, f.size_bytes, f.sha256) for f in request.files]
        digest = digest_of_files(files)
        try:
            there = await asyncio.to_thread(self._artifacts.get, request.name)
        except NotFound:
            pass
        else:
            if there.digest != digest:
                raise AlreadyExists(f"{request.name} exists with other files; take another id, or delete it")
            return artifact_pb2.Upload(existing=artifact_message(there))
        attempt = new_attempt()
        plan = {
            "name": request.name,
            "kind": request.kind,
            "files": [vars(f) for f in files],
            "metadata": json_format.MessageToDict(request.metadata),
        }
        await asyncio.to_thread(self._store.put_json, f"uploads/{attempt}.json", plan)
        addresses = {f.path: self._store.presign("PUT", f"{request.name}/{attempt}/{f.path}") for f in files}
        return artifact_pb2.Upload(upload_id=attempt, addresses=addresses)

    async def SealUpload(self, request: artifact_pb2.SealUploadRequest, context: Any) -> artifact_pb2.Artifact:
        """Make the artifact exist once all files are there in full. Their hashes are checked at every download."""
        return artifact_message(await asyncio.to_thread(self._seal, request.upload_id))

    def _seal(self, attempt: str) -> Manifest:
        if not attempt.startswith("files-") or "/" in attempt:
            raise InvalidSpec(f"{attempt!r} is no upload's id")
        plan = self._store.get_json(f"uploads/{attempt}.json")
        if plan is None:
            raise NotFound(f"there is no upload {attempt}; was it sealed already?")
        files = [File(**f) for f in plan["files"]]
        short = [f.path for f in files if self._size(f"{plan['name']}/{attempt}/{f.path}") != f.size]
        if short:
            raise DataLoss(f"{plan['name']}: {enumerated(short)} did not arrive whole; send them again, then seal")
        created_by = {"versions": versions(("fabrictune",))}
        manifest = self._artifacts.seal(plan["name"], plan["kind"], attempt, files, created_by, plan["metadata"])
        self._store.delete(f"uploads/{attempt}.json")
        return manifest

    def _size(self, key: str) -> int:
        try:
            return self._store.size_of(key)
        except NotFound:
            return -1

    def _lineage(self, name: str) -> list[artifact_pb2.Artifact]:
        if not name.startswith("deployments/"):
            return [artifact_message(m) for m in self._artifacts.lineage(name)]
        deployment = self._store.get_json(f"{'/'.join(name.split('/')[:2])}/deployment.json")
        if deployment is None:
            raise NotFound(f"there is no {name}")
        # A deployment changes, so it is no artifact itself; it stands for the models that take its traffic.
        revisions = [r for r, part in deployment["traffic"].items() if part]
        serving = [deployment["revisions"][r]["spec"]["model"] for r in revisions]
        root = artifact_pb2.Artifact(name=name, kind="deployment")
        found = {}
        for model in dict.fromkeys(serving):
            for manifest in self._artifacts.lineage(model):
                found[manifest.name] = artifact_message(manifest)
            if model in found:
                root.created_by.inputs.add(name=model, digest=found[model].digest)
        for revision in revisions:
            self._tell_run(root, f"{'/'.join(name.split('/')[:2])}/revisions/{revision}")
        return [root, *found.values()]

    def _tell_run(self, root: artifact_pb2.Artifact, revision: str) -> None:
        """The run that deployed a revision, if one did; and the report whose gate it was forced past."""
        told = self._store.get_json(lineage_key(revision)) or {}
        root.created_by.job = told.get("run", root.created_by.job)
        if told.get("forced"):
            root.created_by.inputs.add(**told["report"])
            said = f"deployed by force: the gate of {told['report']['name']} is not met"
            root.metadata.update({"description": said, "forced": True, "error": told["error"]})


def artifact_message(manifest: Manifest) -> artifact_pb2.Artifact:
    """The protobuf form of a manifest."""
    made = manifest.created_by
    message = artifact_pb2.Artifact(
        name=manifest.name,
        kind=manifest.kind,
        files=[artifact_pb2.ArtifactFile(path=f.path, size_bytes=f.size, sha256=f.sha256) for f in manifest.files],
        digest=manifest.digest,
        size_bytes=manifest.size,
    )
    message.created_by.job = str(made.get("job", ""))
    message.created_by.versions.update(made.get("versions", {}))
    for source in made.get("inputs", ()):
        message.created_by.inputs.add(name=source["name"], digest=source["digest"])
    message.created_by.spec.update(made.get("spec", {}))
    message.metadata.update(manifest.metadata)
    message.create_time.FromMilliseconds(int(manifest.create_time * 1000))
    return message
