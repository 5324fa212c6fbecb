"""What a rollout keeps in the object store and fetches from it: deployments, references, models and adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from services.common.artifacts import Artifacts as StoredArtifacts
from services.common.store import Store
from services.inference.adapters import Adapter, bases_of, describe_adapter, read_rank
from services.inference.engine import Model, describe_model, parse_model_config
from services.inference.follow import write_list
from services.inference.launch import Artifacts
from services.inference.prepare import MODEL_FOLDER, adapter_folder
from services.inference.reference import Reference, reference_from_json, reference_key, reference_to_json
from services.inference.revisions import Deployment, from_json, to_json

SUFFIX = "/deployment.json"


def stored_deployments(store: Store) -> list[Deployment]:
    """What an earlier process has left."""
    found = [store.get_json(f"deployments/{name}{SUFFIX}") for name in store.list_folders("deployments/")]
    return [from_json(plain) for plain in found if plain is not None]


def stored_artifacts(store: Store, artifacts: StoredArtifacts, remote: bool = False) -> Artifacts:
    """How a rollout reaches the object store. remote: engines fetch their model themselves, here it is only described."""

    async def fetch_model(name: str) -> Model:
        return await asyncio.to_thread(_describe_stored if remote else _fetch, artifacts, name)

    async def fetch_reference(digest: str, dtype: str) -> Reference | None:
        stored = await asyncio.to_thread(store.get_json, reference_key(digest, dtype))
        return reference_from_json(stored) if stored else None

    async def store_reference(reference: Reference) -> None:
        key = reference_key(reference.model_digest, reference.dtype)
        await asyncio.to_thread(store.put_json, key, reference_to_json(reference))

    async def save(deployment: Deployment) -> None:
        await asyncio.to_thread(store.put_json, f"deployments/{deployment.id}{SUFFIX}", to_json(deployment))

    async def forget(deployment_id: str) -> None:
        await asyncio.to_thread(store.delete, f"deployments/{deployment_id}{SUFFIX}")
        for key in await asyncio.to_thread(lambda: list(store.list_keys(f"deployments/{deployment_id}/adapters/"))):
            await asyncio.to_thread(store.delete, key)

    async def fetch_adapter(name: str) -> Adapter:
        return await asyncio.to_thread(_describe_stored_adapter if remote else _fetch_adapter, artifacts, name)

    async def list_adapters(deployment: str, revision: str, adapters: Sequence[Adapter]) -> None:
        await asyncio.to_thread(write_list, store, deployment, revision, adapters)

    lister = list_adapters if remote else None
    return Artifacts(fetch_model, fetch_reference, store_reference, save, forget, fetch_adapter, lister)


def _fetch(artifacts: StoredArtifacts, name: str) -> Model:
    manifest = artifacts.get(name)
    return describe_model(name, manifest.digest, artifacts.cached(name, manifest.digest))


def _describe_stored(artifacts: StoredArtifacts, name: str) -> Model:
    manifest = artifacts.get(name)
    weights = sum(file.size for file in manifest.files if file.path.endswith(".safetensors"))
    config = parse_model_config(artifacts.read(manifest, "config.json"), f"{name}/config.json")
    return Model(name, manifest.digest, MODEL_FOLDER, config, weights, remote=True)


def _fetch_adapter(artifacts: StoredArtifacts, name: str) -> Adapter:
    manifest = artifacts.get(name)
    return describe_adapter(name, manifest.digest, artifacts.cached(name, manifest.digest), manifest.created_by)


def _describe_stored_adapter(artifacts: StoredArtifacts, name: str) -> Adapter:
    manifest = artifacts.get(name)
    rank = read_rank(artifacts.read(manifest, "adapter_config.json"), name)
    folder = adapter_folder(manifest.digest)
    return Adapter(name, manifest.digest, folder, rank, bases_of(manifest.created_by), {})
