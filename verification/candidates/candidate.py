"""A candidate: a differentiable callable with the signature of `parallel_linear_lora`, and what it declares.

A callable declares by optional attributes; `--points`, `--accumulation` and `--covers` do it for the callable:

    callable.mxref_points = ("z-unrounded",)        # from POINTS; absent: the contract's own rounding points
    callable.mxref_accumulation = "fp32-blocks-32"  # from ACCUMULATIONS, or an Accumulation; absent: the device's
                                                    # default, and an order-free second chance that counts as weak
    callable.mxref_decode = my_decode               # (MXWeights, dtype) -> [E, N, K], if it decodes outside the product
    callable.mxref_configs = my_configs             # dtype -> every value of its keyword `config` that it may choose
    callable.mxref_covers = "forward, gates=none"   # the part of the domain that it supports, see `cases.subset`
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mxref.problem import Problem
from mxref.scattermoe import RoundingPoints
from mxref.verification.arithmetic.accumulation import Accumulation, declared_points
from mxref.verification.arithmetic.tensor_bytes import hold_the_same
from mxref.verification.candidates.answer import OPERAND_OF, UnusableAnswerError
from mxref.verification.candidates.backward import BACKWARDS
from mxref.verification.candidates.global_state import modes_unchanged
from mxref.verification.candidates.operands import (
    check_apart,
    check_settled,
    check_unchanged,
    left_as_they_are,
    operands_of,
    repeats,
    required,
    versions,
)
from mxref.verification.cases.call import in_another_thread
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.subset import Subset
from mxref.weights import MXLayout, MXWeights


@dataclass(frozen=True)
class Candidate:
    """One implementation under judgement.

    Attributes:
        name: what reports call it.
        call: a callable with the signature of `parallel_linear_lora`.
        declared_points: names from POINTS; empty for the contract's own rounding points.
        accumulation: how its fp32 sums run, or None when undeclared.
        decode: its own MXFP4 decode, judged bit by bit; None when it has none.
        configs: every configuration that its dispatch can reach for an activation dtype; the keyword `config` pins one.
        operators: a module with this project's public operators, which is held to its further promises too, see
            `checks.registry`. None for all others.
        covers: the part of the domain that it declares to support; all of it when empty.
    """

    name: str
    call: Callable[..., Any]
    declared_points: tuple[str, ...] = ()
    accumulation: Accumulation | None = None
    decode: Callable[[MXWeights, torch.dtype], Tensor] | None = None
    configs: Callable[[torch.dtype], Sequence[Any]] | None = None
    operators: ModuleType | None = None
    covers: Subset = field(default_factory=Subset)

    def points(self, dtype: torch.dtype) -> RoundingPoints:
        """The declared rounding points for one activation dtype."""
        return declared_points(self.declared_points, dtype)

    def pinned(self, config: object) -> Candidate:
        """This candidate held to one of its `configs`, whatever the batch."""
        return replace(self, call=partial(self.call, config=config))

    def configs_for(self, sample: Sample) -> list[Any]:
        """Its `configs` that take a sample's weights: those without an attribute `layout`, or with the weights' own."""
        assert self.configs is not None
        layout = getattr(sample.problem.expert_weights, "layout", MXLayout.FWD)
        reads = (None, layout if isinstance(layout, MXLayout) else MXLayout.FWD)
        return [each for each in self.configs(sample.problem.dtype) if getattr(each, "layout", None) in reads]

    def run(self, sample: Sample) -> dict[str, Tensor | None]:
        """One forward and one backward pass on copies of the sample's operands.

        Returns:
            "Y" and, of "dX", "dA", "dB", "dbias", "dgates", those that the case asks for; None for a gradient that
            autograd does not reach.

        Raises:
            NotCovered: the candidate declines this call.
            UnusableAnswerError: no caller could go on with the answer, or the candidate changed what is not its own.
            Exception: whatever else the candidate raises.
        """
        operands, leaves = operands_of(sample, copy=True)
        y = self._forward(sample, operands)
        if leaves and sample.case.call.output == "dropped":
            operands, y = {}, y * 1
        outputs = self._backward(sample, y, leaves)
        check_unchanged(sample, operands)
        return outputs

    def _backward(self, sample: Sample, y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """Y and the gradients, where the caller may overwrite Y in between."""
        if not leaves or sample.case.call.output != "overwritten":
            return {"Y": y.detach(), **self.gradients(sample, y, leaves)}
        kept = y.detach().clone()
        try:
            y.detach().fill_(float("nan"))
            return {"Y": kept, **self.gradients(sample, y, leaves)}
        except RuntimeError:  # what autograd has saved of it may not change, and says so
            return self.run(sample.called(output="kept"))

    def trace(self, sample: Sample, copy: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """The forward pass alone: the output, and the leaves of its graph by the name of their gradient.

        Operands are copies, laid out as the case's call has them; `copy=False` hands over the tensors themselves, which
        from then on require a gradient. Raises what `run` does.
        """
        operands, leaves = operands_of(sample, copy)
        return self._forward(sample, operands), leaves

    def _forward(self, sample: Sample, operands: dict[str, Any]) -> Tensor:
        call, problem = sample.case.call, sample.problem
        arguments = self._accepted(replace(problem, **operands).arguments(), sample.case)

        def forward() -> Any:
            with call.surroundings(problem.device.type), modes_unchanged("forward pass"):
                if call.saved == "checkpoint":
                    return checkpointed(partial(self.call, **arguments))
                if call.saved == "reentrant checkpoint":
                    return _checkpoint_reentrantly(self.call, arguments)
                return self.call(**arguments)

        with left_as_they_are(arguments):
            y = in_another_thread(forward) if call.threads == "another" else forward()
        self._check_output(y, sample)
        check_apart({"Y": y}, operands)
        return y  # type: ignore[no-any-return]

    def gradients(
        self, sample: Sample, y: Tensor, leaves: dict[str, Tensor], retain_graph: bool = False, copy: bool = True
    ) -> dict[str, Tensor | None]:
        """The backward pass of `trace`; empty where no gradient is asked for.

        dOut is a copy, laid out as the case's call has it, unless `copy=False`. Raises what `run` does.
        """
        if not leaves:
            return {}
        if not y.requires_grad:
            operands = ", ".join(OPERAND_OF[tensor] for tensor in leaves)
            raise UnusableAnswerError(
                f"Y does not require grad, though gradients of {operands} are asked for: it was detached, or computed "
                "where autograd does not look. Without a backward pass declare `--covers forward`"
            )
        call, incoming = sample.case.call, sample.grad_out.to(y.dtype)
        incoming = call.lay_out("grad_out", incoming) if copy else incoming
        held = {tensor: leaf.grad for tensor, leaf in leaves.items() if leaf.is_leaf}
        given, arrived = versions(incoming, *leaves.values()), incoming.detach().clone()

        def backward() -> dict[str, Tensor | None]:
            with call.around_backward(sample.problem.device.type), modes_unchanged("backward pass"):
                return BACKWARDS[call.backward](y, leaves, incoming, retain_graph)

        found = in_another_thread(backward) if call.threads == "another in backward" else backward()
        for tensor, x in found.items():
            if x is not None and x.requires_grad and call.backward != "create_graph":
                raise UnusableAnswerError(f"{tensor} has a graph of its own, though no second derivative is asked for")
            if x is not None and repeats(x):
                raise UnusableAnswerError(f"returned {tensor} with rows or columns that share memory with each other")
        named = {tensor: None if x is None else x.detach() for tensor, x in found.items()}
        check_apart(named, {"dOut": incoming, "Y": y, **{OPERAND_OF[tensor]: leaf for tensor, leaf in leaves.items()}})
        same = incoming.is_meta or hold_the_same(incoming, arrived)
        if not same or versions(incoming, *leaves.values()) != given:
            raise UnusableAnswerError("its backward pass changes dOut or an operand in place; expected both unchanged")
        for tensor, grad in held.items():
            if leaves[tensor].grad is not grad:
                raise UnusableAnswerError(
                    f"its backward pass sets {OPERAND_OF[tensor]}.grad itself; expected its gradient to be returned, "
                    "which autograd adds to what is there"
                )
        check_settled(named)
        return named

    def _check_output(self, y: Any, sample: Sample) -> None:
        """Raise an UnusableAnswerError if Y is not the tensor that the signature promises."""
        problem, mode = sample.problem, sample.case.call.mode
        if not isinstance(y, Tensor):
            raise UnusableAnswerError(f"returned {type(y).__name__}; expected one tensor")
        if y.layout is not torch.strided or y.device != problem.device:
            raise UnusableAnswerError(f"returned a {y.layout} tensor on {y.device}; expected one on {problem.device}")
        if y.shape != sample.grad_out.shape:
            raise UnusableAnswerError(f"Y has shape {tuple(y.shape)}; expected {tuple(sample.grad_out.shape)}")
        if y.dtype != problem.dtype and not (self.operators and problem.device.type == "cpu"):
            raise UnusableAnswerError(f"returned {y.dtype}; expected {problem.dtype}, that of inputs")
        check_settled({"Y": y.detach()})
        if mode != "grad" and y.requires_grad:
            raise UnusableAnswerError(f"returned an output that requires a gradient, under {mode}")
        if y.requires_grad and not any(required(sample)):
            raise UnusableAnswerError("returned an output that requires a gradient, though no operand does")
        if mode != "inference" and y.is_inference():
            raise UnusableAnswerError("returned an inference tensor outside inference_mode, which no graph can save")
        if repeats(y):
            raise UnusableAnswerError("returned rows or columns that share memory with each other")

    def _accepted(self, arguments: dict[str, Any], case: Case) -> dict[str, Any]:
        """The call's keywords. Those that the callable lacks are left out where they hold their defaults."""
        flags = case.flags()
        defaults = {field.name: field.default for field in fields(Problem)} | dict.fromkeys(flags, False)
        if case.call.arguments == "defaults left out":
            given = arguments | flags
            arguments = {n: x for n, x in given.items() if isinstance(x, Tensor) or x != defaults[n]}
            flags = {}
        try:
            parameters = inspect.signature(self.call).parameters.values()
        except (TypeError, ValueError):  # builtins and some extension types have no signature
            return arguments
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            return arguments | flags
        arguments, known = arguments | flags, [p.name for p in parameters]
        for name in [name for name in arguments if name not in known]:
            value = arguments.pop(name)
            if isinstance(value, Tensor) or value != defaults[name]:
                raise UnusableAnswerError(_lacks(name, [one for one in known if one not in (defaults | flags)]))
        return arguments


def checkpointed(function: Callable[[], Any]) -> Any:
    """A region whose first run raises nothing, but what it would have raised is: torch before 2.13 leaves its hooks."""
    again, errors = False, list[BaseException]()

    def region() -> Any:
        nonlocal again
        if again:
            return function()
        again = True
        try:
            return function()
        except BaseException as error:
            errors.append(error)

    y = checkpoint(region, use_reentrant=False)
    if errors:
        raise errors.pop()
    return y


def _checkpoint_reentrantly(layer: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What requires a gradient is handed to the region one by one."""
    names = [name for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad]

    def region(*given: Tensor) -> Any:
        return layer(**arguments | dict(zip(names, given, strict=True)))

    return checkpoint(region, *(arguments[name] for name in names), use_reentrant=True)


def _lacks(name: str, others: Sequence[str]) -> str:
    """What to say of a keyword that a callable lacks; `others`: its parameters that the signature does not have."""
    near = get_close_matches(name, others, n=1)
    hint = f"; the nearest that it has is {near[0]!r}" if near else ""
    return f"takes no argument {name!r}{hint}. Calls that need it can be left out by `--covers`"
