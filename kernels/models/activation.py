"""Gated activations of transformers' experts modules that the kernels compute.

The table below declares, by the qualified name of a module's `_apply_gate`, which `SwiGLU` it is and which attributes
hold its numbers. Another version of transformers may have other code under the same name, so values and gradients are
compared with the module's own. What is not declared, or does not agree, keeps the module's own function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxref.swiglu import SwiGLU

__all__ = ["DECLARED", "form_of"]

_SILU = ("SiLUActivation", "SiLU", "silu")
"""Names of an `act_fn` that is SiLU: its class's, or its own if it is a function."""

_TOLERANCE = 1e-5
"""For a function that computes in fp32 whatever it gets: a dozen roundings. Another form is further off than that."""


def _silu(experts: Any, form: SwiGLU) -> SwiGLU | None:
    name = getattr(experts.act_fn, "__name__", type(experts.act_fn).__name__)
    return form if name in _SILU else None


DECLARED: dict[str, Callable[[Any], SwiGLU | None]] = {
    "_default_apply_gate": lambda experts: _silu(experts, SwiGLU()),
    "BeamExperts._apply_gate": lambda experts: _silu(experts, SwiGLU()),
    "DeepseekV4Experts._apply_gate": lambda experts: _silu(experts, SwiGLU(limit=experts.limit)),
    "Glm5NextTextExperts._apply_gate": lambda experts: SwiGLU(limit=experts.swiglu_limit),
    "GptOssExperts._apply_gate": lambda experts: SwiGLU(True, experts.alpha, experts.limit, 1.0),
    "HYV4Experts._apply_gate": lambda experts: SwiGLU(limit=experts.swiglu_limit),
    "MiniMaxM3VLExperts._apply_gate": lambda experts: SwiGLU(False, experts.swiglu_alpha, experts.swiglu_limit, 1.0),
    "OpenAIPrivacyFilterExperts._apply_gate": lambda experts: SwiGLU(False, experts.alpha, experts.limit, 1.0),
}
"""Function of transformers -> the form that its module's attributes describe; None where its `act_fn` is no SiLU."""


def form_of(experts: Any) -> SwiGLU | None:
    """The activation of an experts module of transformers; None to call its own function."""
    function = getattr(getattr(experts, "_apply_gate", None), "__func__", None)
    declared = DECLARED.get(getattr(function, "__qualname__", ""))
    if function is None or declared is None or not function.__module__.startswith("transformers."):
        return None
    try:
        form = declared(experts)
        return form if form is not None and _agrees(experts, form) else None
    except Exception:  # whatever this version's module lacks or raises
        return None


def _agrees(experts: Any, form: SwiGLU) -> bool:
    """Whether the module's function has the form's values and gradients on pairs of numbers, in fp64."""
    bound = 7.0 if form.limit is None else form.limit
    edges = [bound, bound * (1 + 2**-7), bound * (1 - 2**-8)]
    numbers = [*edges, *(-edge for edge in edges), 0.0, 0.5, -1.25, 3.0, -4.0, 25.0, -25.0, 300.0, -300.0, float("nan")]
    with torch.inference_mode(False), torch.enable_grad():
        values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        pairs = torch.cartesian_prod(values, values).requires_grad_()  # [.., 2]: the same in either layout
        outcomes = []
        for function in (experts._apply_gate, lambda gate_up: _act(gate_up, form)):
            out = function(pairs)
            outcomes.append((out.detach(), *torch.autograd.grad(out.sum(), pairs)))
    return all(
        torch.allclose(theirs.double(), ours, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
        for theirs, ours in zip(*outcomes, strict=True)
    )


def _act(gate_up: Tensor, form: SwiGLU) -> Tensor:
    gate, up = gate_up[:, :1], gate_up[:, 1:]
    if form.limit is not None:
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    return (up + form.offset) * (gate * torch.sigmoid(form.alpha * gate))
