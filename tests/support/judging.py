"""One check asked about one sample, as the gate asks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mxref.scattermoe import RoundingPoints
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, Accumulation
from mxref.verification.arithmetic.thresholds import ALPHA
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.draw import draw
from mxref.verification.cases.elements import element_cases, every_element
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import Finding
from mxref.verification.checks.registry import CHECKS, Check

BY_NAME: dict[str, Check] = {check.name: check for check in CHECKS}


def ask(
    names: str | Sequence[str],
    candidate: Any,
    sample: Sample,
    points: RoundingPoints | None = None,
    how: Accumulation = ACCUMULATIONS["fp32-blocks-64"],
    slopes: int | None = None,
    alpha: float = ALPHA,
) -> list[Finding]:
    """What the named checks, which share their runs, find."""
    checks = [BY_NAME[name] for name in ([names] if isinstance(names, str) else names)]
    points = RoundingPoints.contract(sample.problem.dtype) if points is None else points
    expected = Expectation(sample, points, how, slopes, alpha)
    answers = checks[0].ask(candidate, sample)
    return [replace(finding, check=check.name) for check in checks for finding in check.compare(answers, expected)]


def ask_about_decoding(candidate: Any, device: torch.device | str, dtype: torch.dtype) -> list[Finding]:
    """Every element through the products, and through the candidate's own decoder if it has one."""
    findings = [f for case in element_cases(dtype) for f in ask("decode", candidate, draw(case, device))]
    own = ask("decoder", candidate, draw(every_element(dtype), device)) if candidate.decode is not None else []
    return findings + own


def quick(device_type: str) -> list[Case]:
    """The cases of ordinary numbers in the quick suite."""
    return list(BY_NAME["interval"].cases("quick", device_type))  # type: ignore[arg-type]


def integers(device_type: str) -> list[Case]:
    """The integer fixtures of the quick suite."""
    return list(BY_NAME["integer"].cases("quick", device_type))  # type: ignore[arg-type]
