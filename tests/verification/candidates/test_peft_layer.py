"""PEFT's own layer by the gate's checks: right in fp32, one rounding more than the contract's in 16 bits."""

from __future__ import annotations

import pytest
import torch
from judging import ask

from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.known import implementation
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw

WHOLE = Case("everything", 4, 96, 160, 37, 2, 20, data="balanced", dense=True, bias=True, gate_slots=2, scaling=-2.0)


@pytest.fixture(scope="module")
def peft() -> Candidate:
    pytest.importorskip("peft")
    return implementation("peft").make(torch.device("cpu"))


@pytest.mark.parametrize(
    "case",
    [
        Case("sentinels, gates", 3, 64, 96, 20, 2, 3, data="integer", dense=True, routing="sentinels", gate_slots=2),
        Case("in order", 4, 96, 64, 20, 1, 4, data="integer", dense=True, grouped_in=True, grouped_out=True),
        Case("fp32 adapters", 3, 64, 96, 20, 2, 4, torch.bfloat16, torch.float32, data="integer", dense=True),
    ],
    ids=lambda case: case.name,
)
def test_exact_fixtures(peft: Candidate, case: Case) -> None:
    assert peft.covers.holds(case)
    findings = ask("integer", peft, draw(case))
    assert {finding.tensor for finding in findings} >= {"Y", "dX", "dA", "dB"}
    assert not [str(finding) for finding in findings if not finding.ok]


def test_fp32_lies_within_the_order_free_intervals(peft: Candidate) -> None:
    findings = ask("interval", peft, draw(WHOLE), how=ACCUMULATIONS["undeclared"])
    assert not [str(finding) for finding in findings if not finding.ok]


def test_a_sum_of_weights_and_adapters_in_bf16_shows(peft: Candidate) -> None:
    case = Case("everything", 4, 96, 160, 37, 2, 20, torch.bfloat16, data="balanced", dense=True)
    findings = ask("interval", peft, draw(case), how=ACCUMULATIONS["undeclared"])
    assert {"Y", "dX"} <= {finding.tensor for finding in findings if not finding.ok}


def test_only_dense_weights_with_adapters_are_asked(peft: Candidate) -> None:
    assert not peft.covers.holds(Case("packed"))
    assert not peft.covers.holds(Case("no adapters", dense=True, rank=0))
