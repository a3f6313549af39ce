"""Runs every guard on every case and adds the findings up to one verdict."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata

import torch

from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, Accumulation
from mxref.verification.candidates.candidate import Candidate, default_accumulation
from mxref.verification.checks.finding import DriftMap, ErrorSample, Finding, Status
from mxref.verification.gate.plan import (
    Step,
    behaviour_steps,
    case_steps,
    checkpoint_steps,
    decode_steps,
    suite_steps,
)

__all__ = [
    "GUARDS",
    "GateResult",
    "Step",
    "behaviour_steps",
    "case_steps",
    "checkpoint_steps",
    "decode_steps",
    "run_gate",
    "suite_steps",
]

GUARDS = {
    "decode": (
        "Every pair of an MXFP4 code and a scale byte, 16 × 256 of them, is decoded through the candidate and compared "
        "bit by bit with the value that the format defines."
    ),
    "integer": (
        "Inputs are small integers chosen so that every sum is exact in any order. Nothing may differ, not by one bit: "
        "whatever does is a wrong index, sign, scale or a missing term, never rounding."
    ),
    "interval": (
        "Ordinary numbers. For every single element the gate derives, from the declared arithmetic, the interval in "
        "which an honest result must lie; no tolerance is tuned. One element outside fails the case."
    ),
    "drift": (
        "Errors too small for any one element to show, seen by their mean: over every expert and block of columns the "
        "error is fitted to the base term, to LoRA's term and to their sum. A slope fails if it is larger than honest "
        "rounding makes it; the probability that honest arithmetic fails anywhere in a run is 1 in 100,000."
    ),
    "sign": "No sign may differ wherever the accepted interval lies on one side of zero.",
    "exponent": (
        "The ratio to the exact value must round to 2^0 wherever honest rounding leaves it there. What it rounds to "
        "instead names the bug: a power of two is a wrong exponent, zero is a row that was dropped."
    ),
    "determinism": (
        "The same call, again and again, gives the same bits; interpreted, also when the programs of each kernel run "
        "from the last to the first, since a GPU promises no order."
    ),
    "rows": (
        "A token's rows keep their bits when other tokens change their values, and, under a pinned configuration, when "
        "other tokens leave the batch."
    ),
    "poison": (
        "Every operand lies between zones of NaN, and memory that nobody has written yet is filled with NaN. Not one "
        "bit of a result may change."
    ),
    "unmutated": "Operands, and what lies around them in memory, are bit for bit what they were before the call.",
    "second backward": "A second backward pass over a retained graph gives the first one's gradients, bit for bit.",
    "configurations": (
        "Every kernel configuration that dispatch can reach is pinned and judged, and dispatch on its own gives the "
        "bits of one of them: no other is shipped."
    ),
    "operators": (
        "This project's public operators beside the layer, in every layout, into buffers of NaN; what does not fit "
        "must be refused. Only its own kernels are asked."
    ),
    "margins": (
        "Rows of another rank that hold NaN, and indices out of range that nobody checked: no good row may notice, and "
        "nothing may be written outside a tensor. Only this project's kernels are asked."
    ),
    "baseline": (
        "The largest and the RMS error against the ones accepted for this architecture. What is worse, though still "
        "inside the bound, is shown until it is accepted on purpose."
    ),
}
"""What each guard does, for a reader who meets it for the first time."""


@dataclass
class GateResult:
    """Everything that one run of the gate found out.

    Attributes:
        candidate: what was judged, with its declarations.
        accumulation: what bounds were derived for: the declared one, or the device's default.
        device: where it ran, in words.
        suite: which cases, in words.
        seed: of every draw.
        strict: whether anything short of a plain pass fails the run.
        findings: one per guard, case and tensor.
        samples: errors for the plots.
        started: UTC, ISO 8601.
        seconds: wall-clock duration.
        versions: of the programs that took part.
        maps: drift by stratum, for the plots.
    """

    candidate: Candidate
    accumulation: Accumulation
    device: str
    suite: str
    seed: int
    strict: bool = False
    findings: list[Finding] = field(default_factory=list)
    samples: list[ErrorSample] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    maps: list[DriftMap] = field(default_factory=list)

    def counts(self) -> Counter[Status]:
        """Findings by status."""
        return Counter(finding.status for finding in self.findings)

    @property
    def verdict(self) -> Status:
        """The worst of the findings; NOT_COVERED when the candidate covers nothing at all."""
        counts = self.counts()
        if counts[Status.FAIL]:
            return Status.FAIL
        for status in (Status.WEAK, Status.WORSE):
            if counts[status]:
                return status
        return Status.PASS if counts[Status.PASS] else Status.NOT_COVERED

    @property
    def title(self) -> str:
        """The verdict in one or two words."""
        if self.exit_code:
            return "FAIL"
        return {Status.WEAK: "WEAK PASS", Status.WORSE: "PASS, BUT WORSE"}.get(self.verdict, "PASS")

    @property
    def exit_code(self) -> int:
        """0 for a pass, 1 otherwise. A weak pass, a worse one and a gap in the coverage pass too, unless `strict`."""
        if self.verdict in (Status.FAIL, Status.NOT_COVERED):
            return 1
        return int(self.strict and self.counts()[Status.PASS] < len(self.findings))


def run_gate(
    candidate: Candidate,
    steps: Sequence[Step],
    device: torch.device,
    *,
    suite: str,
    seed: int,
    strict: bool = False,
    on_step: Callable[[Step], None] = lambda step: None,
) -> GateResult:
    """Judge one candidate.

    Args:
        candidate: what to judge.
        steps: from `suite_steps`, or from the functions for its parts.
        device: the device that the steps were made for.
        suite: what to call these steps in the report.
        seed: that the steps were made with.
        strict: see `GateResult.exit_code`.
        on_step: called before each step.
    """
    how = candidate.accumulation or ACCUMULATIONS[default_accumulation(device)]
    result = GateResult(candidate, how, describe_device(device), suite, seed, strict)
    start = time.monotonic()
    for step in steps:
        on_step(step)
        findings, pictures = step.judge(candidate, how)
        result.findings += [_claimed(candidate, finding) for finding in findings]
        result.samples += [entry for entry in pictures if isinstance(entry, ErrorSample)]
        result.maps += [entry for entry in pictures if isinstance(entry, DriftMap)]
    result.seconds = time.monotonic() - start
    return result


def describe_device(device: torch.device) -> str:
    """The device in words, with what makes its arithmetic differ."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, CUDA {torch.version.cuda}"
    interpreted = ", kernels interpreted in fp32" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return f"CPU ({platform.machine()}){interpreted}"


def _claimed(candidate: Candidate, finding: Finding) -> Finding:
    """A candidate that claims to be complete may decline nothing."""
    if candidate.complete and finding.status is Status.NOT_COVERED:
        return replace(finding, status=Status.FAIL, reason=f"declined, but must cover everything: {finding.reason}")
    return finding


def _versions() -> dict[str, str]:
    found = {"mxref": "", "torch": "", "triton": ""}
    for package in list(found):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            del found[package]
    return found | {"python": platform.python_version()}
