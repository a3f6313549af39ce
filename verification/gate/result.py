"""A gate run's findings and verdict."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch

from mxref.verification.arithmetic.accumulation import Accumulation
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.known import version_of
from mxref.verification.checks.finding import DriftMap, ErrorSample, Finding, Status
from mxref.verification.checks.registry import BASELINE, STATE, why


@dataclass
class GateResult:
    """One run.

    Attributes:
        candidate: with its declarations.
        accumulation: of the bounds: declared, or the device's default.
        device: in words.
        suite: in words.
        seed: of every draw.
        strict: anything short of a plain pass fails the run.
        findings: one a check, case and tensor.
        started: UTC, ISO 8601.
        seconds: wall-clock.
        versions: of programs.
        narrowed: what the caller left of the suite; empty for all.
        command: that asks again, but for an item's identifier; empty for none.
        left_out: what could not be asked, and why.
        faults: not the candidate's, a line each.
        declares: the candidate's declarations, in words by name; where empty, rounding points and accumulation.
        why: of every check, by name.
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
    narrowed: str = ""
    command: str = ""
    left_out: str = ""
    interrupted: bool = False
    faults: list[str] = field(default_factory=list)
    declares: tuple[tuple[str, str], ...] = ()
    why: Mapping[str, str] = field(default_factory=why)

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
    def declined(self) -> list[Finding]:
        """What the candidate declined without having declared it."""
        return [finding for finding in self._asked if finding.status is Status.NOT_COVERED]

    @property
    def _asked(self) -> list[Finding]:
        """Findings of cases: not of a baseline, which may be missing, or of torch's state."""
        return [finding for finding in self.findings if finding.check not in (BASELINE.name, STATE.name)]

    @property
    def covered(self) -> float:
        """Share of the questions, one a check and case, that the candidate did not decline."""
        asked = {(f.check, f.case) for f in self._asked}
        return 1 - len({(f.check, f.case) for f in self.declined}) / len(asked) if asked else 0.0

    @property
    def verdict(self) -> Status:
        """The worst finding; NOT_COVERED when something was declined, or nothing was judged."""
        counts = self.counts()
        if counts[Status.FAIL]:
            return Status.FAIL
        if self.declined or not self._asked:
            return Status.NOT_COVERED
        return next((status for status in (Status.WEAK, Status.WORSE) if counts[status]), Status.PASS)

    @property
    def word(self) -> str:
        """The verdict in one or two words."""
        if self.exit_code == 2:
            return "NO VERDICT"
        if self.verdict is Status.NOT_COVERED and self.covered:
            return "INCOMPLETE"
        if self.exit_code:
            return "FAIL"
        return {Status.WEAK: "WEAK PASS", Status.WORSE: "PASS, BUT WORSE"}.get(self.verdict, "PASS")

    @property
    def qualification(self) -> str:
        """What a pass is limited to, by declaration or by the caller."""
        return "; ".join(filter(None, (str(self.candidate.covers), self.narrowed)))

    @property
    def title(self) -> str:
        """The verdict, and what a pass is limited to."""
        return f"{self.word} ({self.qualification} only)" if self.qualification and not self.exit_code else self.word

    @property
    def exit_code(self) -> int:
        """0 for a pass; 1 if the candidate is to blame; 2 for other faults, or no end.

        Weak and worse passes count as passes, unless `strict`.
        """
        if (self.faults or self.interrupted) and self.verdict is not Status.FAIL:
            return 2
        if self.left_out:
            return 1
        if self.verdict in (Status.FAIL, Status.NOT_COVERED):
            return 1
        return int(self.strict and self.verdict is not Status.PASS)


def describe_device(device: torch.device, interpreted: bool = False) -> str:
    """The device in words, with what makes its arithmetic differ; `interpreted`: in Triton's interpreter."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, CUDA {torch.version.cuda}"
    return f"CPU ({platform.machine()}){', kernels interpreted in fp32' if interpreted else ''}"


def _versions() -> dict[str, str]:
    found = {package: version for package in ("mxref", "torch", "triton") if (version := version_of(package))}
    return found | {"python": platform.python_version()}
