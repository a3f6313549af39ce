"""The golden layer takes every legal call."""

from __future__ import annotations

import pytest
import torch
from legal_calls import LegalCalls

import mxref
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw


class TestGolden(LegalCalls):
    layer = staticmethod(mxref.parallel_linear_lora)


def test_subnormal_numbers_that_are_flushed_are_told() -> None:
    codes, scales = torch.full((1, 1, 16), 0x22, dtype=torch.uint8), torch.zeros(1, 1, 1, dtype=torch.uint8)
    routing = mxref.flatten_sort_count(torch.tensor([[0]]), 1)
    torch.set_flush_denormal(True)
    try:
        with pytest.warns(RuntimeWarning, match="set_flush_denormal"):
            mxref.parallel_linear_lora(torch.ones(1, 32), mxref.MXWeights(codes, scales, 32, 1), 1, *routing)
    finally:
        torch.set_flush_denormal(False)


def test_s_may_be_a_large_int() -> None:
    sample = draw(Case("large s", data="integer", scaling=0.5))
    operands = sample.problem.arguments()
    large, rounded = (mxref.parallel_linear_lora(**operands | {"scaling": s}) for s in (2**70, 2.0**70))
    assert torch.equal(large, rounded)
