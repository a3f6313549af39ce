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


@pytest.mark.parametrize("make", [ExpertsInParallel, FullySharded, OnTwoDimensions])
def test_they_pass(world: World, make: type[FullySharded]) -> None:
    declared = describe(world, make)
    findings = [f for case in CASES if case.name in FEW for f in judge(world, make, declared, case, 0)]
    assert not [str(finding) for finding in findings if not finding.ok]
    assert len({finding.case for finding in findings}) > len(FEW)
