"""Bytes of tensors whose strides mean nothing where there is one row, column or element; parts of one buffer."""

from __future__ import annotations

import pytest
import torch

from mxref.verification.arithmetic.tensor_bytes import bytes_of, share_elements


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


def test_parts_of_one_buffer_share_no_elements() -> None:
    buffer = torch.zeros(6, 8)
    assert share_elements(buffer, buffer[2:3, 3:4])
    assert share_elements(buffer[:, 0], buffer[5])
    assert not share_elements(buffer[:, ::2], buffer[:, 1::2])
    assert not share_elements(buffer[:3], buffer[3:])
    assert not share_elements(buffer[:0], buffer)
    assert not share_elements(buffer, buffer.clone())
