"""Error bounds of the gated activation: the fp32 computation that `mxref.activation` leaves between its roundings.

Every operation is one of `elementary`'s, in the order of the formula: t = alpha·g, e = e^−|t|, 1/(1 + e) and e/(1 + e)
for σ and 1 − σ, whichever is which, and products and one sum of these. Bounds are absolute, so that the sum
σ + alpha·(g·σ)·(1 − σ), which vanishes near t = −1.28, keeps the errors of its terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxref.activation import columns, exact_gradient, exact_hidden, halves
from mxref.swiglu import SwiGLU
from mxref.verification.arithmetic.interval import Interval
from mxref.verification.arithmetic.own.elementary import Approximate, Elementary, exp_of_minus, reciprocal

__all__ = ["activation_intervals"]

_SLACK = 1 + 2.0**-20
"""Covers the reference's own fp64, 2^−52 an operation beside 2^−24 here."""


def activation_intervals(gate_up: Tensor, grad: Tensor, form: SwiGLU, how: Elementary) -> dict[str, Interval]:
    """What an honest implementation's fp32 results are before their own rounding.

    Args:
        gate_up: fp64 [.., 2I], values that fp32 holds.
        grad: dH, fp64 [.., I], likewise.
        form: with numbers that fp32 holds.
        how: errors of exp and division.

    Returns:
        "H" and "dgate_up"; where a clamp holds the gradient back, exactly 0.
    """
    gate, up = g, u = halves(gate_up, form)
    if form.limit is not None:
        g, u = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)

    def constant(number: float) -> Approximate:
        return Approximate.exact(torch.tensor(number, dtype=torch.float64, device=gate_up.device))

    alpha, one, dh = constant(form.alpha), constant(1.0), Approximate.exact(grad)
    t = alpha.times(Approximate.exact(g))
    e = exp_of_minus(t, how)
    larger = reciprocal(one.plus(e), how)
    smaller = e.times(larger)
    sigma, rest = larger.where(t.value >= 0, smaller), smaller.where(t.value >= 0, larger)
    glu = sigma.times(Approximate.exact(g))
    a = Approximate.exact(u).plus(constant(form.offset))
    slope = sigma.plus(alpha.times(glu.times(rest)))
    dgate, dup = slope.times(a).times(dh).radius, glu.times(dh).radius
    if form.limit is not None:
        dgate, dup = torch.where(gate <= form.limit, dgate, 0.0), torch.where(up.abs() <= form.limit, dup, 0.0)
    return {
        "H": _around(exact_hidden(gate_up, form), a.times(glu).radius),
        "dgate_up": _around(exact_gradient(gate_up, grad, form), columns(dgate, dup, form)),
    }


def _around(exact: Tensor, radius: Tensor) -> Interval:
    radius = radius * _SLACK
    return Interval(exact - radius, exact + radius, exact, radius)
