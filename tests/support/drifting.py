"""What the checks of drift, sign and exponent say about outputs that a test made."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from judging import BY_NAME
from torch import Tensor

from mxref.rounding import round_to
from mxref.scattermoe import RoundingPoints
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, Accumulation
from mxref.verification.candidates.answer import Answer
from mxref.verification.cases.case import Case, Sample
from mxref.verification.checks.expectation import Expectation
from mxref.verification.checks.finding import DriftMap, Finding

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HOPPER = ACCUMULATIONS["tensor-core-sm90"]
BALANCED = Case("balanced", 2, 256, 128, 32, 2, 16, BF16, data="balanced", bias=True)
RUN = 5000
"""Slopes of a whole run, about the quick suite's."""


def stored(sample: Sample, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp64 values on the right grid as tensors of the right dtype."""
    p = sample.problem
    like = {"Y": p.inputs, "dX": p.inputs, "dA": p.lora_A, "dB": p.lora_B, "dbias": p.expert_biases, "dgates": p.gates}
    return {name: x.to(like[name].dtype) for name, x in outputs.items()}


def honest_values(expected: Expectation, dtype: torch.dtype) -> dict[str, Tensor]:
    """Each exact value, rounded once."""
    return {name: round_to(interval.exact, dtype).to(dtype) for name, interval in expected.accepted.items()}


def expect(sample: Sample, how: Accumulation = HOPPER) -> Expectation:
    """What the contract's rounding points make of a sample, judged at the critical z of a whole run."""
    return Expectation(sample, RoundingPoints.contract(sample.case.dtype), how, RUN)


def judge(expected: Expectation, outputs: Mapping[str, Tensor | None]) -> dict[tuple[str, str], Finding]:
    """What the three checks find, by check and tensor."""
    checks = [BY_NAME[name] for name in ("drift", "sign", "exponent")]
    findings = [(check.name, f) for check in checks for f in check.compare([Answer(outputs)], expected)]
    return {(name, finding.tensor): finding for name, finding in findings}


def drift_map(findings: dict[tuple[str, str], Finding], tensor: str) -> DriftMap:
    """The picture of one tensor's strata."""
    picture = findings["drift", tensor].picture
    assert isinstance(picture, DriftMap)
    return picture


def broken(findings: dict[tuple[str, str], Finding]) -> set[tuple[str, str]]:
    """(check, tensor) of each failure."""
    return {key for key, finding in findings.items() if not finding.ok}
