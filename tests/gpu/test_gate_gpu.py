"""Integer fixtures in fp32 on the GPU, by bits: its suites judge fp32 by intervals. The rest is `mxref gate --full`.

A failure names case, tensor, coordinate, got and expected.
"""

from __future__ import annotations

import pytest
import torch
from judging import ask, integers

from mxref.verification.candidates.shipped import shipped
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw
from mxref.verification.checks.finding import Status

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", integers("cpu"), ids=lambda case: case.name)
def test_integers_in_fp32(device: torch.device, case: Case) -> None:
    findings = ask("integer", shipped(device), draw(case, device))
    assert findings
    assert [str(finding) for finding in findings if finding.status is not Status.PASS] == []
