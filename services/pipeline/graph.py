"""Which stages a run has, what each waits for, and what runs next: values and pure functions, no effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fabrictune.v1 import job_pb2
from services.pipeline.spec import Spec

SUCCEEDED = job_pb2.Execution.SUCCEEDED
State = job_pb2.Execution.State


@dataclass(frozen=True)
class Node:
    """One stage of a run."""

    name: str
    after: tuple[str, ...] = ()
    """Stages that must have succeeded."""


def plan_stages(spec: Spec) -> tuple[Node, ...]:
    """The stages of a run, in the order in which people read them.

    The base model is asked after the merge, not beside the training: on one machine both would want every core or the
    only GPU, and its report is reused by later runs on the same rows anyway.
    """
    nodes = [Node("conversion"), Node("training", ("conversion",)), Node("merging", ("training",))]
    if spec.evaluation is not None:
        nodes += [Node("evaluation-before", ("merging",)), Node("evaluation-after", ("evaluation-before",))]
    if spec.deployment is not None:
        nodes.append(Node("deployment", (nodes[-1].name,)))
    return tuple(nodes)


def next_stages(nodes: Sequence[Node], states: Mapping[str, State]) -> list[str]:
    """Names of the stages that can start now: not begun, and all that they wait for has succeeded."""
    return [n.name for n in nodes if n.name not in states and all(states.get(a) == SUCCEEDED for a in n.after)]


def is_done(nodes: Sequence[Node], states: Mapping[str, State]) -> bool:
    """Whether every stage has succeeded."""
    return all(states.get(n.name) == SUCCEEDED for n in nodes)
