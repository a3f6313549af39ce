"""Powers of two that spread the scale bytes and leave every product's magnitude alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxref.formats import E8M0_BIAS, MX_BLOCK_SIZE
from mxref.verification.cases.case import Case


@dataclass(frozen=True)
class Gauge:
    """Powers of two that spread the scale bytes and leave every product's magnitude alone.

    With W[k, n]·2^(t[n] + u[k]), x·2^-u, A·2^u, B and bias·2^t and dOut·2^-t, every product in x·W, x·Aᵀ, Z·Bᵀ,
    dY·B, dY·Wᵀ and V·A keeps the ratio to its sum that it had without a gauge.

    Attributes:
        t: the powers 2^t, fp64 [N].
        u: the powers 2^u, fp64 [K].
    """

    t: Tensor
    u: Tensor

    @classmethod
    def none(cls, K: int, N: int) -> Gauge:
        """The gauge that changes nothing."""
        return cls(torch.ones(N, dtype=torch.float64), torch.ones(K, dtype=torch.float64))

    @classmethod
    def from_exponents(cls, t: Tensor, u: Tensor) -> Gauge:
        """From integer exponents a column [N] and a K-block [K/32]."""
        return cls(torch.exp2(t.double()), torch.exp2(u.double()).repeat_interleave(MX_BLOCK_SIZE))


def draw_gauge(case: Case, draw: torch.Generator, spread: int) -> Gauge:
    """Exponents uniform in ±spread, one a column and one a K-block, shared by all experts."""
    t = torch.randint(-spread, spread + 1, (case.N,), generator=draw)
    u = torch.randint(-spread, spread + 1, (case.K // MX_BLOCK_SIZE,), generator=draw)
    return Gauge.from_exponents(t, u)


def scale_bytes(gauge: Gauge) -> Tensor:
    """The gauge's E8M0 bytes: int64 [N, K/32], 127 + t + u."""
    t, u = torch.log2(gauge.t).long(), torch.log2(gauge.u[::MX_BLOCK_SIZE]).long()
    return E8M0_BIAS + t[:, None] + u[None, :]
