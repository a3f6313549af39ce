"""Powers of two that spread the scale bytes and leave every product's magnitude alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mxref.formats import E8M0_BIAS, MX_BLOCK_SIZE
from mxref.verification.cases.call import REPEATED
from mxref.verification.cases.case import Case, Sample
from mxref.weights import MXWeights


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


def spread_out(sample: Sample, draw: torch.Generator, columns: int, experts: int) -> Sample:
    """The sample under a drawn gauge, exponents in ±columns, and in ±experts for each expert's weights.

    An expert's own power is taken back by its rows, and so where each row of the output, or of x, is one expert's.
    """
    case, problem = sample.case, sample.problem
    gauge = draw_gauge(case, draw, columns)
    own = torch.randint(-experts, experts + 1, (case.experts,), generator=draw)
    by_output, by_input = case.gate_slots <= 1, case.k == 1
    if not (by_output or by_input) or {case.call.biases, case.call.weights} & {*REPEATED}:
        own.zero_()
    power = torch.exp2(own.double())
    of_row = torch.cat((power, power.new_ones(1)))[problem.sorted_expert_idxs.clamp(max=case.experts)]
    in_place = torch.empty_like(of_row).index_copy_(0, problem.row_positions(), of_row)
    of_output = (of_row if case.grouped_out else in_place) if by_output else of_row.new_ones(1)
    of_input = (of_row if case.grouped_in else in_place) if not by_output and by_input else of_row.new_ones(1)
    along_N, along_K = (power, torch.ones_like(power)) if by_output else (torch.ones_like(power), power)
    factors: dict[str, Tensor] = {
        "inputs": 1 / (of_input[:, None] * gauge.u),
        "lora_A": along_K.repeat_interleave(case.rank)[:, None] * gauge.u,
        "lora_B": gauge.t[:, None] * along_N.repeat_interleave(case.rank),
        "expert_biases": along_N[:, None] * gauge.t,
    }
    operands: dict[str, Any] = {
        name: (x * factor).to(x.dtype) for name, factor in factors.items() if (x := getattr(problem, name)) is not None
    }
    weights = problem.expert_weights
    assert isinstance(weights, MXWeights)
    scales = weights.scales + (scale_bytes(gauge) - E8M0_BIAS) + own[:, None, None]
    dOut = (sample.grad_out / (of_output[:, None] * gauge.t)).to(sample.grad_out.dtype)
    return sample.changed(dOut, expert_weights=replace(weights, scales=scales.to(torch.uint8)), **operands)
