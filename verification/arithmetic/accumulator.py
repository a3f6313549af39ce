"""E_n: how far an fp32 accumulator of a declared accumulation can be from the exact sum.

Sources: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., chapters 3 and 4 (γ_n, running error
analysis); P. Xie et al., MMA-Sim, arXiv 2511.10909 (what a tensor core does with one step of products).

An `Accumulator` performs the implementation's operations (dot, scale, add) on centres in fp64, and carries a radius
that no honest implementation of them leaves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mxref.rounding import min_exponent
from mxref.verification.arithmetic.accumulation import Accumulation, Order, Product
from mxref.verification.arithmetic.metrics import pow2_floor

U = 2.0**-24
"""Unit roundoff of fp32: one addition or product, rounded to nearest, errs by at most U relative to its result."""

_TRUNCATED = 2.0**-23  # one ulp of fp32: truncation's largest relative loss
UNDERFLOW = 2.0**-149  # smallest fp32 subnormal: an operation's largest loss below the normal range
_GOLDEN = 2.0**-53  # unit roundoff of the reference's own fp64 sums
_SLACK = 1 + 2.0**-40  # covers the fp64 arithmetic of the radii themselves

# Elements of the largest temporary in a running sum: 32 MiB on a CPU, 1 GiB on a GPU.
_BUDGET = {"cpu": 2**22, "cuda": 2**27}
_TOGETHER = 2**19
"""Products whose largest is taken at once; more take less time a step at a time."""


def gamma(n: float, unit: float = U) -> float:
    """Higham's γ_n = n·u / (1 − n·u): bounds the relative error of n successive roundings, whatever their order."""
    if n * unit >= 1:
        raise ValueError(f"n is {n}; γ_n needs n·u < 1")
    return n * unit / (1 - n * unit)


class Accumulator:
    """Centre and radius of an fp32 accumulator [R, C], operation by operation.

    An honest implementation's accumulator always differs from `value`, the exact result for operands at their centres
    in fp64, by at most `radius()`.

    Args:
        how: the declared accumulation.
        dtype: of the operands; hardware may truncate 16-bit ones.
        rows, columns, device: of the accumulator, which starts at exact zero.
    """

    def __init__(self, how: Accumulation, dtype: torch.dtype, rows: int, columns: int, device: torch.device) -> None:
        self._how, self._dtype = how, dtype
        self._smallest = 2.0 ** min_exponent(dtype)
        # In an undeclared sum of 16-bit operands every rounding may truncate. A tensor core's step of L products then
        # costs (L+1)·2^-24·2^e + 2^-23·|S|; its largest term is not cut, so γ_n with 2^-23 for u covers it.
        wide = dtype in (torch.float32, torch.float64)
        self._unit = U if wide else _TRUNCATED
        self._running = how.declared and not (how.kind == "tensor_core" and wide)
        self.value = torch.zeros(rows, columns, dtype=torch.float64, device=device)
        self._radius = torch.zeros_like(self.value)
        self._magnitude = torch.zeros_like(self.value)  # Σ|terms|
        self._factors = torch.zeros_like(self.value)  # Σ(1 + |P| + |Q|) over terms
        self._roundings = 0

    def radius(self) -> Tensor:
        """The largest honest distance from `value`: fp64 [R, C], with the reference's own error."""
        radius = self._radius + self._roundings * _GOLDEN * self._magnitude
        if not self._running:
            radius = radius + gamma(self._roundings, self._unit) * self._magnitude
        return radius * _SLACK

    def dot(
        self,
        P: Tensor,
        Q: Tensor,
        name: Product | None = None,
        P_radius: Tensor | None = None,
        Q_radius: Tensor | None = None,
    ) -> None:
        """Add P·Q, P [R, n] and Q [n, C] fp64, known up to their radii (None: exactly).

        LoRA's sums over the rank have no name.
        """
        how, n = self._how, P.shape[1]
        order = how.orders.get(name, Order()) if name is not None else Order()
        step = max(how.step, n) if how.kind == "fp32_blocks" and name is None else how.step
        if order.permutation is not None:
            index = order.permutation(n).to(P.device)
            P, Q, P_radius, Q_radius = P[:, index], Q[index], _columns(P_radius, index), _rows(Q_radius, index)
        if order.parts == 1:
            self._dot(P, Q, P_radius, Q_radius, step)
            return
        length = -(-n // (step * order.parts)) * step
        for start in range(0, n, length):
            own = slice(start, start + length)
            part = Accumulator(how, self._dtype, self.value.shape[0], self.value.shape[1], P.device)
            part._dot(P[:, own], Q[own], _columns(P_radius, own), _rows(Q_radius, own), step)
            self.add(part)

    def _dot(self, P: Tensor, Q: Tensor, P_radius: Tensor | None, Q_radius: Tensor | None, step: int) -> None:
        """`dot` in order, into this accumulator."""
        P_reach, Q_reach = _reach(P, P_radius), _reach(Q, Q_radius)
        product = P_reach @ Q_reach
        if P_radius is not None:
            self._radius += P_radius @ Q_reach
        if Q_radius is not None:
            self._radius += P.abs() @ Q_radius
        self._roundings += P.shape[1]
        self._radius += P.shape[1] * UNDERFLOW
        self._factors += P.shape[1] + P_reach.sum(1, keepdim=True) + Q_reach.sum(0, keepdim=True)
        if self._running:
            self._run(P, Q, P_reach, Q_reach, product, step)
        else:
            self.value += P @ Q
        self._magnitude += product

    def scale(self, s: float) -> None:
        """Multiply by s, fp32 in the implementation: one rounding of s and one of the product.

        s may meet a factor of a term before the sum: what is lost there below the normal range is multiplied by the
        other factor, not by s.
        """
        exact = math.frexp(s)[0] in (0.0, 0.5, -0.5)
        loss = 0.0 if exact else 2 * U * (1 + U)
        self._roundings += 0 if exact else 2
        self._radius = abs(s) * (self._radius * (1 + loss) + (loss if self._running else 0.0) * self.value.abs())
        self._radius += (1 + self._factors) * UNDERFLOW
        self._magnitude *= abs(s)
        self.value *= s

    def add(self, other: Tensor | Accumulator) -> None:
        """Add an exact tensor or another accumulator, in fp32.

        2u·(|S| + |other|) rather than u·|S + other|: three terms may then be added in any order.
        """
        self._roundings += 1
        if isinstance(other, Accumulator):
            self._radius += other._radius
            self._factors += other._factors
            self._roundings += other._roundings
            self._magnitude += other._magnitude
            other = other.value
        else:
            self._magnitude += other.abs()
        if self._running:
            self._radius += 2 * U * (self.value.abs() + other.abs() + self._radius)
        self.value += other

    def _run(self, P: Tensor, Q: Tensor, P_reach: Tensor, Q_reach: Tensor, product: Tensor, step: int) -> None:
        """The running bound over steps t of P·Q: Σ_t cost(t), cost from the partial sums S_t.

        tensor_core: (L+1)·2^-F·2^(e_t) + 2^-23·|S_t| with L products a step, F fraction bits and e_t the largest
        exponent among the step's products and the accumulator: each of the L+1 aligned terms is cut below 2^(e_t − F),
        then the sum to fp32. Subnormal and zero operands are aligned by the format's smallest exponent.

        fp32_blocks: γ_L·|P||Q| for the sums inside blocks of L, and u·|S_t| for every addition of a block.

        The implementation's S_t differs from the exact one by at most the radius so far, bounded in advance: r ≤ r_0 +
        c·(M + r) with M ≥ Σ|terms| and c ≥ the relative cost of all steps, hence r ≤ (r_0 + c·M) / (1 − c). Every |S_t|
        is widened by it, which covers all second-order terms and lets the steps be evaluated together.
        """
        tensor_core = self._how.kind == "tensor_core"
        if tensor_core:
            P_reach, Q_reach = P_reach.clamp(min=self._smallest), Q_reach.clamp(min=self._smallest)
            product = P_reach @ Q_reach
            aligned = (step + 1) * 2.0**-self._how.fraction_bits
            relative = -(-P.shape[1] // step) * (aligned + _TRUNCATED)
        else:
            aligned = 0.0
            inside = gamma(min(step, P.shape[1]))
            relative = -(-P.shape[1] // step) * U + inside
            self._radius += inside * product
        reach = self._magnitude + product + 2.0**-126
        margin = (self._radius + relative * reach) / (1 - relative)
        rounding = _TRUNCATED if tensor_core else U
        R, C = self.value.shape
        budget = _BUDGET.get(P.device.type, _BUDGET["cpu"])
        rows_at_once = max(1, min(R, budget // max(C, 1)))
        for start in range(0, R, rows_at_once):
            rows = slice(start, start + rows_at_once)
            steps_at_once = max(1, budget // max(1, min(R, rows_at_once) * C))
            self.value[rows], cost = _running_cost(
                (P[rows], Q, P_reach[rows], Q_reach) if tensor_core else (P[rows], Q, None, None),
                self.value[rows], margin[rows], step, steps_at_once, aligned, rounding,
            )  # fmt: skip
            self._radius[rows] += cost


def _reach(x: Tensor, radius: Tensor | None) -> Tensor:
    return x.abs() if radius is None else x.abs() + radius


def _columns(x: Tensor | None, index: Tensor | slice) -> Tensor | None:
    return None if x is None else x[:, index]


def _rows(x: Tensor | None, index: Tensor | slice) -> Tensor | None:
    return None if x is None else x[index]


def _running_cost(
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    value: Tensor,
    margin: Tensor,
    step: int,
    steps_at_once: int,
    aligned: float,
    rounding: float,
) -> tuple[Tensor, Tensor]:
    """The sum after all steps, and Σ_t aligned·2^(e_t) + rounding·(|S_t| + margin): both [R, C]."""
    P, Q, P_reach, Q_reach = operands
    cost = torch.zeros_like(value)
    length = step * steps_at_once
    for start in range(0, P.shape[1], length):
        terms = slice(start, start + length)
        partial = torch.bmm(*_in_steps(P[:, terms], Q[terms], step)).cumsum(0) + value
        after = partial.abs() + margin
        if P_reach is not None and Q_reach is not None:
            before = torch.cat((value.abs()[None] + margin, after[:-1]))
            left, right = _in_steps(P_reach[:, terms], Q_reach[terms], step)
            largest = before.clamp(min=2.0**-126)
            if largest.numel() * step <= _TOGETHER:
                largest = torch.maximum(largest, (left[..., None] * right[:, None]).amax(2))
            else:
                for j in range(step):
                    largest = torch.maximum(largest, left[:, :, j, None] * right[:, None, j, :])
            cost += aligned * pow2_floor(largest).sum(0)
        cost += rounding * after.sum(0)
        value = partial[-1]
    return value, cost


def _in_steps(P: Tensor, Q: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """[R, n] and [n, C] -> [T, R, step] and [T, step, C], padded with zeros."""
    missing = -P.shape[1] % step
    P = torch.nn.functional.pad(P, (0, missing)).contiguous()
    Q = torch.nn.functional.pad(Q, (0, 0, 0, missing)).contiguous()
    return P.view(P.shape[0], -1, step).transpose(0, 1), Q.view(-1, step, Q.shape[1])
