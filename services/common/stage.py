"""A stage: a pure function of artifacts, and what the rest of the system must know to run it.

The same Stage is run by a worker process (inputs fetched from the store, output sealed there) and by the CLI on plain
folders. `run` reads its inputs and writes into the empty folder `output`; nothing else is read or written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import BaseModel

from services.common.reporter import Reporter

S = TypeVar("S", bound=BaseModel)


if TYPE_CHECKING:  # a stage on plain folders shall not wait for a client of the object store
    from services.common.remote import RemoteArtifact, RemoteDraft

    Streamed = Callable[[S, Mapping[str, RemoteArtifact], RemoteDraft, Reporter], Mapping[str, Any]]
    """(spec, {role: artifact}, the output that it writes, reporter) → the manifest's metadata; see `run`."""


@dataclass(frozen=True)
class Stage(Generic[S]):
    """One kind of work."""

    kind: str
    """"conversion", "training", "merging", "evaluation"."""
    collection: str
    """Of its jobs, such as "trainingJobs"."""
    output_kind: str
    """Of the artifact it makes, such as "adapter"."""
    output_collection: str
    """Where that artifact lies, such as "adapters"."""
    spec: type[S]
    inputs: Callable[[S], Mapping[str, str]]
    """spec → {role: artifact name}, such as {"dataset": "datasets/d1", "base_model": "models/m1"}."""
    run: Callable[[S, Mapping[str, Path], Path, Reporter], Mapping[str, Any]]
    """(spec, {role: folder}, output folder, reporter) → the manifest's metadata.

    A resumed run gets one more role, "checkpoint". Raises errors of services.common.errors; a SIGTERM to the worker
    arrives as `Cancelled`, raised in the main thread.
    """
    share: Callable[[S, Mapping[str, Path], Path, tuple[int, int], Reporter], None] | None = None
    """(spec, inputs, folder, (this node, nodes), reporter): a node's part of the work, where nodes work apart.

    `run` then finds the nodes' folders among its inputs, as "shares/0", "shares/1", … None: nodes compute together in `run`.
    """
    stream: Callable[[S], Streamed[S] | None] = lambda _: None
    """spec → the function that works in the object store, where the spec asks for that; None: `run` works on folders."""
    versions: tuple[str, ...] = ()
    """Packages whose versions belong into the manifest, such as "ms-swift"."""
    verdict: Callable[[Mapping[str, Any]], None] | None = None
    """Judges the metadata after the output is sealed; raises the error that the job ends with (an evaluation's gate)."""
