"""Drives one run: starts what the graph says is next, writes down what happened, goes on after any restart.

All that a run has done is in its jobs, whose ids are made from the digest of their spec and inputs. So a run that begins
again, or another run with the same inputs, finds the jobs that are there and only starts the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import json_format
from google.rpc import code_pb2

from fabrictune.v1 import job_pb2, pipeline_pb2
from services.common.artifacts import Artifacts
from services.common.errors import Cancelled, FabrictuneError, GateNotMet, InvalidSpec, Violation
from services.common.records import digest_of
from services.common.reporter import Progress, Reporter
from services.common.store import Store
from services.pipeline.clients import InferenceClient, JobClient, RemoteError
from services.pipeline.graph import State, is_done, next_stages, plan_stages
from services.pipeline.lineage import lineage_key
from services.pipeline.spec import Spec

FORCED = "the gate is not met; it is deployed by force"
SUCCEEDED, RUNNING = job_pb2.Execution.SUCCEEDED, job_pb2.Execution.RUNNING
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


class Reconciler:
    """Drives runs. channels: by kind, to the services that do the stages."""

    def __init__(self, channels: Mapping[str, grpc.aio.Channel], store: Store, artifacts: Artifacts) -> None:
        self._clients = {kind: JobClient(channels[kind], kind) for kind in FILLED_IN}
        self._inference = InferenceClient(channels["inference"])
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
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
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
            cancelled = isinstance(error, Cancelled)
            status.execution.state = job_pb2.Execution.CANCELLED if cancelled else job_pb2.Execution.FAILED
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
            deployment, revision_id, revision = await self._revision_of(run, made["merging"])
            status.job = f"{deployment}/revisions/{revision_id}"
            await self._save(run, reporter)
            await self._inference.start_revision(deployment, revision_id, revision)
            # Before the traffic: a model that serves past its gate must say so whatever breaks in between. What lies beside
            # a revision without traffic is not told.
            await asyncio.to_thread(self._record_deployment, run, status.job)
            await self._inference.take_traffic(deployment, revision_id)
            status.output = deployment

    async def _evaluate(
        self, run: _Run, stage: str, dataset: str, model: str, label: str, baseline: str, reporter: Reporter, keep: bool
    ) -> None:
        deployment, revision_id, revision = await self._revision_of(run, model)
        name = f"{deployment}/revisions/{revision_id}"
        spec = {**(run.spec.evaluation or {}), "dataset": dataset, "target": {"label": label, "revision": name}}
        if baseline:
            spec["baseline"] = baseline
        else:
            spec = {key: value for key, value in spec.items() if key not in OF_THE_TUNED}
        job_id = await self._job_id("evaluation", spec)
        there = await self._clients["evaluation"].find(job_id)
        if there is None or there.execution.state != SUCCEEDED:
            reporter.log(f"{stage}: starting {model} as {name}, without traffic")
            await self._inference.start_revision(deployment, revision_id, revision)
        wanted = False
        try:
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
                await self._release(name)

    def _record_deployment(self, run: _Run, revision: str) -> None:
        """Leave beside the deployment who brought the revision there, and whether past a gate; lineage reads it."""
        judged = run.stages.get("evaluation-after")
        told: dict[str, Any] = {"run": run.name}
        if judged is not None and judged.execution.HasField("error"):
            report = self._artifacts.get(judged.output)
            error = json_format.MessageToDict(judged.execution.error)
            told |= {"forced": True, "report": {"name": report.name, "digest": report.digest}, "error": error}
        self._store.put_json(lineage_key(revision), told)

    async def _release(self, revision: str) -> None:
        """Stop a revision that was started to be asked; one that takes traffic stays."""
        try:
            await self._inference.delete_revision(revision)
        except RemoteError as error:
            if error.status.code != code_pb2.FAILED_PRECONDITION:
                raise

    async def _do_job(self, run: _Run, stage: str, spec: Mapping[str, Any], reporter: Reporter) -> None:
        client, status = self._clients[stage.partition("-")[0]], run.stages[stage]
        job_id = await self._job_id(stage.partition("-")[0], spec)
        labels = {"pipelineRun": run.name.rpartition("/")[2]}
        job = await client.find(job_id)
        if job is not None and job.execution.state == SUCCEEDED and await self._exists(job.output):
            status.reused = dict(job.labels).get("pipelineRun") != labels["pipelineRun"]
        elif job is not None and job.execution.state in (
            job_pb2.Execution.FAILED,
            job_pb2.Execution.CANCELLED,
            SUCCEEDED,
        ):
            job = await client.restart(job, spec, labels)
        elif job is None:
            job = await client.create(spec, job_id, labels)
        status.job, status.output = job.name, job.output
        await self._save(run, reporter)
        ended = await client.wait(job_id)
        if ended.execution.state == job_pb2.Execution.CANCELLED:
            raise Cancelled(f"{ended.name} was cancelled")
        if ended.execution.state != SUCCEEDED:
            raise RemoteError(ended.execution.error)

    async def _job_id(self, kind: str, spec: Mapping[str, Any]) -> str:
        digest = await self._clients[kind].plan(spec)
        return f"{kind[:5].rstrip('-')}-{digest[:12]}"

    async def _revision_of(self, run: _Run, model: str) -> tuple[str, str, dict[str, Any]]:
        """(deployment, revision id, its spec) for a model: the same model and settings have the same id."""
        stage = run.spec.deployment
        deployment = stage.deployment if stage else f"deployments/eval-{run.name.rpartition('/')[2]}"[:51].rstrip("-")
        spec = {**(stage.spec if stage else {}), "model": model}
        manifest = await asyncio.to_thread(self._artifacts.get, model)
        return deployment, f"r-{digest_of([manifest.digest, spec])[:10]}", spec

    async def _exists(self, name: str) -> bool:
        try:
            await asyncio.to_thread(self._artifacts.get, name)
        except FabrictuneError:
            return False
        return True

    def _load(self, name: str, spec: Spec) -> _Run:
        """The run as an earlier process left it: stages that succeeded stay, the others are looked at again."""
        stored = self._store.get_json(f"{name}/stages.json") or {"stages": []}
        stages = [json_format.ParseDict(s, pipeline_pb2.StageStatus()) for s in stored["stages"]]
        return _Run(name, spec, {s.stage: s for s in stages if s.execution.state == SUCCEEDED})

    async def _save(self, run: _Run, reporter: Reporter) -> None:
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


def _is_filled_in(stage: str, field: str) -> bool:
    return any(field == f"spec.{f}" or field.startswith((f"spec.{f}.", f"spec.{f}[")) for f in FILLED_IN[stage])


def _states(run: _Run) -> dict[str, State]:
    return {name: status.execution.state for name, status in run.stages.items()}
