"""The bytes of a tensor, whatever its strides."""

from __future__ import annotations

import torch
from torch import Tensor


def bytes_of(x: Tensor) -> Tensor:
    """The bytes of each element in C order: uint8 [*x.shape, bytes an element], of `x` itself where it is contiguous.

    A tensor of one row, column or element counts as contiguous whatever its strides there, and torch sees bytes only
    behind a stride of 1.
    """
    ordered = x.detach().contiguous()
    if not x.numel():
        return ordered.new_empty(*x.shape, x.element_size(), dtype=torch.uint8)
    return ordered.as_strided((x.numel(),), (1,)).view(torch.uint8).view(*x.shape, x.element_size())
