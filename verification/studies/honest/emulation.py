"""Honest arithmetic, emulated: tensor cores step by step as MMA-Sim (arXiv 2511.10909) describes them, and fp32 sums in
many orders. It shares no line with the kernels, nor with the bounds that it is held against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.rounding import round_to
from mxref.scattermoe import RoundingPoints, expert_order_gates, expert_order_inputs
from mxref.verification.arithmetic.accumulation import Accumulation, Order, Product
from mxref.verification.cases.case import Sample

Dot = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(accumulator, P, Q) -> accumulator + P·Q; all fp64, the accumulator on the fp32 grid."""


def r32(x: Tensor) -> Tensor:
    """Rounded to fp32."""
    return x.float().double()


def truncated(x: Tensor, quantum: Tensor) -> Tensor:
    """Cut towards zero to a multiple of the quantum."""
    return torch.trunc(x / quantum) * quantum


def exponent(x: Tensor, smallest: int = -126) -> Tensor:
    """⌊log2 |x|⌋, subnormals and zeros at the format's smallest exponent."""
    return torch.where(x == 0, smallest, torch.frexp(x)[1].long() - 1).clamp(min=smallest)


def tensor_core(step: int = 16, fraction_bits: int = 25) -> Dot:
    """Steps of products, aligned to the largest exponent and cut, then cut to fp32."""

    def dot(acc: Tensor, P: Tensor, Q: Tensor) -> Tensor:
        for k in range(0, P.shape[1], step):
            p, q = P[:, None, k : k + step], Q.T[None, :, k : k + step]
            terms = torch.cat(((p * q), acc[..., None]), -1)
            exponents = torch.cat((exponent(p) + exponent(q), exponent(acc)[..., None]), -1)
            largest = torch.exp2(exponents.amax(-1, keepdim=True).double())
            total = truncated(terms, largest * 2.0**-fraction_bits).sum(-1)
            acc = truncated(total, torch.exp2((exponent(total) - 23).double()))
        return acc

    return dot


def blocks(step: int, order: str = "forward", inner: str = "sequential") -> Dot:
    """fp32 in blocks: each block summed by itself, then added to the accumulator."""

    def dot(acc: Tensor, P: Tensor, Q: Tensor) -> Tensor:
        index = torch.arange(P.shape[1])
        if order == "backward":
            index = index.flip(0)
        elif order == "shuffled":
            index = torch.randperm(P.shape[1], generator=torch.Generator().manual_seed(step))
        for own in torch.split(index, step):
            products = r32(P[:, own, None] * Q[None, own])
            acc = r32(acc + SUMS[inner](products))
        return acc

    return dot


def fused_chain(order: str = "forward") -> Dot:
    """One fused multiply-add after the other."""

    def dot(acc: Tensor, P: Tensor, Q: Tensor) -> Tensor:
        for k in range(P.shape[1]) if order == "forward" else reversed(range(P.shape[1])):
            acc = r32(acc + P[:, k, None] * Q[None, k])
        return acc

    return dot


def sequential(products: Tensor) -> Tensor:
    """fp32 sum over the columns, from the left."""
    total = products[:, 0]
    for k in range(1, products.shape[1]):
        total = r32(total + products[:, k])
    return total


def pairwise(products: Tensor) -> Tensor:
    """fp32 sum over the columns, as a tree."""
    while products.shape[1] > 1:
        if products.shape[1] % 2:
            products = torch.cat((products, torch.zeros_like(products[:, :1])), 1)
        products = r32(products[:, 0::2] + products[:, 1::2])
    return products[:, 0]


def by_size(products: Tensor) -> Tensor:
    """fp32 sum over the columns, the largest first."""
    order = products.abs().argsort(1, descending=True)
    return sequential(products.gather(1, order))


def in_fp64(products: Tensor) -> Tensor:
    """Sum over the columns, rounded once."""
    return r32(products.sum(1))


SUMS = {"sequential": sequential, "pairwise": pairwise, "by size": by_size, "fp64": in_fp64}


@dataclass
class Emulated:
    """An honest implementation of the contract's text over a given dot.

    Attributes:
        dot: one product into one accumulator.
        R: dtype that results are rounded to; None for fp32.
        points: where it rounds.
        how: the order of its products, and where the LoRA product and the bias meet the accumulator; its `dot` is not
            read from it.
        lora_last: the LoRA product continues in the accumulator of the base product; needs s folded into B.
        broken: names one planted mistake; "" for none.
    """

    dot: Dot
    R: torch.dtype | None
    points: RoundingPoints
    how: Accumulation = field(default_factory=lambda: Accumulation("undeclared"))
    lora_last: bool = False
    broken: str = ""

    def round(self, x: Tensor) -> Tensor:
        """One rounding to R."""
        return r32(x) if self.R is None else round_to(x, self.R)

    def stored(self, x: Tensor, parameter: Tensor | None) -> Tensor:
        """A parameter's gradient, in the parameter's own dtype."""
        assert parameter is not None
        return r32(x) if self.R is None else round_to(r32(x), parameter.dtype)

    def product(self, name: Product, acc: Tensor, P: Tensor, Q: Tensor) -> Tensor:
        """acc + P·Q in the declared order; the parts of a split K are summed apart."""
        order = self.how.orders.get(name, Order())
        if order.permutation is not None:
            index = order.permutation(P.shape[1])
            P, Q = P[:, index], Q[index]
        if order.parts == 1:
            return self.dot(acc, P, Q)
        length = -(-P.shape[1] // (self.how.step * order.parts)) * self.how.step
        for left, right in zip(torch.split(P, length, 1), torch.split(Q, length), strict=True):
            acc = r32(acc + self.dot(torch.zeros_like(acc), left, right))
        return acc

    def chain(
        self,
        name: Product,
        base: tuple[Tensor, Tensor],
        low: tuple[Tensor, Tensor, float] | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Y or D before it is rounded."""
        P, Q = base
        if self.broken == "one step dropped":
            P = torch.cat((P[:, :-16], torch.zeros_like(P[:, -16:])), 1)
        zero = torch.zeros(P.shape[0], Q.shape[1], dtype=torch.float64)
        first = bias if self.how.bias_inside and bias is not None else zero
        last = bias if not self.how.bias_inside and bias is not None else zero
        if low is None:
            return r32(self.product(name, first.expand_as(zero), P, Q) + last)
        if self.lora_last:
            assert low[2] == 1
            return r32(self.dot(self.product(name, first.expand_as(zero), P, Q), low[0], low[1]) + last)
        side = self.dot(zero, low[0], low[1])
        if self.points.lora_after_output:
            main = self.round(r32(self.product(name, first.expand_as(zero), P, Q) + last))
            return r32(main + self.round(r32(low[2] * self.round(side))))
        side = r32(low[2] * side)
        if self.how.lora == "apart":
            return r32(r32(self.product(name, first.expand_as(zero), P, Q) + side) + last)
        return r32(self.product(name, r32(first + side), P, Q) + last)

    def run(self, sample: Sample) -> dict[str, Tensor]:
        """One forward and one backward pass, by tensor; fp64 on the grid of each tensor's dtype."""
        problem, x = sample.problem, expert_order_inputs(sample.problem)
        z, unrounded = self._forward(problem, x)
        y = self.round(unrounded)
        if problem.gates is None:
            incoming = sample.grad_out.double()
            out = {"Y": y if problem.grouped_out else position(problem, y)}
            dy = incoming if problem.grouped_out else incoming[problem.row_positions()]
        else:
            out, dy = self._through_gates(sample, unrounded, y)
        owned = problem.sorted_expert_idxs < problem.E
        return out | self._backward(problem, x, z, torch.where(owned[:, None], dy, 0.0))

    def _forward(self, problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
        """Z, and Y before it is rounded, by rows in expert order."""
        z, y = x.new_zeros(problem.P, problem.rank), x.new_zeros(problem.P, problem.N)
        for e, start, end in problem.segments():
            own, W, low = slice(start, end), problem.expert_weight(e), None
            bias = None if problem.expert_biases is None else problem.expert_biases[e].double()
            if problem.rank:
                A, B, s = self._adapters(problem, e)
                z[own] = self._inner(self.product("Z", _zero(end - start, problem.rank), x[own], A.T))
                low = (z[own], B.T, s)
            y[own] = self.chain("Y", (x[own], W), low, bias)
        return z, y

    def _through_gates(self, sample: Sample, unrounded: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Y and dgates, and dY by rows in expert order."""
        problem = sample.problem
        assert problem.gates is not None
        g, slots = expert_order_gates(problem)[:, None], problem.gates.shape[1]
        shown = unrounded if self.points.gates_before_output else y
        gated = position(problem, r32(g * shown)).view(-1, slots, problem.N)
        incoming = sample.grad_out.double()[problem.row_positions() // slots]
        owned = problem.sorted_expert_idxs < problem.E
        dgates = position(problem, torch.where(owned, sequential(r32(shown * incoming)), 0.0)).view(-1, slots)
        out = {"Y": self.round(sequential(gated.flip(1))), "dgates": self.stored(dgates, problem.gates)}
        return out, self.round(r32(g * incoming))

    def _backward(self, problem: Problem, x: Tensor, z: Tensor, dy: Tensor) -> dict[str, Tensor]:
        """dX, and dA, dB, dbias of the parameters that are there."""
        d = x.new_zeros(problem.P, problem.K)
        parameters = {"dA": problem.lora_A, "dB": problem.lora_B, "dbias": problem.expert_biases}
        out = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items() if p is not None}
        for e, start, end in problem.segments():
            own, W, low = slice(start, end), problem.expert_weight(e), None
            if "dbias" in out:
                out["dbias"][e] = self.stored(sequential(dy[None, own]), problem.expert_biases)[0]
            if problem.rank:
                mine = slice(e * problem.rank, (e + 1) * problem.rank)
                A, B, s = self._adapters(problem, e)
                v = self._inner(self.product("V", _zero(end - start, problem.rank), dy[own], B))
                low = (v, A, s)
                of_A = self.product("dA", _zero(problem.rank, problem.K), v.T.contiguous(), x[own])
                out["dA"][mine] = self.stored(s * of_A, problem.lora_A)
                of_B = self.product("dB", _zero(problem.N, problem.rank), dy[own].T.contiguous(), z[own])
                out["dB"][:, mine] = self.stored(problem.scaling * of_B, problem.lora_B)
            d[own] = self.chain("D", (dy[own], W.T), low)
        d = self.round(d)
        if not problem.grouped_in:
            d = self.round(sequential(position(problem, d).view(-1, problem.k, problem.K)))
        return out | {"dX": d}

    def _inner(self, x: Tensor) -> Tensor:
        """Z or V as it is stored."""
        return self.round(x) if self.points.z else x

    def _adapters(self, problem: Problem, e: int) -> tuple[Tensor, Tensor, float]:
        """A, B and the scaling that is left beside them, of one expert."""
        A, B = problem.expert_lora(e)
        return (A, self.round(problem.scaling * B), 1.0) if self.points.scaling_in_B else (A, B, problem.scaling)


def _zero(rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.float64)


def position(problem: Problem, rows: Tensor) -> Tensor:
    """From expert order to position order."""
    scattered = torch.empty_like(rows)
    scattered[problem.row_positions()] = rows
    return scattered
