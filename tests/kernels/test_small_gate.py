"""The kernels by every check of the gate, on the small cases that planted bugs are judged by."""

from __future__ import annotations

import pytest
import torch

from mxref.verification.arithmetic.accumulation import default_accumulation
from mxref.verification.candidates.shipped import shipped
from mxref.verification.cases.scope import Scope
from mxref.verification.checks.finding import Status
from mxref.verification.gate.plan import Item, plan
from mxref.verification.gate.run import judge

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ITEMS = [item for item in plan(Scope("small", DEVICE.type), own=True) if item.checks[0].name != "guard pages"]


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: f"{item.checks[0].name}, {item.name}")
def test_the_kernels_pass(item: Item) -> None:
    findings = judge(item, shipped(DEVICE), default_accumulation(DEVICE))
    assert {finding.check for finding in findings} == {check.name for check in item.checks}
    assert [str(finding) for finding in findings if finding.status is not Status.PASS] == []
