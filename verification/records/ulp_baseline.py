"""Committed errors: what the shipped kernels' largest and RMS errors were, by architecture, case and tensor.

A derived bound says what is wrong; a baseline says what has become worse while still right, after glibc's
`libm-test-ulps`. It is written only on request, from a run in which nothing failed, so the bound caps it; a later run
that is worse says so until its errors are accepted.

On a GPU the shipped kernels give the same bits on every machine of one architecture, so any worsening is a change of
theirs or of a compiler's. Interpreted, a tile's product is NumPy's, whose order of summation its BLAS chooses by the
processor: there a worsening counts only where that order and all versions are those of the baseline, and is information
elsewhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mxref.verification.arithmetic.thresholds import GROWTH
from mxref.verification.candidates.known import version_of
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.checks.registry import BASELINE, INTERVAL
from mxref.verification.clone import EVIDENCE
from mxref.verification.records.record import folder_name, read, record_path, write

_KIND = "ulp_baseline"
_JUDGED = INTERVAL.name  # whose errors are kept

Errors = dict[str, dict[str, tuple[float, float]]]
"""case -> tensor -> (largest |error|, RMS error), both in ulp."""


@dataclass(frozen=True)
class Baseline:
    """Accepted errors of one architecture.

    Attributes:
        seed: of the draws behind them.
        environment: versions and, for a CPU, NumPy's order of summation; see `environment`.
        errors: case -> tensor -> (largest |error|, RMS error), in ulp.
    """

    seed: int
    environment: dict[str, str]
    errors: Errors = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Baseline | None:
        """The baseline in a file; None where there is no file.

        Raises:
            ValueError: the file is no record; see `record.read`.
        """
        if not path.is_file():
            return None
        entry = read(path)
        errors = {
            case: {tensor: (largest, rms) for tensor, (largest, rms) in tensors.items()}
            for case, tensors in entry["ulp"].items()
        }
        return cls(entry["seed"], entry["environment"], errors)

    def write(self, device: torch.device, folder: Path) -> Path:
        """Keep it as a device's record, in a stable order, so that a diff shows what changed; the file."""
        ulp = {case: dict(sorted(tensors.items())) for case, tensors in sorted(self.errors.items())}
        found = {"seed": self.seed, "environment": self.environment, "ulp": ulp}
        return write(_KIND, found, device, folder)


def baseline_path(device: torch.device, folder: Path = EVIDENCE) -> Path:
    """Where the baseline of the device's architecture lies."""
    return record_path(_KIND, device, folder)


def environment(device: torch.device) -> dict[str, str]:
    """What the bits of a run may depend on besides the kernels."""
    packages = ("torch", "triton", "numpy") if device.type == "cpu" else ("torch", "triton")
    found = {package: version_of(package) or "none" for package in packages}
    return found | ({"fp32 products": _order_of_summation()} if device.type == "cpu" else {})


def baseline_findings(
    findings: Iterable[Finding], device: torch.device, seed: int, folder: Path = EVIDENCE
) -> list[Finding]:
    """The errors of a run's interval findings against the accepted ones: one finding a tensor.

    Args:
        findings: of a run of the shipped kernels.
        device: where they ran.
        seed: of the run; another seed than the baseline's draws other numbers, and nothing is compared.
        folder: where baselines lie.

    Returns:
        WORSE for a tensor whose largest or RMS error grew in some case, PASS otherwise; NOT_COVERED for results
        without a baseline. Nothing for another seed, or for a run without errors to compare.
    """
    name, here, errors = folder_name(device), environment(device), _errors(findings)
    baseline = Baseline.read(baseline_path(device, folder))
    if not errors or (baseline is not None and baseline.seed != seed):
        return []
    advice = "`mxref gate --accept-baseline` writes it"
    if baseline is None:
        return [Finding(BASELINE.name, name, "all", Status.NOT_COVERED, f"no baseline for {name} yet; {advice}", 0, 0)]
    judged = device.type != "cpu" or here == baseline.environment  # see this module's docstring
    before = baseline.environment
    moved = ", ".join(f"{key} {was} → {here.get(key, 'none')}" for key, was in before.items() if here.get(key) != was)
    tensors: dict[str, list[tuple[str, tuple[float, float], tuple[float, float]]]] = {}
    unknown = 0
    for case, own in errors.items():
        for tensor, now in own.items():
            was = baseline.errors.get(case, {}).get(tensor)
            if was is None:
                unknown += 1
            else:
                tensors.setdefault(tensor, []).append((case, was, now))
    results = [_tensor_finding(name, tensor, pairs, judged, moved) for tensor, pairs in tensors.items()]
    if unknown:
        reason = f"{unknown} results have no baseline yet; {advice}"
        results.append(Finding(BASELINE.name, name, "new results", Status.NOT_COVERED, reason, unknown, 0))
    return results


def accept(
    findings: Sequence[Finding], device: torch.device, seed: int, folder: Path = EVIDENCE, whole: bool = False
) -> Path:
    """Make a run's errors the baseline; cases that it did not judge keep theirs, if seed and environment are the same.

    Args:
        findings: of a run of the shipped kernels.
        device: where they ran.
        seed: of the run.
        folder: where baselines lie.
        whole: the run judged a whole suite: what covered an earlier domain, and is asked no more, is dropped.

    Returns:
        The file.

    Raises:
        ValueError: something in the run failed, or there is nothing to accept.
    """
    failed = [finding for finding in findings if not finding.ok]
    if failed:
        raise ValueError(f"{len(failed)} findings failed, the first: {failed[0]}; only a passing run can be a baseline")
    errors = _errors(findings)
    if not errors:
        raise ValueError("the run holds no errors to accept; run the interval cases")
    here = environment(device)
    try:
        before = Baseline.read(baseline_path(device, folder))
    except ValueError:  # no record of this schema: replaced
        before = None
    kept = before.errors if before is not None and (before.seed, before.environment) == (seed, here) else {}
    if whole:
        covered = {_covering(case) for case in errors} - {None}
        kept = {case: tensors for case, tensors in kept.items() if _covering(case) not in covered}
    return Baseline(seed, here, kept | errors).write(device, folder)


def _covering(case: str) -> str | None:
    """The word for what a case covers of the domain with its kin; None of all other cases."""
    found = re.match(r"(pairs|triples) \d+ [0-9a-f]{4}", case)
    return found and found[1]


def _errors(findings: Iterable[Finding]) -> Errors:
    errors: Errors = {}
    for finding in findings:
        if finding.check == _JUDGED and finding.max_ulp is not None and finding.rms_ulp is not None:
            errors.setdefault(finding.case, {})[finding.tensor] = (finding.max_ulp, finding.rms_ulp)
    return errors


def _tensor_finding(
    name: str, tensor: str, pairs: list[tuple[str, tuple[float, float], tuple[float, float]]], judged: bool, moved: str
) -> Finding:
    worse = [(case, was, now) for case, was, now in pairs if _worse(was, now)]
    better = sum(_worse(now, was) for _, was, now in pairs)
    since = f" ({moved})" if moved else ""
    if not worse:
        also = f", smaller in {better}" if better else ""
        reason = f"no error grew in {len(pairs)} cases{also}{since}"
        return Finding(BASELINE.name, name, tensor, Status.PASS, reason, len(pairs), 0)
    case, was, now = max(worse, key=lambda entry: _growth(entry[1], entry[2]))
    grew = (
        f"larger in {len(worse)} of {len(pairs)} cases; most in {case}: "
        f"max {was[0]:.4g} → {now[0]:.4g} ulp, RMS {was[1]:.4g} → {now[1]:.4g}{since}"
    )
    details: dict[str, float | str] = {"case": case, "max was": was[0], "max is": now[0]}
    details |= {"rms was": was[1], "rms is": now[1]}
    if not judged:
        return Finding(
            BASELINE.name, name, tensor, Status.PASS, f"information only: {grew}", len(pairs), 0, details=details
        )
    reason = f"{grew}; accept it on purpose, or undo it"
    return Finding(BASELINE.name, name, tensor, Status.WORSE, reason, len(pairs), len(worse), details=details)


def _worse(was: tuple[float, float], now: tuple[float, float]) -> bool:
    return any(b > a + GROWTH * max(a, 1) for a, b in zip(was, now, strict=True))


def _growth(was: tuple[float, float], now: tuple[float, float]) -> float:
    return max((b - a) / a if a else float("inf") for a, b in zip(was, now, strict=True) if b > a)


def _order_of_summation() -> str:
    """Names the order in which NumPy's BLAS sums on this processor, by the bits of products of fixed numbers.

    A processor's own name does not tell: virtual machines hide it.
    """
    draw, digest = np.random.default_rng(0), hashlib.sha256()
    for m, k, n in ((32, 64, 128), (32, 16, 128), (32, 64, 32), (16, 32, 64)):
        a, b = (draw.standard_normal(shape, np.float32) for shape in ((m, k), (k, n)))
        digest.update((a @ b).tobytes())
    return digest.hexdigest()[:12]
