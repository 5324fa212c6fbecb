"""Drives one run: starts what the graph says is next, writes down what happened, goes on after any restart.

All that a run has done is in its jobs, whose ids are made from the digest of their spec and inputs. So a run that begins
again, or another run with the same inputs, finds the jobs that are there and only starts the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import json_format
from google.rpc import code_pb2

from fabrictune.v1 import job_pb2, pipeline_pb2
from services.common.artifacts import Artifacts
from services.common.errors import Cancelled, FabrictuneError, GateNotMet, InvalidSpec, Violation
from services.common.reporter import Progress, Reporter
from services.common.store import Store
from services.pipeline.clients import ENDED, InferenceClient, JobClient, RemoteError
from services.pipeline.graph import State, is_done, next_stages, plan_stages
from services.pipeline.lineage import lineage_key
from services.pipeline.revisions import Revisions, Served, plan_revision
from services.pipeline.spec import Spec

FORCED = "the gate is not met; it is deployed by force"
SUCCEEDED, RUNNING = job_pb2.Execution.SUCCEEDED, job_pb2.Execution.RUNNING
FAILED, CANCELLING, CANCELLED = job_pb2.Execution.FAILED, job_pb2.Execution.CANCELLING, job_pb2.Execution.CANCELLED
# Fields that a run fills in, by stage: what is said of them before the run begins does not count.
FILLED_IN: Mapping[str, tuple[str, ...]] = {
    "conversion": (),
    "training": ("dataset",),
    "merging": ("base_model", "adapter"),
    "evaluation": ("dataset", "target", "baseline"),
}
# What only the tuned model is asked for: the base model is expected to fail a gate, and others need not be asked twice.
OF_THE_TUNED: tuple[str, ...] = ("gate", "not_worse", "targets", "constrained")


@dataclass
class _Run:
    """A run in memory. Everything in it can be found again from the store and the services."""

    name: str
    spec: Spec
    stages: dict[str, pipeline_pb2.StageStatus] = field(default_factory=dict)
    saving: asyncio.Lock = field(default_factory=asyncio.Lock)


class Reconciler:
    """Drives runs. channels: by kind, to the services that do the stages."""

    def __init__(self, channels: Mapping[str, grpc.aio.Channel], store: Store, artifacts: Artifacts) -> None:
        self._clients = {kind: JobClient(channels[kind], kind) for kind in FILLED_IN}
        self._inference = InferenceClient(channels["inference"])
        self._revisions = Revisions(self._inference)
        self._store, self._artifacts = store, artifacts
        self._leaving = False

    def leave(self) -> None:
        """What is cancelled from now on is cancelled because this process ends: the next one needs the revisions of runs."""
        self._leaving = True

    async def check(self, spec: Spec) -> None:
        """Ask every service whether it would accept its stage. Raises InvalidSpec naming all that is wrong."""
        found: list[Violation] = []
        for stage, plain in self._drafts(spec).items():
            try:
                await self._clients[stage].plan(plain)
            except InvalidSpec as error:
                found.append(Violation(f"spec.{stage}", error.message))
            except RemoteError as error:
                if error.status.code not in (code_pb2.INVALID_ARGUMENT, code_pb2.NOT_FOUND):
                    raise
                named = [v for v in error.violations if not _is_filled_in(stage, v.field)]
                found += [Violation(v.field.replace("spec", f"spec.{stage}", 1), v.description) for v in named]
                if not error.violations:
                    found.append(Violation(f"spec.{stage}", error.message))
        if found:
            raise InvalidSpec("the run cannot be accepted", violations=found)

    async def drive(self, name: str, spec: Spec, reporter: Reporter) -> Mapping[str, Any]:
        """Carry a run to its end; returns {stage: output}. Raises the error of the stage that failed."""
        run, nodes = await asyncio.to_thread(self._load, name, spec), plan_stages(spec)
        running: dict[asyncio.Task[None], str] = {}
        try:
            while not is_done(nodes, _states(run)):
                for stage in next_stages(nodes, _states(run)):
                    run.stages[stage] = pipeline_pb2.StageStatus(stage=stage)
                    run.stages[stage].execution.state = RUNNING
                    run.stages[stage].execution.start_time.GetCurrentTime()
                    running[asyncio.create_task(self._do_stage(run, stage, reporter))] = stage
                await self._save(run, reporter)
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    stage = running.pop(task)
                    await self._close_stage(run, stage, task, reporter)
        except asyncio.CancelledError:
            await _end(running)
            if not self._leaving:
                await self._release_all(name, reporter)
            raise
        finally:
            await _end(running)
            self._revisions.forget(name)
        return {s.stage: s.output for s in run.stages.values()}

    async def cancel_active(self, name: str) -> None:
        """Ask the jobs that a run waits for to stop."""
        stored = await asyncio.to_thread(self._store.get_json, f"{name}/stages.json") or {"stages": []}
        for stage in stored["stages"]:
            kind = str(stage["stage"]).partition("-")[0]
            if kind in self._clients and stage.get("job") and stage["execution"]["state"] in ("RUNNING", "QUEUED"):
                await self._clients[kind].cancel(str(stage["job"]).rpartition("/")[2])

    async def _close_stage(self, run: _Run, stage: str, task: asyncio.Task[None], reporter: Reporter) -> None:
        status = run.stages[stage]
        status.execution.end_time.GetCurrentTime()
        error = task.exception()
        if error is None:
            status.execution.state = SUCCEEDED
            reporter.log(f"{stage}: {'reused' if status.reused else 'made'} {status.output}")
        else:
            status.execution.state = CANCELLED if isinstance(error, Cancelled) else FAILED
            if isinstance(error, FabrictuneError):
                status.execution.error.CopyFrom(error.to_status())
        await self._save(run, reporter)
        if error is not None:
            raise error

    async def _do_stage(self, run: _Run, stage: str, reporter: Reporter) -> None:
        spec, status, made = run.spec, run.stages[stage], {s.stage: s.output for s in run.stages.values()}
        base = str(spec.training.get("base_model", ""))
        if stage == "conversion":
            await self._do_job(run, stage, spec.conversion, reporter)
        elif stage == "training":
            await self._do_job(run, stage, {**spec.training, "dataset": made["conversion"]}, reporter)
        elif stage == "merging" and made["training"].startswith("models/"):
            status.output, status.reused = made["training"], True  # full fine-tuning has made a model: nothing to merge
        elif stage == "merging":
            await self._do_job(run, stage, {**spec.merging, "base_model": base, "adapter": made["training"]}, reporter)
        elif stage == "evaluation-before":
            await self._evaluate(run, stage, made["conversion"], base, "before", "", reporter, keep=False)
        elif stage == "evaluation-after":
            baseline = made["evaluation-before"]
            await self._evaluate(
                run, stage, made["conversion"], made["merging"], "after", baseline, reporter, keep=True
            )
        else:
            await self._deploy(run, stage, await self._plan_revision(run, made["merging"]), reporter)

    async def _deploy(self, run: _Run, stage: str, served: Served, reporter: Reporter) -> None:
        """Give a model the traffic. A run that is cancelled before that releases the revision when it ends."""
        status = run.stages[stage]
        status.job = served.name
        await self._save(run, reporter)
        await self._revisions.start(served, run.name)
        # Before the traffic: a model that serves past its gate must say so whatever breaks in between. What lies beside
        # a revision without traffic is not told.
        await asyncio.to_thread(self._record_deployment, run, served.name)
        await self._inference.take_traffic(served.deployment, served.revision_id)
        status.output = served.deployment

    async def _evaluate(
        self, run: _Run, stage: str, dataset: str, model: str, label: str, baseline: str, reporter: Reporter, keep: bool
    ) -> None:
        served = await self._plan_revision(run, model)
        spec = {**(run.spec.evaluation or {}), "dataset": dataset, "target": {"label": label, "revision": served.name}}
        if baseline:
            spec["baseline"] = baseline
        else:
            spec = {key: value for key, value in spec.items() if key not in OF_THE_TUNED}
        job_id = await self._job_id("evaluation", spec)
        wanted = False
        try:
            if not await self._is_made(await self._clients["evaluation"].find(job_id)):
                reporter.log(f"{stage}: starting {model} as {served.name}, without traffic")
                await self._revisions.start(served, run.name)
            try:
                await self._do_job(run, stage, spec, reporter)
            except RemoteError as error:
                if not (run.spec.force and error.reason_of_status == GateNotMet.reason):
                    raise
                # The stage goes on as if it had succeeded; its error stays beside it.
                run.stages[stage].execution.error.CopyFrom(error.status)
                run.stages[stage].execution.message = FORCED
                reporter.log(f"{stage}: {FORCED}\n{error}", "WARNING")
            wanted = keep and run.spec.deployment is not None
        except asyncio.CancelledError:
            wanted = self._leaving
            raise
        finally:
            if not wanted:
                await self._revisions.release(served, run.name)

    def _record_deployment(self, run: _Run, revision: str) -> None:
        """Leave beside the deployment who brought the revision there, and whether past a gate; lineage reads it."""
        judged = run.stages.get("evaluation-after")
        told: dict[str, Any] = {"run": run.name}
        if judged is not None and judged.execution.HasField("error"):
            report = self._artifacts.get(judged.output)
            error = json_format.MessageToDict(judged.execution.error)
            told |= {"forced": True, "report": {"name": report.name, "digest": report.digest}, "error": error}
        self._store.put_json(lineage_key(revision), told)

    async def _release_all(self, name: str, reporter: Reporter) -> None:
        try:
            await self._revisions.release_all(name)
        except FabrictuneError as error:
            reporter.log(f"a revision without traffic is left; look at `fabrictune deployments`: {error}", "WARNING")

    async def _do_job(self, run: _Run, stage: str, spec: Mapping[str, Any], reporter: Reporter) -> None:
        client, status = self._clients[stage.partition("-")[0]], run.stages[stage]
        job_id = await self._job_id(stage.partition("-")[0], spec)
        labels = {"pipelineRun": run.name.rpartition("/")[2]}
        job: Any = await client.find(job_id)
        if job is not None and job.execution.state == CANCELLING:  # an earlier run's, that was cancelled just now
            job = await client.wait(job_id)
        if await self._is_made(job):
            status.reused = dict(job.labels).get("pipelineRun") != labels["pipelineRun"]
        elif job is not None and job.execution.state in ENDED:
            job = await client.restart(job, spec, labels)
        elif job is None:
            job = await client.create(spec, job_id, labels)
        status.job, status.output = job.name, job.output
        await self._save(run, reporter)
        ended = await client.wait(job_id)
        if ended.execution.state == CANCELLED:
            raise Cancelled(f"{ended.name} was cancelled")
        if ended.execution.state != SUCCEEDED:
            raise RemoteError(ended.execution.error)

    async def _job_id(self, kind: str, spec: Mapping[str, Any]) -> str:
        digest = await self._clients[kind].plan(spec)
        return f"{kind[:5].rstrip('-')}-{digest[:12]}"

    async def _plan_revision(self, run: _Run, model: str) -> Served:
        return plan_revision(await asyncio.to_thread(self._artifacts.get, model), run.spec.deployment)

    async def _is_made(self, job: Any) -> bool:
        """Whether a job is there that has succeeded, and its output, too."""
        if job is None or job.execution.state != SUCCEEDED:
            return False
        try:
            await asyncio.to_thread(self._artifacts.get, job.output)
        except FabrictuneError:
            return False
        return True

    def _load(self, name: str, spec: Spec) -> _Run:
        """The run as an earlier process left it: stages that succeeded stay, the others are looked at again."""
        stored = self._store.get_json(f"{name}/stages.json") or {"stages": []}
        stages = [json_format.ParseDict(s, pipeline_pb2.StageStatus()) for s in stored["stages"]]
        return _Run(name, spec, {s.stage: s for s in stages if s.execution.state == SUCCEEDED})

    async def _save(self, run: _Run, reporter: Reporter) -> None:
        async with (
            run.saving
        ):  # else of two at a time the older one may be written last, and its job could not be cancelled
            plain = [json_format.MessageToDict(s, preserving_proto_field_name=True) for s in run.stages.values()]
            await asyncio.to_thread(self._store.put_json, f"{run.name}/stages.json", {"stages": plain})
        nodes, states = plan_stages(run.spec), _states(run)
        ended = sum(state == SUCCEEDED for state in states.values())
        now = ", ".join(name for name, state in states.items() if state == RUNNING)
        reporter.progress(Progress(unit="stages", step=ended, total_steps=len(nodes), phase=now))

    def _drafts(self, spec: Spec) -> dict[str, dict[str, Any]]:
        """Each stage's spec with stand-ins for what the run fills in."""
        drafts = {
            "conversion": spec.conversion,
            "training": {**spec.training, "dataset": "datasets/filled-in"},
            "merging": {**spec.merging, "base_model": "models/filled-in", "adapter": "adapters/filled-in"},
        }
        if spec.evaluation is not None:
            target = {"revision": "deployments/filled-in/revisions/filled-in"}
            drafts["evaluation"] = {**spec.evaluation, "dataset": "datasets/filled-in", "target": target}
        return drafts


async def _end(tasks: Collection[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _is_filled_in(stage: str, field: str) -> bool:
    return any(field == f"spec.{f}" or field.startswith((f"spec.{f}.", f"spec.{f}[")) for f in FILLED_IN[stage])


def _states(run: _Run) -> dict[str, State]:
    return {name: status.execution.state for name, status in run.stages.items()}
