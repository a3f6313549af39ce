"""Everything that one run of the gate found out, and its verdict."""

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
        narrowed: what the caller left of the suite, in words; empty for all of it.
        command: that asks again, up to the identifier of an item; empty where there is none.
        left_out: what could not be asked, and why, in a sentence.
        interrupted: a person stopped it.
        faults: that are not the candidate's, one line each.
        declares: what the candidate declares, by name and in words; where empty, its rounding points and accumulation.
        why: name -> why, of every check that may have been asked.
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
        """Findings of cases: neither a baseline, which may be missing, nor the state of torch is asked for."""
        return [finding for finding in self.findings if finding.check not in (BASELINE.name, STATE.name)]

    @property
    def covered(self) -> float:
        """Share of the questions, a check and a case each, that the candidate did not decline."""
        asked = {(f.check, f.case) for f in self._asked}
        return 1 - len({(f.check, f.case) for f in self.declined}) / len(asked) if asked else 0.0

    @property
    def verdict(self) -> Status:
        """The worst of the findings; NOT_COVERED when something was declined, or nothing was judged."""
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
        """What a pass is about where it is not about everything: declared by the candidate, or chosen by the caller."""
        return "; ".join(filter(None, (str(self.candidate.covers), self.narrowed)))

    @property
    def title(self) -> str:
        """The verdict, and of a pass what it is about."""
        return f"{self.word} ({self.qualification} only)" if self.qualification and not self.exit_code else self.word

    @property
    def exit_code(self) -> int:
        """0 for a pass; 1 for what the candidate is to blame for; 2 for faults that it is not to blame for, or no end.

        A weak pass and a worse one pass too, unless `strict`.
        """
        if (self.faults or self.interrupted) and self.verdict is not Status.FAIL:
            return 2
        if self.left_out:
            return 1
        if self.verdict in (Status.FAIL, Status.NOT_COVERED):
            return 1
        return int(self.strict and self.verdict is not Status.PASS)


def describe_device(device: torch.device, interpreted: bool = False) -> str:
    """The device in words, with what makes its arithmetic differ; `interpreted`: kernels run in the interpreter."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, CUDA {torch.version.cuda}"
    return f"CPU ({platform.machine()}){', kernels interpreted in fp32' if interpreted else ''}"


def _versions() -> dict[str, str]:
    found = {package: version for package in ("mxref", "torch", "triton") if (version := version_of(package))}
    return found | {"python": platform.python_version()}
