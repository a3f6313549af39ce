"""The gate on the GPU, step by step: a failure names case, tensor, coordinate, got, expected and bound.

The full suite: every code with every scale byte, integer fixtures, intervals and drift on small cases and on the shapes
of real models (the golden model runs on the GPU too, in fp64), behaviour, and every reachable configuration.
"""

from __future__ import annotations

import pytest
import torch
from judging import integers

from mxref.verification.candidates.candidate import Candidate, shipped
from mxref.verification.candidates.shipped import shipped
from mxref.verification.checks.finding import Status
from mxref.verification.gate.plan import Step, case_steps, suite_steps

pytestmark = pytest.mark.gpu

CUDA, SEED = torch.device("cuda"), 0
STEPS = [
    *suite_steps(CUDA, full=True, seed=SEED, every_guard=True),
    *case_steps(integers("cpu"), CUDA, SEED),  # in fp32, which a GPU's own suite leaves to the intervals
]


@pytest.fixture(scope="module")
def candidate(device: torch.device) -> Candidate:
    return shipped(device)


@pytest.mark.parametrize("step", [pytest.param(step, id=f"{step.guard}: {step.case}") for step in STEPS])
def test_shipped_kernels(candidate: Candidate, step: Step) -> None:
    assert candidate.accumulation is not None
    findings, _ = step.judge(candidate, candidate.accumulation)
    wrong = [str(finding) for finding in findings if finding.status is not Status.PASS]
    assert findings
    assert not wrong, "\n".join(wrong)
