"""A candidate: a differentiable callable with the signature of `parallel_linear_lora`, and what it declares.

A callable declares by optional attributes (or the command line does the first two for it):

    callable.mxref_points = ("z-unrounded",)        # from POINTS; absent: the contract's own rounding points
    callable.mxref_accumulation = "fp32-blocks-32"  # from ACCUMULATIONS, or an Accumulation; absent: the device's
                                                    # default, and an order-free second chance that counts as weak
    callable.mxref_decode = my_decode               # (MXWeights, dtype) -> [E, N, K], if it decodes outside the product
    callable.mxref_configs = my_configs             # dtype -> every value of its keyword `config` that it may choose
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mxref.problem import Problem
from mxref.scattermoe import RoundingPoints
from mxref.verification.arithmetic.accumulation import Accumulation
from mxref.verification.arithmetic.rounding_points import declared_points
from mxref.verification.cases.call import lay_out
from mxref.verification.cases.case import Sample
from mxref.weights import MXWeights

__all__ = ["OPERAND_OF", "Candidate"]

OPERAND_OF = {"dX": "inputs", "dA": "lora_A", "dB": "lora_B", "dbias": "expert_biases", "dgates": "gates"}
"""Gradient -> operand."""


@dataclass(frozen=True)
class Candidate:
    """One implementation under judgement.

    Attributes:
        name: what reports call it.
        call: a callable with the signature of `parallel_linear_lora`; keywords it lacks count as not covered.
        declared_points: names from POINTS; empty for the contract's own rounding points.
        accumulation: how its fp32 sums run, or None when undeclared.
        decode: its own MXFP4 decode, (MXWeights, dtype) -> [E, N, K], judged bit by bit; None when it has none.
        complete: it claims every case, so that what it declines is a failure.
        configs: every configuration that its dispatch can reach for one activation dtype; the keyword `config` pins
            `call` to one. None when it has none, or offers no pin.
        operators: a module with this project's public operators, which is then held to this project's further promises
            too: see `checks.registry`. None for all others.
    """

    name: str
    call: Callable[..., Any]
    declared_points: tuple[str, ...] = ()
    accumulation: Accumulation | None = None
    decode: Callable[[MXWeights, torch.dtype], Tensor] | None = None
    complete: bool = False
    configs: Callable[[torch.dtype], Sequence[Any]] | None = None
    operators: ModuleType | None = None

    def points(self, dtype: torch.dtype) -> RoundingPoints:
        """The declared rounding points for one activation dtype."""
        return declared_points(self.declared_points, dtype)

    def pinned(self, config: object) -> Candidate:
        """This candidate held to one of its `configs`, whatever the batch."""
        return replace(self, call=partial(self.call, config=config))

    def run(self, sample: Sample) -> dict[str, Tensor | None]:
        """One forward and one backward pass on copies of the sample's operands.

        Returns:
            "Y" and, of "dX", "dA", "dB", "dbias", "dgates", those whose operand is there; None for a gradient that
            autograd does not reach. "Y" alone from a candidate that builds no graph, or whose backward raises
            NotImplementedError.

        Raises:
            NotImplementedError: the candidate does not cover this call.
            TypeError: the candidate returned something else than a dense tensor on the sample's device.
            Exception: whatever else the candidate raises.
        """
        y, leaves = self.trace(sample)
        return {"Y": y.detach(), **self.gradients(sample, y, leaves)}

    def trace(self, sample: Sample, copy: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """The forward pass alone: the output, and the leaves of its graph by the name of their gradient.

        Operands are copies, laid out as the case's call has them; `copy=False` hands them over where they lie.
        Raises what `run` does.
        """
        call, problem = sample.case.call, sample.problem
        tensors = {name: x for name, x in problem.arguments().items() if isinstance(x, Tensor)}
        operands: dict[str, Any] = {name: x.detach() for name, x in tensors.items()}
        if copy:
            operands = {name: lay_out(x, call.layout(name)) for name, x in operands.items()}
        wanted = {tensor: name for tensor, name in OPERAND_OF.items() if name in operands and call.wants(tensor)}
        leaves = {tensor: operands[name].requires_grad_() for tensor, name in wanted.items()}
        arguments = self._accepted(replace(problem, **operands).arguments(), sample.case.flags())
        with call.surroundings(problem.device.type):
            if call.context == "checkpoint":
                y = checkpoint(partial(self.call, **arguments), use_reentrant=False)
            else:
                y = self.call(**arguments)
        if not isinstance(y, Tensor):
            raise TypeError(f"{self.name} returned {type(y).__name__}; expected one tensor")
        if y.layout is not torch.strided or y.device != problem.device:
            raise TypeError(f"{self.name} returned a {y.layout} tensor on {y.device}; expected one on {problem.device}")
        if call.mode != "grad" and y.requires_grad:
            raise TypeError(f"{self.name} returned an output that requires a gradient, under {call.mode}")
        return y, leaves

    def gradients(
        self, sample: Sample, y: Tensor, leaves: dict[str, Tensor], retain_graph: bool = False
    ) -> dict[str, Tensor | None]:
        """The backward pass of `trace`; empty where there is none, or where it cannot be asked for."""
        if not leaves or not y.requires_grad or y.shape != sample.grad_out.shape:
            return {}
        incoming = lay_out(sample.grad_out.to(y.dtype), sample.case.call.dOut)
        try:
            gradients = torch.autograd.grad(
                y, list(leaves.values()), incoming, retain_graph=retain_graph, allow_unused=True
            )
        except NotImplementedError:
            return {}
        return dict(zip(leaves, gradients, strict=True))

    def _accepted(self, arguments: dict[str, Any], flags: dict[str, bool]) -> dict[str, Any]:
        """The call's keywords. Those that the callable lacks are left out, where that leaves the meaning alone."""
        try:
            parameters = inspect.signature(self.call).parameters.values()
        except (TypeError, ValueError):  # builtins and some extension types have no signature
            return arguments
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            return arguments | flags
        known = {p.name for p in parameters}
        defaults = {field.name: field.default for field in fields(Problem)}
        for name in [name for name in arguments if name not in known]:
            value = arguments.pop(name)
            if isinstance(value, Tensor) or value != defaults[name]:
                raise NotImplementedError(f"{self.name} takes no argument {name!r}")
        return arguments | {name: value for name, value in flags.items() if name in known}
