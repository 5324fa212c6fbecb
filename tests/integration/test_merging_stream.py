"""A merge from the object store to the object store: the same bytes as on folders, nothing half, and little memory."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from services.common.artifacts import Artifacts
from services.common.config import StoreConfig
from services.common.errors import DataLoss, InvalidData, NotFound
from services.common.remote import RemoteArtifact, RemoteDraft
from services.common.store import Store
from services.merging.worker import STAGE
from tests.conftest import ROOT, Recorder
from tests.merging_files import Q, lora, write_adapter, write_base

SPEC: Mapping[str, Any] = {"base_model": "models/base", "adapter": "adapters/a", "stream": True}


def publish(artifacts: Artifacts, base: Path, adapter: Path) -> None:
    artifacts.publish(base, "models/base", "model")
    artifacts.publish(adapter, "adapters/a", "adapter")


def merge(artifacts: Artifacts, reporter: Recorder, **more: Any) -> None:
    spec = STAGE.spec.model_validate({**SPEC, **more})
    streamed = STAGE.stream(spec)
    assert streamed is not None
    store = artifacts.store
    inputs = {role: RemoteArtifact(store, artifacts, name) for role, name in STAGE.inputs(spec).items()}
    with RemoteDraft(store, artifacts, "models/merged", "model") as draft:
        draft.seal({}, dict(streamed(spec, inputs, draft, reporter)))


def test_it_is_the_merge_of_folders(tmp_path: Path, artifacts: Artifacts, reporter: Recorder) -> None:
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    publish(artifacts, base, adapter)
    merge(artifacts, reporter, chat_template="{{ mine }}")
    here = tmp_path / "here"
    here.mkdir()
    spec = STAGE.spec.model_validate({**SPEC, "stream": False, "chat_template": "{{ mine }}"})
    told = STAGE.run(spec, {"base_model": base, "adapter": adapter}, here, reporter)
    manifest = artifacts.get("models/merged")
    found = {file.path: file.sha256 for file in manifest.files}
    assert found == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in here.iterdir()}
    assert manifest.metadata["tensors"] == told["tensors"] == 3
    assert manifest.metadata["streamed"]
    cached = [folder.name for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]
    assert cached == [artifacts.get("adapters/a").digest]  # the base was never here


def test_a_worker_streams_when_it_is_asked_to(tmp_path: Path, artifacts: Artifacts, object_store: StoreConfig) -> None:
    publish(artifacts, write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter"))
    job = {"name": "mergeJobs/m1", "output": "models/merged", "spec": dict(SPEC)}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    settings = {
        "FABRICTUNE_S3_ENDPOINT": object_store.endpoint,
        "FABRICTUNE_S3_BUCKET": artifacts.store.bucket,
        "FABRICTUNE_S3_ACCESS_KEY": object_store.access_key,
        "FABRICTUNE_S3_SECRET_KEY": object_store.secret_key.get_secret_value(),
        "FABRICTUNE_DATA_DIR": str(tmp_path / "data"),
        "FABRICTUNE_SPEC_FILE": str(tmp_path / "job.yaml"),
    }
    argv = [sys.executable, "-m", "services.merging.worker"]
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    manifest = artifacts.get("models/merged")
    assert manifest.metadata["streamed"]
    assert [i["name"] for i in manifest.created_by["inputs"]] == ["models/base", "adapters/a"]
    fetched = [folder.name for folder in (tmp_path / "data/cache").iterdir() if folder.is_dir()]
    assert fetched == [artifacts.get("adapters/a").digest]


def test_a_base_that_has_changed_in_the_store_makes_no_model(
    tmp_path: Path, artifacts: Artifacts, store: Store, reporter: Recorder
) -> None:
    base = write_base(tmp_path / "base")
    publish(artifacts, base, write_adapter(tmp_path / "adapter"))
    whole = bytearray((base / "a.safetensors").read_bytes())
    whole[-1] ^= 1
    store.put_bytes(f"models/base/{artifacts.get('models/base').attempt}/a.safetensors", bytes(whole))
    with pytest.raises(DataLoss, match=r"a\.safetensors is not what was stored"):
        merge(artifacts, reporter)
    assert_nothing(artifacts)


def test_a_base_with_nan_makes_no_model(tmp_path: Path, artifacts: Artifacts, reporter: Recorder) -> None:
    base = write_base(tmp_path / "base", fill={"lm_head.weight": np.nan})
    publish(artifacts, base, write_adapter(tmp_path / "adapter"))
    with pytest.raises(InvalidData, match=r"lm_head\.weight has NaN"):
        merge(artifacts, reporter)
    assert_nothing(artifacts)


def test_an_adapter_of_another_base_is_refused_before_anything_is_written(
    tmp_path: Path, artifacts: Artifacts, reporter: Recorder
) -> None:
    publish(artifacts, write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter", lora(rows=5)))
    with pytest.raises(InvalidData, match="another base model"):
        merge(artifacts, reporter)
    assert_nothing(artifacts)


def test_a_tensor_of_many_parts(tmp_path: Path, artifacts: Artifacts, reporter: Recorder) -> None:
    base = write_base(tmp_path / "base", rows=300_000)  # 4.8 MB: more than a piece
    publish(artifacts, base, write_adapter(tmp_path / "adapter", (tensors := lora(rows=300_000))))
    merge(artifacts, reporter)
    folder = artifacts.cached("models/merged")
    a, b = tensors.values()
    wanted = load_file(base / "a.safetensors")[Q] + np.float32(4) * (b @ a)
    np.testing.assert_allclose(load_file(folder / "a.safetensors")[Q], wanted, rtol=1e-5, atol=1e-6)


def assert_nothing(artifacts: Artifacts) -> None:
    with pytest.raises(NotFound):
        artifacts.get("models/merged")
    assert list(artifacts.store.list_keys("models/merged/")) == []
