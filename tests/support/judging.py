"""One check asked about one sample, as the gate asks it, and cases by suite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mxref.scattermoe import RoundingPoints
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, Accumulation
from mxref.verification.cases import suites
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.domain import DIMENSIONS
from mxref.verification.cases.draw import draw
from mxref.verification.cases.elements import element_cases, every_element
from mxref.verification.checks.check import Check
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import Finding
from mxref.verification.checks.registry import CHECKS

BY_NAME: dict[str, Check] = {check.name: check for check in CHECKS}
NARROW = ", ".join(
    f"{dimension.name}={'|'.join(each.name for each in dimension.classes[: 1 + (dimension.name == 'scaling')])}"
    for dimension in DIMENSIONS
    if len(dimension.classes) > 6
    and dimension.name
    not in ("N", "rank", "slots", "parameters", "adapters", "gates", "routing", "values", "not finite")
)
"""A subset of the domain that a full suite is planned for in a fraction of the time."""


def ask(
    names: str | Sequence[str],
    candidate: Any,
    sample: Sample,
    points: RoundingPoints | None = None,
    how: Accumulation = ACCUMULATIONS["fp32-blocks-64"],
) -> list[Finding]:
    """What the named checks, which share their runs, find; `points` None for the contract's own."""
    checks = [BY_NAME[name] for name in ([names] if isinstance(names, str) else names)]
    points = RoundingPoints.contract(sample.problem.dtype) if points is None else points
    expected, answers = Expectation(sample, points, how), checks[0].ask(candidate, sample)
    return [replace(finding, check=check.name) for check in checks for finding in check.compare(answers, expected)]


def ask_about_decoding(candidate: Any, dtype: torch.dtype) -> list[Finding]:
    """Every element through the products, and through the candidate's own decoder if it has one."""
    findings = [finding for case in element_cases(dtype) for finding in ask("decode", candidate, draw(case))]
    return findings + ask("decoder", candidate, draw(every_element(dtype)))


def failed(findings: Iterable[Finding]) -> set[tuple[str, str]]:
    """(check, tensor) of each failure."""
    return {(finding.check, finding.tensor) for finding in findings if not finding.ok}


def quick(device_type: str) -> list[Case]:
    """The cases of ordinary numbers in the quick suite."""
    return suites.drawn_cases("quick", device_type)


def integers(device_type: str) -> list[Case]:
    """The integer fixtures of the quick suite."""
    return suites.integer_cases("quick", device_type)
