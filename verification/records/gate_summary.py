"""What is worth keeping of a gate's result, as plain data."""

from __future__ import annotations

import math
from typing import Any

from mxref.verification.gate.result import GateResult


def gate_summary(result: GateResult) -> dict[str, Any]:
    """The verdict, any failures, and the largest errors: in ulp of cases with any, as shares of the bound by check."""
    ulps: dict[str, dict[str, float]] = {}
    shares: dict[str, dict[str, float]] = {}
    for finding in result.findings:
        _keep_largest(ulps.setdefault(finding.case, {}), finding.tensor, finding.max_ulp)
        _keep_largest(shares.setdefault(finding.check, {}), finding.tensor, finding.bound_share)
    return {
        "passed": result.exit_code == 0,
        "verdict": str(result.verdict),
        "counts": {str(status): count for status, count in result.counts().items()},
        "candidate": result.candidate.name,
        "suite": result.suite,
        "seed": result.seed,
        "seconds": round(result.seconds, 1),
        "failures": [str(finding) for finding in result.findings if not finding.ok],
        "bound_share": {check: tensors for check, tensors in shares.items() if tensors},
        "max_ulp": {case: tensors for case, tensors in ulps.items() if any(tensors.values())},
    }


def _keep_largest(tensors: dict[str, float], tensor: str, value: float | None) -> None:
    if value is not None and math.isfinite(value):
        tensors[tensor] = max(tensors.get(tensor, 0.0), value)
