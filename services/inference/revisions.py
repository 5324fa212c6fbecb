"""Deployments and revisions as values: what is remembered of them (plain JSON) and which state may follow which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from services.common.errors import FabrictuneError, FailedPrecondition, InvalidSpec, Violation
from services.common.logs import get_logger
from services.inference.spec import Canary, RevisionSpec

_M = TypeVar("_M", bound=BaseModel)


class State(Enum):
    """Mirrors fabrictune.v1.Revision.State by name."""

    PENDING = "PENDING"
    """Waits for its model and a place to run."""
    LOADING = "LOADING"
    PROBING = "PROBING"
    READY = "READY"
    DRAINING = "DRAINING"
    STOPPED = "STOPPED"
    FAILED = "FAILED"


FOLLOWS: Mapping[State, frozenset[State]] = {
    State.PENDING: frozenset(
        {State.LOADING, State.READY, State.FAILED, State.STOPPED, State.PENDING}
    ),  # READY: adopted; PENDING: it was lost before it began to load
    State.LOADING: frozenset({State.PROBING, State.FAILED, State.STOPPED, State.PENDING}),
    State.PROBING: frozenset({State.READY, State.FAILED, State.STOPPED, State.PENDING}),
    State.READY: frozenset({State.DRAINING, State.PENDING, State.FAILED}),  # PENDING: its engine crashed
    State.DRAINING: frozenset({State.STOPPED}),
    State.STOPPED: frozenset({State.PENDING}),  # created once more
    State.FAILED: frozenset({State.PENDING, State.STOPPED}),
}
"""Which state may follow which."""

COMING = frozenset({State.PENDING, State.LOADING, State.PROBING})
"""On the way to READY: requests for it wait."""

ENDED = frozenset({State.STOPPED, State.FAILED})
"""No engine runs for it."""


@dataclass
class Revision:
    """What is remembered of a revision; times are seconds since 1970, 0 when they have not come."""

    deployment: str
    revision: str
    spec: RevisionSpec
    state: State = State.PENDING
    message: str = ""
    error: dict[str, Any] = field(default_factory=dict)
    """google.rpc.Status as JSON; empty when all is well."""
    parity: dict[str, Any] = field(default_factory=dict)
    """ParityResult; empty until it was probed."""
    take_traffic: bool = False
    """It takes all traffic as soon as it is ready."""
    asked_time: float = 0
    """When that was last asked for: of two it is the later one's in the end."""
    warm_since: float = 0
    """When it lost its traffic; 0 when it has some or never had any."""
    create_time: float = 0
    ready_time: float = 0
    restarts: int = 0
    """Times that its engine crashed and was started again since it was last well for a while."""
    lost: int = 0
    """Times that its engine was lost, in all."""
    model_digest: str = ""
    """Of the model that it began with: another one of the same name is another revision's."""
    engine_digest: str = ""
    """Of the workload that is READY: a later process adopts that very one."""
    created_spec: RevisionSpec | None = None
    """What it was created with, where its adapters have changed since."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each step of the last start took: fetch, place (until its process runs), load (until it answers), reference
    (beside that, where there is memory), probe, first_token, adapters, total."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Digests of the adapters that are loaded, by id."""

    @property
    def asked_spec(self) -> RevisionSpec:
        """What it was created with."""
        return self.created_spec or self.spec

    @property
    def name(self) -> str:
        """The resource name."""
        return f"deployments/{self.deployment}/revisions/{self.revision}"

    @property
    def served_model(self) -> str:
        """What clients send as "model" to reach this very revision."""
        return f"{self.deployment}@{self.revision}"


class CanaryState(Enum):
    """Mirrors fabrictune.v1.CanaryRun.State by name."""

    RUNNING = "RUNNING"
    PROMOTED = "PROMOTED"
    ROLLED_BACK = "ROLLED_BACK"
    STOPPED = "STOPPED"
    """Traffic was moved by hand meanwhile."""


@dataclass
class CanaryRun:
    """A canary: what it was asked and how far it came."""

    candidate: str
    before: dict[str, int]
    """The traffic that a rollback gives back."""
    policy: Canary
    state: CanaryState = CanaryState.RUNNING
    step: int = 0
    reason: str = ""
    create_time: float = 0
    figures: dict[str, Any] = field(default_factory=dict)
    """{candidate, stable}: Figures of the present step."""

    @property
    def percent(self) -> int:
        """What the candidate takes now."""
        if self.state is CanaryState.ROLLED_BACK:
            return 0
        return self.policy.steps[self.step] if self.step < len(self.policy.steps) else 100


@dataclass
class Deployment:
    """What is remembered of a deployment."""

    id: str
    traffic: dict[str, int] = field(default_factory=dict)
    revisions: dict[str, Revision] = field(default_factory=dict)
    create_time: float = 0
    canary: CanaryRun | None = None
    """The one that runs, or the last."""


def move(revision: Revision, state: State, message: str = "", error: FabrictuneError | None = None) -> None:
    """Change a revision's state. Raises FailedPrecondition when that state cannot follow."""
    from google.protobuf import json_format

    if state not in FOLLOWS[revision.state]:
        raise FailedPrecondition(f"{revision.name} is {revision.state.value} and cannot become {state.value}")
    revision.state, revision.message = state, error.message if error else message
    revision.error = json_format.MessageToDict(error.to_status()) if error else {}


def check_traffic(deployment: Deployment, traffic: Mapping[str, int]) -> None:
    """Raises InvalidSpec (percentages, unknown revisions) or FailedPrecondition (one is not READY)."""
    bad = [Violation(f"traffic.{r}", "must be from 0 to 100") for r, part in traffic.items() if not 0 <= part <= 100]
    bad += [Violation(f"traffic.{r}", "there is no such revision") for r in traffic if r not in deployment.revisions]
    if traffic and sum(traffic.values()) != 100:
        bad.append(Violation("traffic", f"the parts add up to {sum(traffic.values())}, not to 100"))
    if bad:
        raise InvalidSpec(f"this traffic cannot be given to deployments/{deployment.id}", violations=bad)
    for revision_id, part in traffic.items():
        revision = deployment.revisions[revision_id]
        if part and revision.state is not State.READY:
            raise FailedPrecondition(f"{revision.name} is {revision.state.value}, not READY, and cannot take traffic")


def to_json(deployment: Deployment) -> dict[str, Any]:
    """Plain JSON for the store."""
    plain = asdict(deployment)
    for revision_id, revision in deployment.revisions.items():
        plain["revisions"][revision_id] |= {
            "spec": revision.spec.model_dump(mode="json"),
            "created_spec": revision.created_spec and revision.created_spec.model_dump(mode="json"),
            "state": revision.state.value,
        }
    if deployment.canary is not None:
        run = deployment.canary
        plain["canary"] |= {"policy": run.policy.model_dump(mode="json"), "state": run.state.value}
    return plain


def from_json(plain: Mapping[str, Any]) -> Deployment:
    """A deployment from the store; fields of a later version are passed over, at any depth."""
    revisions = {
        revision_id: Revision(**{
            **_known(Revision, r),
            "spec": _read(RevisionSpec, r["spec"], f"the spec of revision {revision_id}"),
            "created_spec": (c := r.get("created_spec")) and _read(RevisionSpec, c, f"the spec of revision {revision_id}"),
            "state": State(r["state"]),
        })
        for revision_id, r in plain["revisions"].items()
    }  # fmt: skip
    canary = plain.get("canary")
    if canary:
        policy, state = _read(Canary, canary["policy"], "the canary's policy"), CanaryState(canary["state"])
        canary = CanaryRun(**{**_known(CanaryRun, canary), "policy": policy, "state": state})
    return Deployment(plain["id"], dict(plain["traffic"]), revisions, plain["create_time"], canary or None)


def _known(kind: type[Revision | CanaryRun], plain: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {k: v for k, v in plain.items() if k in names}


def _read(kind: type[_M], plain: Any, whose: str) -> _M:
    """A model whose unknown fields are passed over with a warning: what users write is refused, what was saved is not."""
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        unknown = [".".join(map(str, e["loc"])) for e in error.errors() if e["type"] == "extra_forbidden"]
        if not unknown:
            raise
        get_logger("rollout").warning("passed over: this version does not know them", where=whose, fields=unknown)
        return kind.model_validate(plain, extra="ignore")
