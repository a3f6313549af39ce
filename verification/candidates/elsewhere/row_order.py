"""Rows of a layer brought into expert order and back, differentiably, around a product that wants them so.

Copies alone, and one sum: dX adds the slots of a token in fp32 and rounds once, where autograd's own gradient of
indexing sorts, and rounds after every addition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowOrder:
    """The order of P routed rows.

    Attributes:
        order: int64 [P], the position of each row that is in expert order.
        inverse: int64 [P], the row in expert order of each position.
        k: rows that each input row feeds.
        owned: bool [P], in expert order: an expert here owns the row; None where all are owned.
    """

    order: Tensor
    inverse: Tensor
    k: int
    owned: Tensor | None = None

    @classmethod
    def of(cls, sorted_scattered_idxs: Tensor, k: int, owned: Tensor | None = None) -> RowOrder:
        """From the positions, [P], of the rows in expert order; operands as in `Problem`."""
        order = sorted_scattered_idxs.long()
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        return cls(order, inverse, k, owned)

    def by_expert(self, inputs: Tensor, grouped_in: bool) -> Tensor:
        """The routed rows [P, K] of x, [M, K] or in this order already; rows that nobody owns have no gradient."""
        if grouped_in:
            return _same(inputs, self.owned)
        return _gather(inputs, self.order, self.inverse, self.k, self.owned)

    def by_position(self, y: Tensor) -> Tensor:
        """Rows [P, N] in expert order, by their positions."""
        return _gather(y, self.inverse, self.order, 1, None)


class _Gathered(torch.autograd.Function):
    """x[index // fan], whose gradient is a gather too: g[inverse], summed over each row's `fan` uses in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, fan: int, owned: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, owned)
        ctx.fan = fan
        return x[index // fan if fan > 1 else index]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inverse, owned = ctx.saved_tensors
        rows = gradient[inverse]
        if owned is not None:
            rows.masked_fill_(~owned[inverse][:, None], 0.0)
        if ctx.fan > 1:
            rows = rows.view(-1, ctx.fan, rows.shape[1]).sum(1)
        return rows, None, None, None, None


class _Same(torch.autograd.Function):
    """x itself; its gradient is zero where no expert owns the row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owned: Tensor | None) -> Tensor:
        ctx.save_for_backward(owned)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (owned,) = ctx.saved_tensors
        return (gradient if owned is None else gradient.masked_fill(~owned[:, None], 0.0)), None


_gather: Callable[..., Tensor] = _Gathered.apply
_same: Callable[..., Tensor] = _Same.apply
