"""Bytes of tensors of any strides: which, whether two share some or hold the same values."""

from __future__ import annotations

import torch
from torch import Tensor


def bytes_of(x: Tensor) -> Tensor:
    """The bytes of each element in C order: uint8 [*x.shape, bytes an element], of `x` itself where it is contiguous.

    Dimensions of size one are contiguous with any stride, but torch views bytes only behind a stride of 1.
    """
    ordered = x.detach().contiguous()
    if not x.numel():
        return ordered.new_empty(*x.shape, x.element_size(), dtype=torch.uint8)
    return ordered.as_strided((x.numel(),), (1,)).view(torch.uint8).view(*x.shape, x.element_size())


def hold_the_same(x: Tensor, other: Tensor) -> bool:
    """Whether values are equal, NaN to NaN."""
    return torch.equal(x, other) or bool(((x == other) | (x.isnan() & other.isnan())).all())


def share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether some elements of both, if they have memory, overlap."""
    if a.is_meta or b.is_meta:
        return False
    (first, last), (start, stop) = _extent(a), _extent(b)
    if first >= stop or start >= last:
        return False
    places, others = (x.data_ptr() - min(first, start) + _offsets(x) for x in (a, b))
    return bool(torch.isin(places, others).any())


def _extent(x: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last."""
    size = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + size * x.element_size()


def _offsets(x: Tensor) -> Tensor:
    """The offset of every byte of a tensor."""
    places = torch.arange(x.element_size())
    for n, stride in zip(x.shape, x.stride(), strict=True):
        places = places[..., None] + torch.arange(n) * stride * x.element_size()
    return places.flatten()
