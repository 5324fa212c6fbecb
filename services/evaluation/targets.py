"""Whom an evaluation asks: where each target answers, and the name of its column."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from services.common.errors import FailedPrecondition, InvalidSpec, Violation
from services.evaluation.ask import Address
from services.evaluation.spec import Spec, Target
from services.evaluation.wire import Wire

CONSTRAINED = ", tools="
"""What the label of the constrained column ends with."""


@dataclass(frozen=True)
class Asked:
    """One target of an evaluation."""

    label: str
    role: str
    """"target" (the one that is judged), "constrained" (the same, asked with `tools`) or "reference"."""
    address: Address
    revision: str
    """What not_worse may call it beside its label; "" where it is asked in another way than the one that is judged."""


def find_targets(spec: Spec) -> list[Asked]:
    """All that are asked, in the order of the columns. Raises InvalidSpec naming every key that cannot be used."""
    wanted = [(target, "reference") for target in spec.targets]
    alike = spec.target.tools
    named = {target.revision for target in spec.targets if target.tools == alike}
    extra = [c.revision for c in spec.not_worse if c.revision and c.revision not in named]
    wanted += [(Target(revision=revision, tools=alike), "reference") for revision in dict.fromkeys(extra)]
    wanted.append((spec.target, "target"))
    if spec.constrained:
        label = f"{_label(spec.target)}{CONSTRAINED}"
        wanted.append((spec.target.model_copy(update={"tools": True, "label": label}), "constrained"))
    variables = dict.fromkeys(target.api_key_variable for target, _ in wanted if target.api_key_variable)
    if wrong := [Violation("spec.targets", problem) for name in variables if (problem := _find_problem(name))]:
        raise InvalidSpec("the worker's environment lacks API keys", violations=wrong)
    labels = _unique([_label(target) for target, _ in wanted])
    return [
        Asked(label, role, find_address(target), target.revision if target.tools == alike else "")
        for label, (target, role) in zip(labels, wanted, strict=True)
    ]


def find_label(asked: Sequence[Asked], than: str) -> str:
    """The label of the column that not_worse calls by its label or revision; the first one, should several be called so."""
    return next(target.label for target in asked if than in (target.label, target.revision))


def find_address(target: Target) -> Address:
    """Where the target answers. A revision is reached through the gateway, also while it takes no traffic."""
    wire = Wire(target.tools, bool(target.revision))
    if target.revision:
        gateway = os.environ.get("FABRICTUNE_GATEWAY_URL", "")
        if not gateway:
            raise FailedPrecondition(
                "FABRICTUNE_GATEWAY_URL does not say where the gateway is; give target.address instead"
            )
        _, deployment, _, revision = target.revision.split("/")
        token, ca_file = _read_key("FABRICTUNE_TOKEN"), os.environ.get("FABRICTUNE_CA_FILE", "")
        return Address(f"{gateway.rstrip('/')}/v1", f"{deployment}@{revision}", token, ca_file, wire)
    key = _read_key(target.api_key_variable) if target.api_key_variable else ""
    return Address(target.address, target.model, key, "", wire)


def _read_key(variable: str) -> str:
    """What a variable holds, without the line break that files and Secrets often end in; no header takes it."""
    return os.environ.get(variable, "").strip()


def _find_problem(variable: str) -> str:
    """Why a variable's key cannot be sent, without a word of the key; "" when it can."""
    key = _read_key(variable)
    if not key:
        return f"api_key_variable names {variable}, which is not set here"
    if not (key.isascii() and key.isprintable()):
        return (
            f"api_key_variable names {variable}, whose value has characters that no API key has, such as a line break"
        )
    return ""


def _label(target: Target) -> str:
    return target.label or target.model or "@".join(target.revision.split("/")[1::2])


def _unique(labels: Sequence[str]) -> list[str]:
    """Labels as they are, and with a number where one has been before."""
    found: list[str] = []
    for label in labels:
        numbered = (f"{label} ({number})" for number in count(2))
        free = (name for name in numbered if name not in found and name not in labels)
        found.append(next(free) if label in found else label)
    return found
