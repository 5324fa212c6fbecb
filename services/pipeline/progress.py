"""How far a run is: `stages.json` beside its record. All in it can be found again from the store and the services."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import json_format

from fabrictune.v1 import job_pb2, pipeline_pb2
from services.common.reporter import Progress, Reporter
from services.common.store import Store
from services.pipeline.graph import State, plan_stages
from services.pipeline.spec import Spec

SUCCEEDED, RUNNING = job_pb2.Execution.SUCCEEDED, job_pb2.Execution.RUNNING


@dataclass
class RunProgress:
    """A run in memory, and what it writes down."""

    name: str
    spec: Spec
    store: Store
    reporter: Reporter
    stages: dict[str, pipeline_pb2.StageStatus] = field(default_factory=dict)
    saving: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def states(self) -> Mapping[str, State]:
        """By stage; a stage that has not begun is absent."""
        return {name: status.execution.state for name, status in self.stages.items()}

    @property
    def outputs(self) -> Mapping[str, str]:
        """By stage: what it has made."""
        return {name: status.output for name, status in self.stages.items()}

    def begin(self, stage: str) -> None:
        """A stage runs from now on."""
        status = pipeline_pb2.StageStatus(stage=stage)
        status.execution.state = RUNNING
        status.execution.start_time.GetCurrentTime()
        self.stages[stage] = status

    async def save(self) -> None:
        """Write it down, and tell who watches."""
        # Else of two at a time the older one may be written last, and its job could not be cancelled.
        async with self.saving:
            plain = [json_format.MessageToDict(s, preserving_proto_field_name=True) for s in self.stages.values()]
            await asyncio.to_thread(self.store.put_json, _key(self.name), {"stages": plain})
        ended = sum(state == SUCCEEDED for state in self.states.values())
        now = ", ".join(name for name, state in self.states.items() if state == RUNNING)
        self.reporter.progress(Progress(unit="stages", step=ended, total_steps=len(plan_stages(self.spec)), phase=now))


def load_progress(name: str, spec: Spec, store: Store, reporter: Reporter) -> RunProgress:
    """The run as an earlier process left it: stages that succeeded stay, the others are looked at again."""
    stages = [json_format.ParseDict(s, pipeline_pb2.StageStatus()) for s in read_stages(name, store)]
    return RunProgress(name, spec, store, reporter, {s.stage: s for s in stages if s.execution.state == SUCCEEDED})


def read_stages(name: str, store: Store) -> list[dict[str, Any]]:
    """What a run has written down of its stages: fabrictune.v1.StageStatus each, as JSON; [] before it begins."""
    stored = store.get_json(_key(name)) or {"stages": []}
    return list(stored["stages"])


def _key(name: str) -> str:
    return f"{name}/stages.json"
