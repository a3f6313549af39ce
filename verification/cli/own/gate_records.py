"""What `mxref gate` keeps of a run of this project's kernels: the verdict as evidence, the errors as a baseline."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mxref.verification.cli import UsageError
from mxref.verification.gate.result import GateResult
from mxref.verification.records import record, ulp_baseline
from mxref.verification.records.gate_summary import gate_summary


def keep(result: GateResult, arguments: argparse.Namespace, device: torch.device) -> Path:
    """Write the verdict as evidence; the record's path."""
    return record.write("gate", gate_summary(result), device, arguments.record)


def baseline(result: GateResult, arguments: argparse.Namespace, device: torch.device) -> Path | None:
    """Hold the run's errors against the accepted ones, or accept them if all is well; the written file.

    Raises:
        UsageError: there are no errors to accept.
    """
    if arguments.accept_baseline is None:
        result.findings += ulp_baseline.baseline_findings(result.findings, device, result.seed)
        return None
    if any(not finding.ok for finding in result.findings):
        return None
    try:
        return ulp_baseline.accept(
            result.findings, device, result.seed, arguments.accept_baseline, whole=not result.narrowed
        )
    except ValueError as error:
        raise UsageError(f"--accept-baseline: {error}") from None
