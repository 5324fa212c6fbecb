"""The gate: what a model must reach, and what it may not be worse than, before it may be deployed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.common.errors import GateNotMet, Violation
from services.evaluation.intervals import Estimate
from services.evaluation.metrics import METRICS, Score
from services.evaluation.spec import Comparison
from services.evaluation.summary import paired_difference


def check_gate(gate: Mapping[str, float], measured: Mapping[str, Estimate]) -> list[dict[str, Any]]:
    """Every threshold with its value: [{metric, least or most, value, n, met}]. A metric without rows is not met."""
    found = []
    for metric, threshold in gate.items():
        value, n, less = measured[metric].value, measured[metric].n, METRICS[metric].less
        met = value <= threshold if less else value >= threshold
        found.append(
            {"metric": metric, "most" if less else "least": threshold, "value": value, "n": n, "met": bool(n) and met}
        )
    return found


def check_comparisons(
    comparisons: Sequence[Comparison], scores_of: Callable[[str], Sequence[Score]], own: Sequence[Score]
) -> list[dict[str, Any]]:
    """Every comparison: [{metric, than, by, difference, low, high, n, missing, met}], on the rows that both answered.

    scores_of: of what a comparison names. It is met when the difference itself is, not its whole interval, and the other has
    answered all of these rows: one in common says nothing of the rest.
    """
    found = []
    for comparison in comparisons:
        other = scores_of(comparison.than)
        answered = {score.id for score in other}
        for metric, by in comparison.by.items():
            difference, low, high, n = paired_difference(other, own, metric)
            missing = sum(s.marks[metric] is not None and s.id not in answered for s in own)
            worse = difference if METRICS[metric].less else -difference
            told = {"difference": difference, "low": low, "high": high, "n": n, "missing": missing}
            # A hair more than nothing: 0.85 - 0.9 is not quite -0.05.
            met = bool(n) and not missing and worse <= by + 1e-9
            found.append({"metric": metric, "than": comparison.than, "by": by, **told, "met": met})
    return found


def raise_if_not_met(metadata: Mapping[str, Any], report: str) -> None:
    """Raise GateNotMet with the numbers and the report's name, if its metadata says so."""
    failed = [g for g in metadata.get("gate", ()) if not g["met"]]
    if failed:
        raise GateNotMet(
            f"the model is not good enough to be deployed; {report} says where it fails (report.html)",
            {"report": report},
            [Violation(g["metric"], _explain(g)) for g in failed],
        )


def _explain(found: Mapping[str, Any]) -> str:
    n = int(found["n"])
    if missing := found.get("missing"):
        return (
            f"{found['than']} has no answer to {missing} of the rows as they are asked here; compare on the same rows"
        )
    if not n:
        return "no row was measured" + (f" by both this and {found['than']}" if "than" in found else "")
    if "than" in found:
        changed = f"{100 * found['difference']:+.1f} points [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
        return f"{changed} against {found['than']} on {n} rows; the gate allows {100 * found['by']:.1f} points worse"
    if "most" in found:
        return f"{found['value']:.1%} of {n} rows; the gate allows {found['most']:.1%}"
    return f"{found['value']:.1%} of {n} rows; the gate asks for {found['least']:.1%}"
