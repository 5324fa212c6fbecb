"""The gate: least values of metrics that a model must reach before it may be deployed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.common.errors import GateNotMet, Violation
from services.evaluation.metrics import Proportion


def check_gate(gate: Mapping[str, float], measured: Mapping[str, Proportion]) -> list[dict[str, Any]]:
    """Every threshold with its value: [{metric, least, value, n, met}]. A metric without rows is not met."""
    return [
        {
            "metric": m,
            "least": least,
            "value": measured[m].value,
            "n": measured[m].n,
            "met": bool(measured[m].n) and measured[m].value >= least,
        }
        for m, least in gate.items()
    ]


def raise_if_not_met(metadata: Mapping[str, Any]) -> None:
    """Raise GateNotMet with the numbers, if the sealed report's metadata says so."""
    failed = [g for g in metadata.get("gate", ()) if not g["met"]]
    if failed:
        numbers = [
            Violation(g["metric"], f"{g['value']:.1%} of {int(g['n'])} rows; the gate asks for {g['least']:.1%}")
            for g in failed
        ]
        raise GateNotMet(
            "the model is not good enough to be deployed; its report says where it fails", violations=numbers
        )
