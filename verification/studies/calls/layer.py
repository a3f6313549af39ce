"""An honest layer in plain PyTorch whose parts can be replaced, one a planted bug; and what such a bug is as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mxref import scattermoe
from mxref.problem import Problem
from mxref.scattermoe import RoundingPoints
from mxref.verification.candidates.answer import OPERAND_OF
from mxref.weights import MXWeights

__all__ = ["Bug", "Gradients", "Layer", "bug", "save", "saved"]

Gradients = dict[str, Tensor | None]
"""By "dX", "dA", "dB", "dbias", "dgates"; None where the operand is absent."""


class Layer:
    """The contract's arithmetic as one autograd function; a bug overrides what its author got wrong.

    Attributes:
        unsaved: names of tensors that are kept for backward as plain attributes, so that a change in place between the
            passes goes unnoticed.
    """

    unsaved: tuple[str, ...] = ()

    def __call__(self, *, use_fused_dX: bool = False, use_fused_gather: bool = False, **operands: Any) -> Tensor:
        """The keywords of `mxref.parallel_linear_lora`."""
        problem = Problem(**operands)
        problem.validate(check_values=False)
        return self.call(problem)

    def call(self, problem: Problem) -> Tensor:
        """One call, outside of autograd."""
        out: Tensor = _Pass.apply(self, problem, *(getattr(problem, name) for name in OPERAND_OF.values()))  # type: ignore[no-untyped-call]
        return out

    def read(self, problem: Problem) -> Problem:
        """The operands as both passes compute with them."""
        return problem

    def forward(self, problem: Problem) -> Tensor:
        """The output, in the activation dtype."""
        points = RoundingPoints.contract(problem.dtype)
        return scattermoe.forward(problem, points).out.value.to(problem.dtype)

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        """Gradients in their operands' dtypes; `needs`: which of them autograd asks for."""
        points = RoundingPoints.contract(problem.dtype)
        found = scattermoe.backward(problem, scattermoe.forward(problem, points), dOut, points)
        rounded = {"dX": found.dx, "dA": found.dA, "dB": found.dB, "dbias": found.dbias, "dgates": found.dgates}
        return {
            name: None if point is None else point.value.to(getattr(problem, OPERAND_OF[name]).dtype)
            for name, point in rounded.items()
        }


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, problem: Problem, *operands: Tensor | None) -> Tensor:
        named: dict[str, Any] = dict(zip(OPERAND_OF.values(), operands, strict=True))
        problem = replace(problem, **named)
        save(ctx, layer, problem)
        return layer.forward(layer.read(problem))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dOut: Tensor) -> tuple[Tensor | None, ...]:
        problem = saved(ctx)
        needs = dict(zip(OPERAND_OF, ctx.needs_input_grad[2:], strict=True))
        found = ctx.layer.backward(ctx.layer.read(problem), dOut, needs)
        return None, None, *(found[name] if needs[name] else None for name in OPERAND_OF)


def save(ctx: Any, layer: Layer, problem: Problem) -> None:
    """Save a problem for the backward pass, and who computes it."""
    tensors = _tensors_of(problem)
    ctx.layer, ctx.names = layer, [name for name in tensors if name not in layer.unsaved]
    ctx.save_for_backward(*(tensors[name] for name in ctx.names))
    ctx.unsaved = {name: tensors[name] for name in layer.unsaved if name in tensors}
    ctx.rest = {name: x for name, x in problem.arguments().items() if not isinstance(x, Tensor | MXWeights)}


def saved(ctx: Any) -> Problem:
    """The inverse of `save`."""
    return _problem_of(ctx.unsaved | dict(zip(ctx.names, ctx.saved_tensors, strict=True)), ctx.rest)


def _tensors_of(problem: Problem) -> dict[str, Tensor]:
    """Every tensor of a problem by name, packed weights as two."""
    weights = problem.expert_weights
    packed = {"packed": weights.packed, "scales": weights.scales} if isinstance(weights, MXWeights) else {}
    return packed | {name: x for name, x in problem.arguments().items() if isinstance(x, Tensor)}


def _problem_of(tensors: dict[str, Tensor], rest: dict[str, Any]) -> Problem:
    """The inverse of `_tensors_of`."""
    operands: dict[str, Any] = rest | tensors
    if "packed" in tensors:
        packed, scales = operands.pop("packed"), operands.pop("scales")
        operands["expert_weights"] = MXWeights(packed, scales, tensors["inputs"].shape[1], packed.shape[1])
    return Problem(**operands)


@dataclass(frozen=True)
class Bug:
    """One planted bug.

    Attributes:
        name: unique, in words.
        mistake: what a person does wrong.
        shown_by: (dimension, class) of the domain that show it together; empty where only sequences of calls, repeated
            calls or watched memory do.
        make: a fresh layer with it.
    """

    name: str
    mistake: str
    shown_by: tuple[tuple[str, str], ...]
    make: Callable[[], Callable[..., Tensor]]


def bug(name: str, mistake: str, **shown_by: str) -> Callable[[Callable[[], Layer]], Bug]:
    """Makes a bug of a layer; dimensions as keywords, an underscore for a blank, classes as they are called."""
    pairs = tuple((dimension.replace("_", " "), each) for dimension, each in shown_by.items())
    return lambda layer: Bug(name, mistake, pairs, layer)
