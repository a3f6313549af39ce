"""The tensors of a call: operands as it has them, and what its caller counts on of them and of the results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxref.verification.arithmetic.tensor_bytes import bytes_of, hold_the_same, share_elements
from mxref.verification.candidates.answer import OPERAND_OF, UnusableAnswerError
from mxref.verification.cases.call import Call
from mxref.verification.cases.case import Sample
from mxref.weights import MXWeights

_ACTIVATIONS = ("inputs", "gates", "sorted_expert_idxs", "sorted_scattered_idxs", "expert_offsets")
"""Operands that a model computes; what it holds is made outside of inference_mode."""


def operands_of(sample: Sample, copy: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The operands by name as the case's call has them, and the leaves among them by the name of their gradient."""
    call, problem = sample.case.call, sample.problem
    tensors = {name: x for name, x in problem.arguments().items() if isinstance(x, Tensor)}
    operands: dict[str, Any] = {name: x.detach() if copy else x for name, x in tensors.items()}
    made_there = _ACTIVATIONS if copy and call.mode == "inference" else ()
    if copy:
        operands = {name: call.lay_out(name, x) for name, x in operands.items()}
        operands |= _packed(problem.expert_weights, call)
        with torch.inference_mode(bool(made_there)):
            operands |= {name: call.lay_out(name, tensors[name]) for name in made_there if name in tensors}
    needed = {tensor: name for tensor, name in required(sample).items() if name not in made_there}
    leaves = {name: _owned(operands[name], name, call.owner) for name in needed.values()}
    computed = call.owner == "computed"
    operands |= {name: leaf.view_as(leaf) if computed else leaf for name, leaf in leaves.items()}
    return operands, {tensor: leaves[name] for tensor, name in needed.items() if call.wants(tensor)}


def required(sample: Sample) -> dict[str, str]:
    """The operands that require a gradient, by the name of that."""
    given = sample.problem.arguments()
    return {t: n for t, n in OPERAND_OF.items() if isinstance(given.get(n), Tensor) and sample.case.call.requires(t)}


def _packed(weights: Tensor | MXWeights, call: Call) -> dict[str, MXWeights]:
    """Packed weights whose bytes and scales lie as a call has them: contiguous, wherever they begin."""
    if not isinstance(weights, MXWeights):
        return {}
    if (call.weights, call.storage) == ("contiguous", "its own"):
        return {"expert_weights": replace(weights)}  # an object of its own, which nobody keeps
    packed, scales = call.lay_out("packed", weights.packed), call.lay_out("scales", weights.scales)
    return {"expert_weights": replace(weights, packed=packed, scales=scales)}


def _owned(operand: Tensor, name: str, owner: str) -> Tensor:
    """A leaf of the graph: the operand itself, or a parameter."""
    if owner == "parameter" and name not in ("inputs", "gates") and not isinstance(operand, torch.nn.Parameter):
        return torch.nn.Parameter(operand)
    return operand.requires_grad_()


@contextmanager
def left_as_they_are(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Raises an UnusableAnswerError if what is called within does something to an operand."""
    held = _held(arguments)  # alive, so that no other tensor has one's id
    given = {name: _looks(name, x) for name, x in held.items()}
    yield
    for name, x in _held(arguments).items():
        for told, now in _looks(name, x).items():
            if now != given[name][told]:
                raise UnusableAnswerError(f"{told}; expected every operand unchanged")


def _held(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call."""
    weights = arguments.get("expert_weights")
    packed = {"packed": weights.packed, "scales": weights.scales} if isinstance(weights, MXWeights) else {}
    return {name: x for name, x in {**arguments, **packed}.items() if isinstance(x, Tensor)}


def _looks(name: str, x: Tensor) -> dict[str, object]:
    """What a call leaves as it is of an operand, by what is told of one that does not."""
    counted = not x.is_inference() and name != "expert_weights"  # dense ones change where they become a module's
    return {
        f"puts another tensor in the place of {name}": id(x),
        f"changes {name} in place": x._version if counted else 0,
        f"sets {name}.requires_grad": x.requires_grad,
        f"gives {name} other memory or strides": (x.data_ptr(), x.stride()),
        f"changes {name}.grad": (id(x.grad), x.grad._version) if x.is_leaf and x.grad is not None else None,
    }


def versions(*tensors: Tensor) -> list[int]:
    """How often each was changed in place, as far as autograd counts it."""
    return [0 if x.is_inference() else x._version for x in tensors]


def check_unchanged(sample: Sample, operands: Mapping[str, Any]) -> None:
    """Raise an UnusableAnswerError if a copy of an operand is not what the sample has any more."""

    def held(name: str, x: Tensor) -> Tensor:
        weights = operands.get("expert_weights")
        copy = getattr(weights, name, None) if name in ("packed", "scales") else operands.get(name)
        if isinstance(copy, Tensor) and not hold_the_same(copy.detach(), x):
            raise UnusableAnswerError(f"changes {name} in place; expected every operand unchanged")
        return x

    sample.mapped(held)


def check_apart(results: Mapping[str, Tensor | None], others: Mapping[str, Any]) -> None:
    """Raise an UnusableAnswerError if a result shares elements with anything else, so that changing one changes both.

    `others`: an operand, or another tensor that a caller holds, by name.
    """
    held = {name: x for name, x in others.items() if isinstance(x, Tensor)}
    for name, x in results.items():
        for other, its in held.items():
            if x is not None and share_elements(x, its):
                raise UnusableAnswerError(f"{name} shares memory with {other}; expected a tensor of its own")
        if x is not None:
            held[name] = x


def repeats(x: Tensor) -> bool:
    """Whether a tensor has rows or columns in memory once."""
    return x.numel() > 0 and any(size > 1 and not stride for size, stride in zip(x.shape, x.stride(), strict=True))


def check_settled(outputs: Mapping[str, Tensor | None]) -> None:
    """Outputs are complete for whoever uses them on the caller's stream.

    Copies that this stream makes right away are held against the outputs once all of the GPU's work is done.

    Raises:
        UnusableAnswerError: an output changed in between, as when another stream still computes it.
    """
    here = {name: x for name, x in outputs.items() if x is not None and x.numel() and x.device.type == "cuda"}
    if not here:
        return
    copies = {name: x.clone() for name, x in here.items()}
    torch.cuda.synchronize()
    for name, x in here.items():
        if not torch.equal(bytes_of(copies[name]), bytes_of(x)):
            raise UnusableAnswerError(
                f"{name} changed after the call had returned: it is computed on another stream, for which the caller's "
                "stream does not wait"
            )
