"""round_to against every bf16 and fp16 value, numpy's fp32 and fp16 casts, and the double-rounding trap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mxref.rounding import round_to

NARROW = [torch.bfloat16, torch.float16]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits up to the payload of NaNs."""
    return torch.equal(a.nan_to_num(nan=1e300), b.nan_to_num(nan=1e300)) and torch.equal(a.signbit(), b.signbit())


@pytest.mark.parametrize("dtype", NARROW)
def test_every_representable_value_is_a_fixed_point(dtype: torch.dtype) -> None:
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).double()
    assert same(round_to(values, dtype), values)


@pytest.mark.parametrize("dtype", NARROW)
def test_midpoints_go_to_even_and_their_neighbours_to_the_nearer_value(dtype: torch.dtype) -> None:
    bits = torch.arange(32767, dtype=torch.int32)
    lower = bits.to(torch.int16).view(dtype).double()
    upper = (bits + 1).to(torch.int16).view(dtype).double()
    finite = torch.isfinite(upper)
    lower, upper, bits = lower[finite], upper[finite], bits[finite]
    middle = (lower + upper) / 2
    even = torch.where(bits % 2 == 0, lower, upper)
    assert torch.equal(round_to(middle, dtype), even)
    assert torch.equal(round_to(middle.nextafter(upper), dtype), upper)
    assert torch.equal(round_to(middle.nextafter(lower), dtype), lower)


def test_rounds_once_where_torch_rounds_twice() -> None:
    x = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    assert round_to(x, torch.bfloat16).item() == 1 + 2**-7
    assert x.to(torch.bfloat16).item() == 1.0


@pytest.mark.parametrize(
    ("dtype", "largest", "midpoint"),
    [(torch.bfloat16, 2.0**127 * (2 - 2**-7), 2.0**127 * (2 - 2**-8)), (torch.float16, 65504.0, 65520.0)],
)
def test_overflow_begins_at_the_midpoint_past_the_largest_number(
    dtype: torch.dtype, largest: float, midpoint: float
) -> None:
    x = torch.tensor([midpoint, np.nextafter(midpoint, 0), -midpoint], dtype=torch.float64)
    assert round_to(x, dtype).tolist() == [torch.inf, largest, -torch.inf]


@given(st.lists(st.floats(width=64), min_size=1, max_size=50))
def test_agrees_with_numpy_casts(values: list[float]) -> None:
    x = np.array(values)
    with np.errstate(over="ignore", invalid="ignore"):
        for dtype, numpy_dtype in ((torch.float32, np.float32), (torch.float16, np.float16)):
            expected = torch.from_numpy(x.astype(numpy_dtype).astype(np.float64))
            got = round_to(torch.from_numpy(x), dtype)
            assert same(got[~got.isnan()], expected[~expected.isnan()])
            assert torch.equal(got.isnan(), expected.isnan())


def test_refuses_a_tensor_that_was_already_rounded() -> None:
    with pytest.raises(TypeError, match="fp64"):
        round_to(torch.ones(1), torch.bfloat16)
