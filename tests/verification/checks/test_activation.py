"""The check of the activation: one rounding passes in every dtype, the steps of eager modules do not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mxref import activation as golden
from mxref.swiglu import SwiGLU
from mxref.verification.candidates.answer import Answer
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.own.asking_activation import with_its_gradient
from mxref.verification.cases.own.activation import ActivationCase, activation_cases
from mxref.verification.cases.scope import Scope
from mxref.verification.checks.finding import Finding
from mxref.verification.checks.own.activation import right_activation

CPU = torch.device("cpu")
CASES = activation_cases(Scope("quick", "cuda"))
"""In bf16, fp16 and fp32."""


def found(case: ActivationCase, gated: Callable[[Tensor, SwiGLU], Tensor]) -> list[Finding]:
    operators = SimpleNamespace(layer=SimpleNamespace(activation=SimpleNamespace(gated=gated)))
    candidate = Candidate("plain", gated, operators=operators)  # type: ignore[arg-type]
    sample = case.sample(CPU, seed=0)
    return right_activation(with_its_gradient(candidate, sample), sample)


def eager(gate_up: Tensor, form: SwiGLU) -> Tensor:
    """Every step rounded to the activation dtype, as in transformers' modules."""
    gate, up = golden.halves(gate_up, form)
    if form.limit is not None:
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    return (up + form.offset) * (gate * torch.sigmoid(gate * form.alpha))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_golden_model_passes(case: ActivationCase) -> None:
    findings = found(case, golden.gated)
    assert {"H", "dgate_up"} <= {finding.tensor for finding in findings}
    assert [str(finding) for finding in findings if not finding.ok] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_more_roundings_do_not(dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.dtype == dtype and case.data == "drawn")
    wrong = {finding.tensor for finding in found(case, eager) if not finding.ok}
    assert wrong == {"H", "dgate_up"}


def test_one_element_outside_is_named() -> None:
    case = next(case for case in CASES if case.name == "gpt-oss, float32")
    sample = case.sample(CPU, seed=0)
    h = golden.gated(sample.gate_up, case.form)
    h[2, 5] += 2**-16 * h[2, 5].abs()
    (finding, *_) = right_activation([Answer({"H": h, "dgate_up": None})], sample)
    assert finding.violations == 1
    assert finding.counterexample is not None
    assert finding.counterexample.coordinate == (2, 5)
