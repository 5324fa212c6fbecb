"""A revision takes traffic by steps; when it answers worse than the old ones, they get all of it back. No HTTP here.

`judge` is the pure rule. A rollback only moves weights: the old revisions take traffic until the end, so they are warm,
and what the candidate has begun it finishes. A restarted service begins the present step anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict

from services.common.logs import get_logger
from services.inference.outcomes import Figures, Outcomes
from services.inference.revisions import COMING, CanaryRun, CanaryState, Deployment, State
from services.inference.spec import Canary

POLL_SECONDS = 0.25
NOTICEABLE_SECONDS = 0.05
"""First bytes that differ by less than this are alike, whatever their ratio: of a few milliseconds, noise makes many."""

Shift = Callable[[Deployment, dict[str, int]], Awaitable[None]]
"""Gives a deployment other traffic at once; a store that is away does not keep it from that."""


class Canaries:
    """The canaries of all deployments, a task each."""

    def __init__(self, outcomes: Outcomes, shift: Shift) -> None:
        self._outcomes, self._shift = outcomes, shift
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._log = get_logger("canary")

    async def start(self, owner: Deployment, candidate: str, policy: Canary) -> None:
        """The first step, at once; the others follow by themselves. The candidate is READY, others have the traffic."""
        before = {r: part for r, part in owner.traffic.items() if r != candidate} or dict(owner.traffic)
        total = sum(before.values())
        if total != 100:  # the candidate had some of it already
            before = share(before, 100)
        owner.canary = CanaryRun(candidate, before, policy, create_time=time.time())
        self.resume(owner)  # first: a caller that goes away meanwhile leaves no canary that nobody watches
        await self._take_step(owner, owner.canary)

    def resume(self, owner: Deployment) -> None:
        """Go on with a canary that runs."""
        if owner.canary is not None and owner.canary.state is CanaryState.RUNNING:
            self._tasks[owner.id] = asyncio.create_task(self._run(owner, owner.canary), name=f"canary {owner.id}")

    def stop(self, owner: Deployment, reason: str) -> None:
        """Traffic is moved by hand or the deployment goes: nothing is taken back."""
        task = self._tasks.pop(owner.id, None)
        if task is not None:
            task.cancel()
        if owner.canary is not None and owner.canary.state is CanaryState.RUNNING:
            owner.canary.state, owner.canary.reason = CanaryState.STOPPED, reason

    async def close(self) -> None:
        """Stop watching; the canaries stay as they are and go on when the service does."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, owner: Deployment, run: CanaryRun) -> None:
        since, lost = time.monotonic(), owner.revisions[run.candidate].lost
        try:
            while run.state is CanaryState.RUNNING:
                await asyncio.sleep(min(POLL_SECONDS, run.policy.observe or POLL_SECONDS))
                candidate = owner.revisions[run.candidate]
                if candidate.state in COMING and candidate.lost == lost:
                    since = time.monotonic()  # the service was restarted and adopts it, or it sleeps
                    continue
                mine = self._outcomes.figures(owner.id, run.candidate)
                others = self._outcomes.figures(owner.id, *run.before)
                run.figures = {"candidate": asdict(mine), "stable": asdict(others)}
                bad = judge(run.policy, mine, others)
                if candidate.state is not State.READY or candidate.lost > lost:
                    bad = f"its engine was lost: {candidate.message.partition(chr(10))[0]}"
                if bad:
                    run.state, run.reason = CanaryState.ROLLED_BACK, bad
                    self._log.warning("rolled back", revision=candidate.name, reason=bad)
                    await self._shift(owner, run.before)
                elif time.monotonic() - since >= run.policy.observe and mine.answers >= run.policy.min_answers:
                    since = time.monotonic()
                    run.step += 1
                    await self._take_step(owner, run)
        finally:
            if self._tasks.get(owner.id) is asyncio.current_task():  # not when another canary has taken its place
                del self._tasks[owner.id]

    async def _take_step(self, owner: Deployment, run: CanaryRun) -> None:
        if run.step >= len(run.policy.steps):
            run.state, run.reason = CanaryState.PROMOTED, describe(run)
            await self._shift(owner, {run.candidate: 100})
            return
        self._outcomes.forget(owner.id)
        run.reason = f"observed for {run.policy.observe:g} s and {run.policy.min_answers} answers at least"
        await self._shift(owner, {**share(run.before, 100 - run.percent), run.candidate: run.percent})


def judge(policy: Canary, candidate: Figures, stable: Figures) -> str:
    """Why the candidate must not go on; "" when it may, or when too little is known yet."""
    if not candidate.failures and candidate.answers < policy.min_answers:
        return ""
    # Failures count from the first one on, as parts of the answers that are needed at least: 5 of 5 need no 15 more.
    rate = candidate.failures / max(candidate.answers, policy.min_answers, 1)
    if rate > policy.max_error_rate:
        return (
            f"{candidate.failures} of its {candidate.answers} answers failed; "
            f"{policy.max_error_rate:.1%} may (the others: {stable.failures} of {stable.answers})"
        )
    if candidate.answers < policy.min_answers:
        return ""
    if policy.max_p95_seconds is not None and candidate.p95 > policy.max_p95_seconds:
        return f"its first byte takes {candidate.p95:.3f} s (p95); {policy.max_p95_seconds:g} s may be"
    enough = stable.answers - stable.failures >= max(policy.min_answers, 1)
    slower = candidate.p95 > max(policy.max_p95_ratio * stable.p95, stable.p95 + NOTICEABLE_SECONDS)
    if enough and slower:
        return (
            f"its first byte takes {candidate.p95:.3f} s (p95), the others' {stable.p95:.3f} s; "
            f"{policy.max_p95_ratio:g} times as long may be"
        )
    return ""


def share(weights: dict[str, int], total: int) -> dict[str, int]:
    """The same weights with another sum, in whole percent; what rounding leaves goes to the largest."""
    whole = sum(weights.values())
    parts = {r: w * total // whole for r, w in weights.items()}
    parts[max(weights, key=lambda r: weights[r])] += total - sum(parts.values())
    return parts


def describe(run: CanaryRun) -> str:
    """The last step's figures as a sentence."""
    mine = run.figures.get("candidate", {})
    return f"{mine.get('failures', 0)} of its {mine.get('answers', 0)} answers failed; p95 {mine.get('p95', 0):.3f} s"
