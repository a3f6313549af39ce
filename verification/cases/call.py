"""How a caller calls: what leaves the mathematics alone and yet reaches other code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Layout = Literal[
    "contiguous", "transposed", "sliced", "padded", "offset", "apart", "expanded", "one column", "one number"
]  # fmt: skip
REPEATED: tuple[Layout, ...] = ("expanded", "one column", "one number")
"""Those that have rows, columns or elements in memory once."""
Mode = Literal["grad", "no_grad", "inference"]
Context = Literal["plain", "autocast", "deterministic", "checkpoint", "saved elsewhere", "bf16 by default"]
Owner = Literal["leaf", "parameter", "computed"]
Arguments = Literal["spelled out", "defaults left out"]
Backward = Literal["at once", "one by one", "create_graph"]


@dataclass(frozen=True)
class Call:
    """One way to call.

    Attributes:
        x, adapters, others, weights, indices, dOut: how an operand lies in memory, see `lay_out`; `adapters` are lora_A
            and lora_B, `others` the biases and gates (expanded: a token's slots share one), `weights` dense ones or
            packed bytes and scales, `indices` the routing tensors, `dOut` the incoming gradient.
        index: dtype of the routing tensors; `positions`, `offsets`: of sorted_scattered_idxs and of expert_offsets,
            where it is another one.
        owner: what needs a gradient is a leaf of the graph, an nn.Parameter (x and gates: a leaf), or the result of
            something else.
        arguments: every keyword is given, or those that hold their defaults are left out.
        needs: gradients that are asked for, of "dX", "dA", "dB", "dbias", "dgates"; None for all that can be.
        mode: under which gradient mode the forward pass runs; no gradient is asked for but in "grad".
        backward: the gradients are asked for at once; one after the other, over a retained graph, as pipelines do that
            put off a weight's gradient; or with `create_graph`.
        context: what else is active around the forward pass: autocast, deterministic algorithms, a checkpointed
            region, which runs it again in the backward pass, hooks that give the backward pass copies of what was
            saved, or another default dtype.
    """

    x: Layout = "contiguous"
    adapters: Layout = "contiguous"
    others: Layout = "contiguous"
    weights: Layout = "contiguous"
    indices: Layout = "contiguous"
    dOut: Layout = "contiguous"
    index: torch.dtype = torch.int64
    positions: torch.dtype | None = None
    offsets: torch.dtype | None = None
    owner: Owner = "leaf"
    arguments: Arguments = "spelled out"
    needs: tuple[str, ...] | None = None
    mode: Mode = "grad"
    backward: Backward = "at once"
    context: Context = "plain"

    def layout(self, operand: str) -> Layout:
        """Of an operand by its name in `Problem`, or "grad_out"."""
        named: dict[str, Layout] = {
            "inputs": self.x, "lora_A": self.adapters, "lora_B": self.adapters, "expert_biases": self.others,
            "gates": "one column" if self.others == "expanded" else self.others, "expert_weights": self.weights,
            "sorted_expert_idxs": self.indices, "sorted_scattered_idxs": self.indices, "expert_offsets": self.indices,
            "grad_out": self.dOut,
        }  # fmt: skip
        return named.get(operand, "contiguous")

    def wants(self, gradient: str) -> bool:
        """Whether a gradient is asked for, given that its operand is there."""
        return self.mode == "grad" and self.requires(gradient)

    def requires(self, gradient: str) -> bool:
        """Whether its operand requires a gradient, which it also does where the mode records none."""
        return self.needs is None or gradient in self.needs

    @contextmanager
    def surroundings(self, device_type: str) -> Iterator[None]:
        """The gradient mode and the context of the forward pass, but for checkpointing."""
        modes: dict[Mode, Any] = {
            "grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode
        }  # fmt: skip
        with modes[self.mode](), _CONTEXTS.get(self.context, _plain)(device_type):
            yield

    @contextmanager
    def around_backward(self, device_type: str) -> Iterator[None]:
        """What of the context is global state, which holds in the backward pass too."""
        with _CONTEXTS[self.context](device_type) if self.context in _GLOBAL else nullcontext():
            yield


def _plain(device_type: str) -> AbstractContextManager[object]:
    return nullcontext()


@contextmanager
def _deterministic(device_type: str) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _default_dtype(device_type: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_CONTEXTS: dict[Context, Callable[[str], AbstractContextManager[object]]] = {
    "autocast": lambda device_type: torch.autocast(device_type, torch.bfloat16),
    "deterministic": _deterministic,
    "saved elsewhere": lambda device_type: torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda copy: copy),
    "bf16 by default": _default_dtype,
}
"""All but checkpointing; each puts back only what it changed, for what a candidate leaves changed is to be seen."""


_GLOBAL: tuple[Context, ...] = ("deterministic", "bf16 by default")


def lay_out(x: Tensor, layout: Layout) -> Tensor:
    """The same values in fresh memory that lies otherwise.

    transposed: the last two dimensions are exchanged in memory.  sliced: every second column of a wider tensor.
    padded: the first columns of a wider tensor.  offset: 13 elements behind the start of a larger buffer.  apart: every
    second row (of three dimensions: matrix) of a taller one, from its second on.  expanded: one row or matrix, repeated
    with stride 0; one column, and one number, likewise. What is repeated must be equal.

    Memory in between holds NaN, or 0 of integers. Whatever has no element stays as it is; so does whatever has one
    dimension, unless it is sliced or offset.
    """
    if layout == "contiguous" or not x.numel() or (x.ndim < 2 and layout not in ("sliced", "offset")):
        return x.clone(memory_format=torch.contiguous_format)
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "expanded":
        return x[:1].clone().expand(x.shape)
    if layout in ("one column", "one number"):
        return x[: 1 if layout == "one number" else None, :1].clone().expand(x.shape)
    nothing = float("nan") if x.is_floating_point() else 0
    if layout == "offset":
        buffer = x.new_full((x.numel() + 13,), nothing)
        inside = buffer[13:].view(x.shape)
    elif layout == "padded":
        inside = x.new_full((*x.shape[:-1], x.shape[-1] + 5), nothing)[..., :-5]
    elif layout == "apart":
        inside = x.new_full((2 * x.shape[0], *x.shape[1:]), nothing)[1::2]
    else:
        inside = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), nothing)[..., ::2]
    return inside.copy_(x)
