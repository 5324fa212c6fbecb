"""A stage: a pure function of artifacts, and what the rest of the system must know to run it.

The same Stage is run by a worker process (inputs fetched from the store, output sealed there) and by the CLI on plain
folders. `run` reads its inputs and writes into the empty folder `output`; nothing else is read or written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
class Child:
    """A process that a stage starts: its argv, and what is added to its environment."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


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
    check: Callable[[S, Mapping[str, Path]], None] | None = None
    """(spec, {role: folder}): raises what `run` would raise of these inputs before its work begins, on whatever machine; for
    --dry-run on folders."""
    share: Callable[[S, Mapping[str, Path], Path, tuple[int, int], Reporter], None] | None = None
    """(spec, inputs, folder, (this node, nodes), reporter): a node's part of the work, where nodes work apart.

    `run` then finds the nodes' folders among its inputs, as "shares/0", "shares/1", … None: nodes compute together in `run`.
    """
    stream: Callable[[S], Streamed[S] | None] = lambda _: None
    """spec → the function that works in the object store, where the spec asks for that; None: `run` works on folders."""
    versions: tuple[str, ...] = ()
    """Packages whose versions belong into the manifest, such as "ms-swift"."""
    verdict: Callable[[Mapping[str, Any], str], None] | None = None
    """(metadata, name of the output), once it is sealed; raises the error that the job ends with (an evaluation's gate)."""
    output_of: Callable[[S], tuple[str, str]] | None = None
    """spec → kind and collection of what it makes, where they depend on the spec (full fine-tuning makes a model)."""
    checkpoints_kept: Callable[[S], int] | None = None
    """spec → how many of a job's checkpoints stay in the store while it runs; None: 2."""
    children: Callable[[S], Sequence[Child]] | None = None
    """spec → the processes that its worker starts, for --dry-run and validate_only; paths in it are stand-ins."""

    def output_for(self, spec: S) -> tuple[str, str]:
        """Kind and collection of the artifact that is made from a spec."""
        return self.output_of(spec) if self.output_of else (self.output_kind, self.output_collection)
