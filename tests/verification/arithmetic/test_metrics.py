"""Metrics against brute force: numpy.spacing, ml_dtypes' own grids, and plain arithmetic."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxref.rounding import round_to
from mxref.verification.arithmetic.metrics import pow2_floor, ratio_statistics, rms, ulp, ulp_error

NUMPY = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}


@pytest.mark.parametrize("dtype", NUMPY, ids=str)
def test_ulp_is_the_distance_to_the_next_number_over_a_whole_16_bit_format(dtype: torch.dtype) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):  # the NaN codes
        values = bits.view(NUMPY[dtype]).astype(np.float64)
    finite = np.isfinite(values) & (np.abs(values) < float(torch.finfo(dtype).max))
    away = np.abs((bits[finite] + 1).astype(np.uint16).view(NUMPY[dtype]).astype(np.float64))
    ours = ulp(torch.from_numpy(values[finite]), dtype).numpy()
    np.testing.assert_array_equal(ours, away - np.abs(values[finite]))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_ulp_is_numpy_spacing_in_fp32(x: float) -> None:
    if abs(x) < float(np.finfo(np.float32).max):
        assert float(ulp(torch.tensor([x], dtype=torch.float64), torch.float32)) == abs(np.spacing(np.float32(x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ulp_between_and_beyond_representable_numbers(dtype: torch.dtype) -> None:
    eps, top = torch.finfo(dtype).eps, torch.finfo(dtype).max
    x = torch.tensor([1 + eps / 3, 2 - 1e-12, 0.0, 2 * top, -torch.inf, torch.nan], dtype=torch.float64)
    got = ulp(x, dtype)
    assert got[:2].tolist() == [eps, eps]
    assert float(got[2]) == torch.finfo(dtype).smallest_normal * eps
    assert got[3] == got[4] == float(ulp(torch.tensor(top, dtype=torch.float64), dtype))
    assert torch.isnan(got[5])


@settings(max_examples=200)
@given(st.floats(-1e30, 1e30, allow_nan=False), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_a_correctly_rounded_value_is_within_half_an_ulp(x: float, dtype: torch.dtype) -> None:
    exact = torch.tensor([x], dtype=torch.float64)
    rounded = round_to(exact, dtype)
    if bool(torch.isfinite(rounded)):
        assert abs(float(ulp_error(rounded, exact, dtype))) <= 0.5


def test_ulp_error_is_signed_and_counts_neighbours() -> None:
    exact = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    got = torch.tensor([1 + 2**-7, -1 + 2**-8, 1 - 2**-8], dtype=torch.bfloat16)
    assert ulp_error(got, exact, torch.bfloat16).tolist() == [1.0, 0.5, -0.5]


def test_ulp_error_of_what_is_not_finite() -> None:
    nan, inf = torch.nan, torch.inf
    exact = torch.tensor([nan, inf, -inf, inf, nan, 1.0, 1.0, inf], dtype=torch.float64)
    got = torch.tensor([nan, inf, -inf, -inf, 1.0, nan, inf, 1.0])
    assert ulp_error(got, exact, torch.float32).tolist() == [0, 0, 0, inf, inf, inf, inf, inf]


def test_pow2_floor_is_exact_next_to_powers_of_two() -> None:
    powers = 2.0 ** torch.arange(-1000, 1000, dtype=torch.float64)
    assert torch.equal(pow2_floor(-powers), powers)
    below = torch.nextafter(powers, torch.zeros_like(powers))
    assert torch.equal(pow2_floor(below), powers / 2)
    assert pow2_floor(torch.tensor([0.0, torch.inf], dtype=torch.float64)).tolist() == [0.0, torch.inf]


def test_rms_and_ratio_statistics() -> None:
    assert rms(torch.tensor([3.0, -4.0])) == pytest.approx(12.5**0.5)
    assert rms(torch.empty(0)) == 0.0
    exact = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    assert ratio_statistics(2 * exact, exact) == (2.0, 0.0)  # a spread alone does not see a factor of two
    assert ratio_statistics(torch.tensor([1.0, 6.0, 0.0]), exact) == (2.0, 1.0)
    assert ratio_statistics(torch.empty(0), torch.empty(0, dtype=torch.float64)) == (1.0, 0.0)
