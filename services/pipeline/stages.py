"""What each stage of a run does: ask a service for its job, or start a revision and ask it.

A job's id is made from the digest of its spec and inputs. So a run that begins again, or another run with the same
inputs, finds the jobs that are there and only starts the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format

from fabrictune.v1 import job_pb2
from services.common.artifacts import Artifacts
from services.common.errors import Cancelled, GateNotMet, NotFound
from services.common.store import Store
from services.pipeline.clients import ENDED, InferenceClient, JobClient, RemoteError
from services.pipeline.lineage import lineage_key
from services.pipeline.progress import RunProgress
from services.pipeline.revisions import Revisions, Served, plan_revision

FORCED = "the gate is not met; it is deployed by force"
SUCCEEDED = job_pb2.Execution.SUCCEEDED
CANCELLING, CANCELLED = job_pb2.Execution.CANCELLING, job_pb2.Execution.CANCELLED
# What only the tuned model is asked for: the base model is expected to fail a gate, and others need not be asked twice.
OF_THE_TUNED: tuple[str, ...] = ("gate", "not_worse", "targets", "constrained")


class Stages:
    """Does stages. clients: by kind, to the services that do the jobs."""

    def __init__(
        self,
        clients: Mapping[str, JobClient],
        inference: InferenceClient,
        revisions: Revisions,
        store: Store,
        artifacts: Artifacts,
    ) -> None:
        self._clients, self._inference, self._revisions = clients, inference, revisions
        self._store, self._artifacts = store, artifacts

    async def do(self, run: RunProgress, stage: str) -> None:
        """Do one stage whose predecessors have succeeded; its status says what it made. Raises what made it fail."""
        spec, status, made = run.spec, run.stages[stage], run.outputs
        base = str(spec.training.get("base_model", ""))
        if stage == "conversion":
            await self._do_job(run, stage, spec.conversion)
        elif stage == "training":
            await self._do_job(run, stage, {**spec.training, "dataset": made["conversion"]})
        elif stage == "merging" and made["training"].startswith("models/"):
            status.output, status.reused = made["training"], True  # full fine-tuning has made a model: nothing to merge
        elif stage == "merging":
            await self._do_job(run, stage, {**spec.merging, "base_model": base, "adapter": made["training"]})
        elif stage == "evaluation-before":
            await self._evaluate(run, stage, made["conversion"], base, "before", baseline="", keep=False)
        elif stage == "evaluation-after":
            baseline = made["evaluation-before"]
            await self._evaluate(run, stage, made["conversion"], made["merging"], "after", baseline, keep=True)
        else:
            await self._deploy(run, stage, await self._plan_revision(run, made["merging"]))

    async def _deploy(self, run: RunProgress, stage: str, served: Served) -> None:
        """Give a model the traffic. A run that is cancelled before that releases the revision when it ends."""
        status = run.stages[stage]
        status.job = served.name
        await run.save()
        await self._revisions.start(served, run.name)
        # Before the traffic: a model that serves past its gate must say so whatever breaks in between. What lies beside
        # a revision without traffic is not told.
        await asyncio.to_thread(self._record_deployment, run, served.name)
        await self._inference.take_traffic(served.deployment, served.revision_id)
        status.output = served.deployment

    async def _evaluate(
        self, run: RunProgress, stage: str, dataset: str, model: str, label: str, baseline: str, keep: bool
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
                run.reporter.log(f"{stage}: starting {model} as {served.name}, without traffic")
                await self._revisions.start(served, run.name)
            try:
                await self._do_job(run, stage, spec)
            except RemoteError as error:
                if not (run.spec.force and error.reason_of_status == GateNotMet.reason):
                    raise
                # The stage goes on as if it had succeeded; its error stays beside it.
                run.stages[stage].execution.error.CopyFrom(error.status)
                run.stages[stage].execution.message = FORCED
                run.reporter.log(f"{stage}: {FORCED}\n{error}", "WARNING")
            wanted = keep and run.spec.deployment is not None
        finally:
            if not wanted:
                await self._revisions.release(served, run.name)

    def _record_deployment(self, run: RunProgress, revision: str) -> None:
        """Leave beside the deployment who brought the revision there, and whether past a gate; lineage reads it."""
        judged = run.stages.get("evaluation-after")
        told: dict[str, Any] = {"run": run.name}
        if judged is not None and judged.execution.HasField("error"):
            report = self._artifacts.get(judged.output)
            error = json_format.MessageToDict(judged.execution.error)
            told |= {"forced": True, "report": {"name": report.name, "digest": report.digest}, "error": error}
        self._store.put_json(lineage_key(revision), told)

    async def _do_job(self, run: RunProgress, stage: str, spec: Mapping[str, Any]) -> None:
        kind, status = stage.partition("-")[0], run.stages[stage]
        client, job_id = self._clients[kind], await self._job_id(kind, spec)
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
        await run.save()
        ended = await client.wait(job_id)
        if ended.execution.state == CANCELLED:
            raise Cancelled(f"{ended.name} was cancelled")
        if ended.execution.state != SUCCEEDED:
            raise RemoteError(ended.execution.error)

    async def _job_id(self, kind: str, spec: Mapping[str, Any]) -> str:
        digest = await self._clients[kind].plan(spec)
        return f"{kind[:5].rstrip('-')}-{digest[:12]}"

    async def _plan_revision(self, run: RunProgress, model: str) -> Served:
        return plan_revision(await asyncio.to_thread(self._artifacts.get, model), run.spec.deployment)

    async def _is_made(self, job: Any) -> bool:
        """Whether a job is there that has succeeded, and its output, too. Raises what keeps the store from telling."""
        if job is None or job.execution.state != SUCCEEDED:
            return False
        try:
            await asyncio.to_thread(self._artifacts.get, job.output)
        except NotFound:
            return False
        return True
