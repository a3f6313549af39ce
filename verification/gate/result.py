"""Everything that one run of the gate found out, and its verdict."""

from __future__ import annotations

import os
import platform
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata

import torch

from mxref.verification.arithmetic.accumulation import Accumulation
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.checks.finding import DriftMap, ErrorSample, Finding, Status

__all__ = ["GateResult", "describe_device"]


@dataclass
class GateResult:
    """One run.

    Attributes:
        candidate: what was judged, with its declarations.
        accumulation: what bounds were derived for: the declared one, or the device's default.
        device: where it ran, in words.
        suite: which cases, in words.
        seed: of every draw.
        strict: whether anything short of a plain pass fails the run.
        findings: one per check, case and tensor.
        started: UTC, ISO 8601.
        seconds: wall-clock duration.
        versions: of the programs that took part.
    """

    candidate: Candidate
    accumulation: Accumulation
    device: str
    suite: str
    seed: int
    strict: bool = False
    findings: list[Finding] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=lambda: _versions())

    @property
    def samples(self) -> list[ErrorSample]:
        """Errors for the plots."""
        return [f.picture for f in self.findings if isinstance(f.picture, ErrorSample)]

    @property
    def maps(self) -> list[DriftMap]:
        """Drift by stratum, for the plots."""
        return [f.picture for f in self.findings if isinstance(f.picture, DriftMap)]

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


def describe_device(device: torch.device) -> str:
    """The device in words, with what makes its arithmetic differ."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, CUDA {torch.version.cuda}"
    interpreted = ", kernels interpreted in fp32" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return f"CPU ({platform.machine()}){interpreted}"


def _versions() -> dict[str, str]:
    found = {"mxref": "", "torch": "", "triton": ""}
    for package in list(found):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            del found[package]
    return found | {"python": platform.python_version()}
