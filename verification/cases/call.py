"""How a caller calls: what leaves the mathematics alone and yet reaches other code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Layout = Literal["contiguous", "transposed", "sliced", "offset", "expanded"]
Mode = Literal["grad", "no_grad", "inference"]
Context = Literal["plain", "autocast", "deterministic", "checkpoint"]


@dataclass(frozen=True)
class Call:
    """One way to call.

    Attributes:
        x, adapters, others, weights, dOut: how an operand lies in memory, see `lay_out`; `adapters` are lora_A and
            lora_B, `others` the biases and gates, `weights` dense ones, `dOut` the incoming gradient.
        index: dtype of the routing tensors.
        needs: gradients that are asked for, of "dX", "dA", "dB", "dbias", "dgates"; None for all that can be.
        mode: under which gradient mode the forward pass runs; no gradient is asked for but in "grad".
        context: what else is active around the forward pass: autocast, deterministic algorithms, or a checkpointed
            region, which runs it again in the backward pass.
    """

    x: Layout = "contiguous"
    adapters: Layout = "contiguous"
    others: Layout = "contiguous"
    weights: Layout = "contiguous"
    dOut: Layout = "contiguous"
    index: torch.dtype = torch.int64
    needs: tuple[str, ...] | None = None
    mode: Mode = "grad"
    context: Context = "plain"

    def layout(self, operand: str) -> Layout:
        """Of an operand by its name in `Problem`, or "grad_out"."""
        named: dict[str, Layout] = {
            "inputs": self.x, "lora_A": self.adapters, "lora_B": self.adapters, "expert_biases": self.others,
            "gates": self.others, "expert_weights": self.weights, "grad_out": self.dOut,
        }  # fmt: skip
        return named.get(operand, "contiguous")

    def wants(self, gradient: str) -> bool:
        """Whether a gradient is asked for, given that its operand is there."""
        return self.mode == "grad" and (self.needs is None or gradient in self.needs)

    @contextmanager
    def surroundings(self, device_type: str) -> Iterator[None]:
        """The gradient mode and the context of the forward pass, but for checkpointing."""
        modes: dict[Mode, Any] = {
            "grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode
        }  # fmt: skip
        autocast = torch.autocast(device_type, torch.bfloat16) if self.context == "autocast" else nullcontext()
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        with modes[self.mode](), autocast:
            try:
                if self.context == "deterministic":
                    torch.use_deterministic_algorithms(True, warn_only=True)
                yield
            finally:
                if self.context == "deterministic":  # otherwise it is the candidate's to leave alone
                    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def lay_out(x: Tensor, layout: Layout) -> Tensor:
    """The same values in fresh memory that lies otherwise.

    transposed: the last two dimensions are exchanged in memory.  sliced: every second column of a wider tensor.
    offset: 13 elements behind the start of a larger buffer.  expanded: one row, repeated with stride 0, which needs
    equal rows.  What has fewer than two dimensions, or no element, stays as it is.
    """
    if layout == "contiguous" or x.ndim < 2 or not x.numel():
        return x.clone(memory_format=torch.contiguous_format)
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "expanded":
        return x[:1].clone().expand(x.shape)
    if layout == "offset":
        buffer = x.new_full((x.numel() + 13,), float("nan"))
        inside = buffer[13:].view(x.shape)
    else:
        inside = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))[..., ::2]
    return inside.copy_(x)
