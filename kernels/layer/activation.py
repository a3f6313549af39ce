"""The gated activation for autograd and the compiler: differentiable once, and all that it keeps is gate_up.

    mxref::gated_activation            forward; opaque to the compiler, with a fake and an autograd registration
    mxref::gated_activation_backward   its gradient

The operators have the bits of the eager function; eager calls do not come to them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mxref.kernels.device.activation import activate, activate_backward
from mxref.kernels.device.launch import architecture, compute_dtype, passed_on
from mxref.kernels.layer.operands import operand
from mxref.swiglu import SwiGLU

__all__ = ["gated"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def gated(gate_up: Tensor, form: SwiGLU) -> Tensor:
    """H = R(act(gate_up)), see `mxref.activation`: computed in fp32, rounded once.

    Args:
        gate_up: bf16, fp16 or fp32 [P, 2I], any strides.
        form: which activation.

    Returns:
        [P, I] in the dtype of gate_up (fp32 under Triton's interpreter, where no rounding point applies).

    Raises:
        TypeError: gate_up has another dtype.
        ValueError: gate_up is no matrix with an even number of columns.
        RuntimeError: no kernel can run on its device.
    """
    form.check(gate_up)
    if gate_up.dtype not in _DTYPES:
        raise TypeError(f"gate_up is {gate_up.dtype}; expected one of {', '.join(map(str, _DTYPES))}")
    if gate_up.ndim != 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}; expected [P, 2I]")
    if passed_on(gate_up):
        return cast(Tensor, gated_activation(gate_up, form.interleaved, form.alpha, form.limit, form.offset))
    return cast(Tensor, _Gated.apply(gate_up, form))  # type: ignore[no-untyped-call]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, form: SwiGLU) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.form = form
        return _forward(gate_up, form)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        return _backward(gate_up, grad, ctx.form), None


@torch.library.custom_op("mxref::gated_activation", mutates_args=())
def gated_activation(gate_up: Tensor, interleaved: bool, alpha: float, limit: float | None, offset: float) -> Tensor:
    """H; the arguments behind gate_up are those of `SwiGLU`."""
    return _forward(gate_up, SwiGLU(interleaved, alpha, limit, offset))


@gated_activation.register_fake
def _(gate_up: Tensor, *form: Any) -> Tensor:
    P, columns = gate_up.shape
    return gate_up.new_empty(P, columns // 2, dtype=compute_dtype(gate_up.dtype))


@torch.library.custom_op("mxref::gated_activation_backward", mutates_args=())
def gated_activation_backward(
    gate_up: Tensor, grad: Tensor, interleaved: bool, alpha: float, limit: float | None, offset: float
) -> Tensor:
    """d(gate_up) in its own dtype."""
    return _backward(gate_up, grad, SwiGLU(interleaved, alpha, limit, offset))


@gated_activation_backward.register_fake
def _(gate_up: Tensor, grad: Tensor, *form: Any) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up, *ctx.form = inputs
    ctx.save_for_backward(gate_up)


def _operator_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (gate_up,) = ctx.saved_tensors
    return gated_activation_backward(gate_up, grad, *ctx.form), None, None, None, None


gated_activation.register_autograd(_operator_backward, setup_context=_setup)


def _forward(gate_up: Tensor, form: SwiGLU) -> Tensor:
    architecture(gate_up.device)
    rows = operand(gate_up)
    return activate(rows, form, rows.new_empty(rows.shape[0], rows.shape[1] // 2))


def _backward(gate_up: Tensor, grad: Tensor, form: SwiGLU) -> Tensor:
    rows = operand(gate_up)
    found = activate_backward(rows, operand(grad), form, rows.new_empty(rows.shape))
    return found.to(gate_up.dtype)
