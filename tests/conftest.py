"""Fixtures that every test may use: a real object store on loopback, ended with the session."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from socketserver import BaseServer

import pytest
from minio.error import MinioException

from services.common.artifacts import Artifacts
from services.common.config import StoreConfig
from services.common.errors import FabrictuneError
from services.common.reporter import Progress
from services.common.store import Store, open_store
from services.common.weed import EmbeddedStore

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"


class Recorder:
    """A Reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[Progress] = []
        self.lines: list[tuple[str, str]] = []
        self.checkpoints: list[int] = []

    def progress(self, progress: Progress) -> None:
        """Keep it."""
        self.steps.append(progress)

    def log(self, text: str, severity: str = "INFO") -> None:
        """Keep it."""
        self.lines.append((severity, text))

    def checkpoint(self, step: int, folder: Path) -> None:
        """Keep its number."""
        self.checkpoints.append(step)


@pytest.fixture
def reporter() -> Recorder:
    """A reporter for stages that a test runs itself."""
    return Recorder()


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreConfig]:
    """A SeaweedFS of this session: how to reach it."""
    embedded = EmbeddedStore(tmp_path_factory.mktemp("store"))
    try:
        yield embedded.start()
    finally:
        embedded.stop()


@contextlib.contextmanager
def serving(server: BaseServer) -> Iterator[None]:
    """Let a server of the standard library answer from a thread of its own."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def store(object_store: StoreConfig) -> Iterator[Store]:
    """An empty bucket of its own; it goes again, since SeaweedFS has only so many volumes where the disk is nearly full."""
    found = open_store(object_store.model_copy(update={"bucket": f"test-{secrets.token_hex(6)}"}))
    yield found
    with contextlib.suppress(FabrictuneError, MinioException):
        for key in found.list_keys(""):
            found.delete(key)
        found.client.remove_bucket(found.bucket)


@pytest.fixture
def artifacts(store: Store, tmp_path: Path) -> Artifacts:
    """The artifacts of an empty bucket, with a cache of its own."""
    return Artifacts(store, tmp_path / "cache")
