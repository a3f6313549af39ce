"""Bounds of the activation: what the documented errors allow lies inside, and little more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxref.activation import columns, halves
from mxref.swiglu import GPT_OSS, SILU, SwiGLU
from mxref.verification.arithmetic.own.activation import activation_intervals
from mxref.verification.arithmetic.own.elementary import NUMPY, NVIDIA, Elementary, elementary
from mxref.verification.cases.own.activation import ActivationCase

CPU = torch.device("cpu")
FORMS = {"gpt-oss": GPT_OSS, "SiLU": SILU, "limited": SwiGLU(limit=10.0)}
ULP = 2.0**-23
LOG2_E = torch.tensor(1.4426950408889634, dtype=torch.float32)


def operands(form: SwiGLU, rows: int = 200) -> tuple[Tensor, Tensor]:
    sample = ActivationCase("", rows, 128, form, torch.float32).sample(CPU, seed=0)
    return sample.gate_up, sample.grad


class Emulated:
    """fp32 as a GPU's fast paths may compute it: exp and division off by as much as is documented, either way."""

    def __init__(self, seed: int, flush: bool) -> None:
        self.generator, self.flush = torch.Generator().manual_seed(seed), flush

    def off(self, exact: Tensor, ulps: float) -> Tensor:
        """An fp32 number at most `ulps` units from the exact one, fp64."""
        sign = torch.randint(-1, 2, exact.shape, generator=self.generator)
        unit = torch.exp2(torch.floor(torch.log2(exact.abs())) - 23)
        return torch.where(exact == 0, exact, exact + sign * (ulps - 0.5) * unit).float()

    def exp(self, x: Tensor) -> Tensor:
        power = self.off(torch.exp2((x * LOG2_E).double()), 2.0)
        return torch.where(power < 2.0**-126, 0.0, power) if self.flush else power

    def both(self, gate_up: Tensor, grad: Tensor, form: SwiGLU) -> dict[str, Tensor]:
        gate, up = g, u = halves(gate_up, form)
        if form.limit is not None:
            g, u = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
        t = form.alpha * g
        e = self.exp(-t.abs())
        larger = self.off(1 / (1 + e).double(), 2.0)
        sigma, rest = torch.where(t >= 0, larger, e * larger), torch.where(t >= 0, e * larger, larger)
        slope = sigma + form.alpha * (g * sigma * rest)
        dgate, dup = slope * (u + form.offset) * grad, g * sigma * grad
        if form.limit is not None:
            dgate = torch.where(gate <= form.limit, dgate, 0.0)
            dup = torch.where(up.abs() <= form.limit, dup, 0.0)
        return {"H": (u + form.offset) * (g * sigma), "dgate_up": columns(dgate, dup, form)}


@pytest.mark.parametrize("flush", [False, True], ids=["subnormal", "flushed"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_is_documented_lies_inside_and_fills_it(form: SwiGLU, flush: bool) -> None:
    gate_up, grad = operands(form)
    form = form.for_dtype(torch.float32)
    accepted = activation_intervals(gate_up.double(), grad.double(), form, NVIDIA)
    used = dict.fromkeys(accepted, 0.0)
    for seed in range(5):
        for tensor, got in Emulated(seed, flush).both(gate_up, grad, form).items():
            interval = accepted[tensor]
            assert interval.radius is not None
            distance = (got.double() - interval.exact).abs()
            assert (distance <= interval.radius).all()
            used[tensor] = max(used[tensor], float((distance / interval.radius).nan_to_num(0.0).max()))
    assert min(used.values()) > 0.4


@pytest.mark.parametrize("how", [NVIDIA, NUMPY])
def test_radii_in_ulp(how: Elementary) -> None:
    """A dozen ulp of exp, quotient and products, and where exp multiplies its argument's error, |t| more."""
    form = GPT_OSS.for_dtype(torch.float32)
    gate_up, grad = operands(form)
    interval = activation_intervals(gate_up.double(), grad.double(), form, how)["H"]
    t = form.alpha * halves(gate_up.double(), form)[0].clamp(max=form.limit)
    ordinary = (t.abs() < 80) & (interval.exact != 0)
    assert interval.radius is not None
    share = (interval.radius / interval.exact.abs())[ordinary]
    assert (share < (12 + 2 * t.abs()[ordinary]) * ULP).all()
    assert (share > 2 * ULP).all()


def test_beyond_a_bound_the_gradient_is_zero_without_a_radius() -> None:
    gate_up = torch.tensor([[8.0, 1.0, 7.0, 7.0, 1.0, -8.0]], dtype=torch.float64)
    interval = activation_intervals(gate_up, torch.ones(1, 3, dtype=torch.float64), GPT_OSS, NVIDIA)["dgate_up"]
    assert interval.radius is not None
    assert ((interval.exact == 0) & (interval.radius == 0)).tolist() == [[True, False, False, False, False, True]]


def test_which_arithmetic_counts_where() -> None:
    assert elementary(CPU) == NUMPY
    assert elementary(torch.device("cuda")) == NVIDIA
