"""ScatterMoE-LoRA, forward and backward, as the mathematics says it: fp64 throughout, rounding points as an argument.

For expert e with frozen weights W, adapters A [r, K] and B [N, r], scaling s, and R one rounding to the
activation dtype:

    forward     Z = R(x·Aᵀ)         Y = R(x·W + s·Z·Bᵀ + bias)         out = R(Σ_slots gate·Y)
    backward    dgate = R(⟨Y, dOut⟩)   dY = R(gate·dOut)               V = R(dY·B)
                D = R(dY·Wᵀ + s·V·A)   dX = R(Σ_slots D)
                dA = R(s·Vᵀ·x)         dB = R(s·dYᵀ·Z)                 dbias = R(Σ_rows dY)

Without gates, out is Y and dY is dOut. A parameter's gradient is rounded to the parameter's own dtype. The layout
follows ScatterMoE (Tan et al., arXiv 2403.08245), the adapters LoRA (Hu et al., arXiv 2106.09685).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.rounding import round_to


@dataclass(frozen=True)
class RoundingPoints:
    """Where an implementation rounds. The defaults are this project's contract; the flags are the allowed deviations.

    Attributes:
        dtype: what R rounds to, bf16 or fp16; None means that R is the identity (fp32 activations, or exact mode).
        z: Z and V are rounded; False: they stay in the accumulator's precision.
        lora_after_output: the base product (with its bias) and s·Z·Bᵀ are rounded apart, then added and rounded again;
            so are dY·Wᵀ and s·V·A.
        gates_before_output: gates multiply the unrounded Y.
        scaling_in_B: s is folded into B, and s·B is rounded; dB is still scaled by s.
    """

    dtype: torch.dtype | None
    z: bool = True
    lora_after_output: bool = False
    gates_before_output: bool = False
    scaling_in_B: bool = False

    @classmethod
    def exact(cls) -> RoundingPoints:
        """No rounding anywhere."""
        return cls(None)

    @classmethod
    def contract(cls, dtype: torch.dtype) -> RoundingPoints:
        """The contract's rounding points for activations of `dtype`; the identity for fp32 and fp64."""
        return cls(dtype if dtype in (torch.bfloat16, torch.float16) else None)

    def R(self, exact: Tensor) -> Rounded:
        """One rounding point."""
        return Rounded(exact, round_to(exact, self.dtype))


@dataclass(frozen=True)
class Rounded:
    """A quantity at a rounding point, both fp64: `exact` goes in, `value` comes out."""

    exact: Tensor
    value: Tensor


@dataclass(frozen=True)
class Forward:
    """The forward pass's rounding points. z [P, r] and y [P, N] are in expert order, sentinel rows zero.

    out is what the caller gets: [P, N] by position (expert order with `grouped_out`), or [T, N] with gates.
    """

    z: Rounded | None
    y: Rounded
    out: Rounded


@dataclass(frozen=True)
class Backward:
    """The backward pass's rounding points.

    dy [P, N], v [P, r] and d [P, K] are in expert order, sentinel rows zero; gradients have their operand's shape.
    """

    dy: Rounded
    v: Rounded | None
    d: Rounded
    dx: Rounded
    dA: Rounded | None
    dB: Rounded | None
    dbias: Rounded | None
    dgates: Rounded | None


def forward(problem: Problem, points: RoundingPoints) -> Forward:
    """Every rounding point of the forward pass, on the problem's device; runs expert by expert."""
    x = expert_order_inputs(problem)
    z = x.new_zeros(problem.P, problem.rank) if problem.rank else None
    y = x.new_zeros(problem.P, problem.N)
    for e, start, end in problem.segments():
        rows = slice(start, end)
        base = x[rows] @ problem.expert_weight(e)
        if problem.expert_biases is not None:
            base += problem.expert_biases[e].detach().double()
        if z is None:
            y[rows] = base
            continue
        A, B, s = _adapters(problem, e, points)
        z[rows] = x[rows] @ A.T
        z_rounded = points.R(z[rows]).value if points.z else z[rows]
        y[rows] = _add_lora(base, s, z_rounded @ B.T, points)
    y_point = points.R(y)
    return Forward(_inner(z, points), y_point, _combine(problem, y_point, points))


def backward(problem: Problem, fwd: Forward, grad_out: Tensor, points: RoundingPoints) -> Backward:
    """Every rounding point of the backward pass, given the forward's and dOut (the shape of `out`).

    Experts without rows get exact zeros; the base weights are frozen and get nothing.
    """
    x = expert_order_inputs(problem)
    dy, dgates = _split(problem, fwd, grad_out.double(), points)
    d = torch.zeros_like(x)
    v = x.new_zeros(problem.P, problem.rank) if problem.rank else None
    dA, dB, dbias = (
        None if parameter is None else torch.zeros_like(parameter, dtype=torch.float64)
        for parameter in (problem.lora_A, problem.lora_B, problem.expert_biases)
    )
    for e, start, end in problem.segments():
        rows, own = slice(start, end), slice(e * problem.rank, (e + 1) * problem.rank)
        dy_e = dy.value[rows]
        d[rows] = dy_e @ problem.expert_weight(e).T
        if dbias is not None:
            dbias[e] = dy_e.sum(0)
        if v is None or dA is None or dB is None or fwd.z is None:
            continue
        A, B, s = _adapters(problem, e, points)
        v[rows] = dy_e @ B
        v_rounded = points.R(v[rows]).value if points.z else v[rows]
        d[rows] = _add_lora(d[rows], s, v_rounded @ A, points)
        dA[own] = s * (v_rounded.T @ x[rows])
        dB[:, own] = float(problem.scaling) * (dy_e.T @ fwd.z.value[rows])
    d_point = points.R(d)
    return Backward(
        dy=dy,
        v=_inner(v, points),
        d=d_point,
        dx=points.R(_sum_over_fan_out(problem, d_point.value)),
        dA=_parameter_gradient(dA, problem.lora_A, points),
        dB=_parameter_gradient(dB, problem.lora_B, points),
        dbias=_parameter_gradient(dbias, problem.expert_biases, points),
        dgates=dgates,
    )


def expert_order_inputs(problem: Problem) -> Tensor:
    """x with one row a routed row, in expert order: fp64 [P, K]."""
    return problem.inputs.detach().double()[problem.row_sources()]


def expert_order_gates(problem: Problem) -> Tensor:
    """Each routed row's gate, rounded to the activation dtype, in expert order: fp64 [P]; zero for sentinels."""
    assert problem.gates is not None
    gates = round_to(problem.gates.detach().double().flatten(), problem.dtype)[problem.row_positions()]
    return torch.where(owned_rows(problem), gates, 0.0)


def owned_rows(problem: Problem) -> Tensor:
    """Which routed rows, in expert order, belong to an expert: bool [P]; False marks a sentinel."""
    return problem.sorted_expert_idxs < problem.E


def _adapters(problem: Problem, e: int, points: RoundingPoints) -> tuple[Tensor, Tensor, float]:
    """A, B and the factor that is still to be applied to their products."""
    A, B = problem.expert_lora(e)
    if points.scaling_in_B:
        return A, points.R(float(problem.scaling) * B).value, 1.0
    return A, B, float(problem.scaling)


def _add_lora(base: Tensor, s: float, product: Tensor, points: RoundingPoints) -> Tensor:
    if points.lora_after_output:
        return points.R(base).value + points.R(s * points.R(product).value).value
    return base + s * product


def _inner(exact: Tensor | None, points: RoundingPoints) -> Rounded | None:
    if exact is None:
        return None
    return points.R(exact) if points.z else Rounded(exact, exact)


def _combine(problem: Problem, y: Rounded, points: RoundingPoints) -> Rounded:
    """From rows in expert order to what the caller gets."""
    if problem.grouped_out:
        return y
    if problem.gates is None:
        return Rounded(_by_position(problem, y.exact), _by_position(problem, y.value))
    rows = y.exact if points.gates_before_output else y.value
    gated = torch.where(owned_rows(problem)[:, None], expert_order_gates(problem)[:, None] * rows, 0.0)
    return points.R(_by_position(problem, gated).view(*problem.gates.shape, problem.N).sum(1))


def _split(problem: Problem, fwd: Forward, grad_out: Tensor, points: RoundingPoints) -> tuple[Rounded, Rounded | None]:
    """dY in expert order and, with gates, their gradient."""
    owned = owned_rows(problem)[:, None]
    if problem.gates is None:
        rows = grad_out if problem.grouped_out else grad_out[problem.row_positions()]
        unrounded = torch.where(owned, rows, 0.0)
        return Rounded(unrounded, unrounded), None
    rows = torch.where(owned, grad_out[problem.row_positions() // problem.gates.shape[1]], 0.0)
    y = fwd.y.exact if points.gates_before_output else fwd.y.value
    dgates = _by_position(problem, (y * rows).sum(1)).view(problem.gates.shape)
    dy = points.R(expert_order_gates(problem)[:, None] * rows)
    return dy, _parameter_gradient(dgates, problem.gates, points)


def _by_position(problem: Problem, rows: Tensor) -> Tensor:
    scattered = torch.empty_like(rows)
    scattered[problem.row_positions()] = rows
    return scattered


def _sum_over_fan_out(problem: Problem, d: Tensor) -> Tensor:
    """Σ over the k routed rows that each input row feeds: [P, K] -> the shape of x."""
    if problem.grouped_in:
        return d
    return _by_position(problem, d).view(problem.inputs.shape[0], problem.k, problem.K).sum(1)


def _parameter_gradient(exact: Tensor | None, parameter: Tensor | None, points: RoundingPoints) -> Rounded | None:
    if exact is None or parameter is None:
        return None
    narrow = points.dtype is not None and parameter.dtype in (torch.bfloat16, torch.float16)
    return Rounded(exact, round_to(exact, parameter.dtype) if narrow else exact)
