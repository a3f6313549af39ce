"""Thresholds: derived, not tuned."""

from __future__ import annotations

import pytest
import torch

from mxref.rounding import round_to
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.arithmetic.thresholds import ON_A_GRID, copies, critical_z, directed_loss, residual_variance

BF16, FP32 = torch.bfloat16, torch.float32


def test_the_critical_z_grows_with_what_is_judged() -> None:
    assert critical_z(1, 0.05) == pytest.approx(1.959964, abs=1e-6)
    assert critical_z(10_000) > critical_z(10)


def test_directed_loss_is_that_of_accumulators_that_truncate() -> None:
    hopper = ACCUMULATIONS["tensor-core-sm90"]
    for how in ("fp32-blocks-64", "undeclared"):
        assert directed_loss(ACCUMULATIONS[how], FP32, 512) == 0
    assert directed_loss(hopper, BF16, 512) == 33 * 2.0**-25
    assert directed_loss(hopper, BF16, 512, resident=True) == 32 * 2.0**-24


def test_sums_of_rounded_terms_have_the_variance_that_is_claimed() -> None:
    """Grids of spacing h/m: ties are part of them, and m = 2 is the worst."""
    generator = torch.Generator().manual_seed(0)
    for m in (2, 4, 8):
        x = torch.randint(2**7 * m, 2**8 * m, (40_000,), generator=generator).double() / m
        error = round_to(x, BF16) - x
        claimed = residual_variance(torch.ones(1).double(), torch.zeros(1).double(), ON_A_GRID)
        assert float(error.square().mean()) == pytest.approx((1 + 2 / m**2) / 12, rel=0.03)
        assert float(error.square().mean()) < 1.03 * float(claimed)


def test_copies_are_counted_whatever_their_sign_and_power_of_two() -> None:
    x = torch.tensor([[3.0, -1.5, 5.0], [0.75 * (1 + 2.0**-50), 7.0, -10.0]], dtype=torch.float64)
    assert copies(x).tolist() == [[3, 3, 2], [3, 1, 2]]
    assert set(copies(torch.randn(1000, dtype=torch.float64)).tolist()) == {1}
