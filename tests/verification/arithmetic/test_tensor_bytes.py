"""Bytes of tensors whose strides mean nothing where there is one row, column or element."""

from __future__ import annotations

import pytest
import torch

from mxref.verification.arithmetic.tensor_bytes import bytes_of


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((5, 1), (1, 161)), ((1, 1), (161, 161)), ((1,), (161,)), ((0, 3), (5, 7)), ((4, 3), (1, 4)), ((2, 3), (3, 1))],
)
def test_bytes_are_those_of_the_values_in_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    values = torch.arange(1.0, 13.0, dtype=torch.bfloat16)
    x = torch.empty_strided(shape, strides, dtype=torch.bfloat16)
    x.copy_(values[: x.numel()].view(shape))
    found = bytes_of(x)
    assert found.shape == (*shape, 2)
    assert found.numpy().tobytes() == values.view(torch.uint8).numpy().tobytes()[: 2 * x.numel()]
