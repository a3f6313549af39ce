"""The golden activation against torch's own derivative of transformers' own functions."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from mxref.activation import columns, exact_hidden, gated
from mxref.rounding import round_to
from mxref.swiglu import GPT_OSS, SILU, SwiGLU

LIMITED = SwiGLU(limit=10.0)
HALVES = SwiGLU(alpha=1.702, limit=7.0, offset=1.0)


def _of(experts: Any, **attributes: Any) -> Callable[[Tensor], Tensor]:
    module = SimpleNamespace(act_fn=F.silu, **attributes)
    return lambda gate_up: experts._apply_gate(module, gate_up)


FAMILIES: dict[str, tuple[SwiGLU, Callable[[Tensor], Tensor]]] = {
    "gpt_oss": (GPT_OSS, _of(GptOssExperts, alpha=1.702, limit=7.0)),
    "mixtral": (SILU, _of(MixtralExperts)),
    "deepseek_v4": (LIMITED, _of(DeepseekV4Experts, limit=10.0)),
    "minimax_m3_vl": (HALVES, _of(MiniMaxM3VLExperts, swiglu_alpha=1.702, swiglu_limit=7.0)),
}


def every_pair(values: list[float], form: SwiGLU, dtype: torch.dtype = torch.float64) -> Tensor:
    """[pairs, 2]: each value as gate beside each as up."""
    pairs = torch.cartesian_prod(torch.tensor(values, dtype=dtype), torch.tensor(values, dtype=dtype))
    return columns(pairs[:, :1], pairs[:, 1:], form)


def around(limit: float | None) -> list[float]:
    """Both bounds, their neighbours on the grid of fp64 and of bf16, ±0, NaN, ±inf, and ordinary numbers."""
    inf, bound = float("inf"), torch.tensor(limit or 7.0, dtype=torch.float64)
    near = [torch.nextafter(bound, torch.tensor(to, dtype=torch.float64)).item() for to in (-inf, inf)]
    edges = [bound.item(), *near, bound.item() * (1 + 2**-7), bound.item() * (1 - 2**-8)]
    return [*edges, *(-x for x in edges), 0.0, -0.0, 0.5, -1.25, 30.0, -30.0, float("nan"), inf, -inf]


def both(function: Callable[[Tensor], Tensor], gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = gate_up.clone().requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_at_bounds_zeros_and_what_is_not_finite(family: str) -> None:
    """In fp64, where a dozen roundings are below 1e-14 of a value; classes (NaN, inf, a clamp's zero) are the same."""
    form, theirs = FAMILIES[family]
    gate_up = every_pair(around(form.limit), form)
    grad = torch.full((len(gate_up), 1), -1.5, dtype=torch.float64)
    for got, expected in zip(both(lambda x: gated(x, form), gate_up, grad), both(theirs, gate_up, grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13, equal_nan=True)
        assert torch.equal(got == 0, expected == 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounds_once_where_eager_rounds_more(family: str, dtype: torch.dtype) -> None:
    form, theirs = FAMILIES[family]
    gate_up = (3 * torch.randn(200, 32, generator=torch.Generator().manual_seed(0))).to(dtype)
    exact = exact_hidden(gate_up.double(), form.for_dtype(dtype))
    once = gated(gate_up, form)
    assert once.dtype == dtype
    assert torch.equal(once.double(), round_to(exact, dtype))
    eager = (theirs(gate_up).double() - exact).abs()
    assert (eager > (once.double() - exact).abs()).any()
    assert (eager >= (once.double() - exact).abs()).all()


def test_numbers_are_those_of_fp32() -> None:
    """A limit that fp32 does not hold clamps where torch clamps an fp32 tensor."""
    form = SwiGLU(limit=0.1)
    gate_up = torch.tensor([[0.1, 1.0], [0.2, 1.0]], dtype=torch.float32)
    leaf = gate_up.clone().requires_grad_()
    expected = F.silu(leaf[:, :1].clamp(max=0.1)) * leaf[:, 1:].clamp(-0.1, 0.1)
    got = both(lambda x: gated(x, form), gate_up, torch.ones(2, 1))
    torch.testing.assert_close(got[1], torch.autograd.grad(expected.sum(), leaf)[0])
    assert got[1][0, 0] != 0 == got[1][1, 0]


@pytest.mark.parametrize("fields", [{"limit": 0.0}, {"limit": -1.0}, {"limit": float("inf")}, {"alpha": float("nan")}])
def test_numbers_that_make_no_activation(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        SwiGLU(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gate_up", "error"), [(torch.ones(2, 3), ValueError), (torch.ones(2, 4, dtype=torch.int32), TypeError)]
)
def test_what_has_no_gate_and_up(gate_up: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="gate_up"):
        gated(gate_up, SILU)
