"""This project's own steps by a few cases; `mxref gate --distributed` asks them all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mxref.verification.distributed.cases import CASES
from mxref.verification.distributed.judging import describe, judge
from mxref.verification.distributed.shipped import ExpertsInParallel, FullySharded, OnTwoDimensions
from mxref.verification.distributed.world import World

FEW = ("two steps", "experts that ranks do not divide", "softmax router")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(2) as world:
        yield world


@pytest.mark.parametrize("make", [ExpertsInParallel, FullySharded])
def test_two_groups_side_by_side_pass(make: type[FullySharded]) -> None:
    [case] = [case for case in CASES if case.groups > 1]
    with World(4) as world:
        findings = judge(world, make, describe(world, make), case, 0)
    assert not [str(finding) for finding in findings if not finding.ok]
    assert "saved" in {finding.check for finding in findings}


@pytest.mark.parametrize("make", [ExpertsInParallel, FullySharded, OnTwoDimensions])
def test_they_pass(world: World, make: type[FullySharded]) -> None:
    declared = describe(world, make)
    findings = [f for case in CASES if case.name in FEW for f in judge(world, make, declared, case, 0)]
    assert not [str(finding) for finding in findings if not finding.ok]
    assert len({finding.case for finding in findings}) > len(FEW)
