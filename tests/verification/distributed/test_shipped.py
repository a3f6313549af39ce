"""This project's own steps, experts in parallel and fully sharded, by a few cases; the command asks them all."""

from __future__ import annotations

import pytest

from mxref.verification.distributed.cases import CASES
from mxref.verification.distributed.judging import describe, judge
from mxref.verification.distributed.shipped import ExpertsInParallel, FullySharded
from mxref.verification.distributed.world import World

FEW = ("two steps", "sentinels", "experts that ranks do not divide", "softmax router")


@pytest.mark.parametrize("make", [ExpertsInParallel, FullySharded])
def test_they_pass(make: type[FullySharded]) -> None:
    with World(2) as world:
        declared = describe(world, make)
        findings = [f for case in CASES if case.name in FEW for f in judge(world, make, declared, case, 0)]
    assert not [str(finding) for finding in findings if not finding.ok]
    assert len({finding.case for finding in findings}) > len(FEW)
