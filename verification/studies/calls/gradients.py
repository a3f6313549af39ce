"""Bugs of which operands need a gradient, of gradient modes and of what happens between the two passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.verification.studies.calls.layer import Gradients, Layer, bug


def _zero(found: Gradients, *names: str) -> Gradients:
    zeros = {name: None if (x := found[name]) is None else torch.zeros_like(x) for name in names}
    return found | zeros


def _zero_unless(needed: str, *names: str) -> Callable[[], Layer]:
    """Some gradients are computed only where another one is asked for."""

    class Unless(Layer):
        def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
            found = super().backward(problem, dOut, needs)
            return found if needs[needed] else _zero(found, *names)

    return Unless


dB_with_dA = bug("dB only with dA", "computes both adapters' gradients under one condition", gradients="dB alone")(
    _zero_unless("dA", "dB")
)
dA_with_dB = bug("dA only with dB", "computes both adapters' gradients under one condition", gradients="dA alone")(
    _zero_unless("dB", "dA")
)
dX_with_dA = bug("dX only with dA", "leaves backward early where adapters are frozen", gradients="dX alone")(
    _zero_unless("dA", "dX")
)
epilogue_with_dX = bug(
    "dbias and dgates only with dX", "leaves backward early where x needs no gradient", gradients="biases and gates"
)(_zero_unless("dX", "dbias", "dgates"))


@bug("frozen adapters taken as absent", "drops s·V·A from dX where B needs no gradient", gradients="dX alone")
class Frozen(Layer):
    """V is a by-product of dB there."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        if needs["dB"] or problem.lora_B is None:
            return found
        without = replace(problem, lora_A=None, lora_B=None)
        return found | {"dX": super().backward(without, dOut, needs)["dX"]}


@bug("output without a graph unless x needs one", "asks x alone whether gradients are needed", gradients="all but dX")
class Detached(Layer):
    """An output that autograd does not know."""

    def call(self, problem: Problem) -> Tensor:
        y = super().call(problem)
        return y if problem.inputs.requires_grad else y.detach()


@bug("no gradient for A", "returns None for what it takes as frozen where x is", gradients="dA alone")
class Nothing(Layer):
    """None in place of a gradient."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        return found if needs["dX"] else found | {"dA": None}


@bug("a backward pass that empties its buffers", "frees or overwrites in backward what a retained graph still needs")
class Emptied(Layer):
    """The second backward pass over a graph gives zeros."""

    def call(self, problem: Problem) -> Tensor:
        return _OncePerGraph()(**problem.arguments())


class _OncePerGraph(Layer):
    used = False

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        if self.used:
            return _zero(found, "dA", "dB")
        self.used = True
        return found


@bug("a gradient under no_grad", "marks its output by hand", gradient_mode="no_grad")
class Marked(Layer):
    """The output requires a gradient, whatever the mode."""

    def call(self, problem: Problem) -> Tensor:
        y = super().call(problem)
        return y if y.requires_grad or torch.is_inference_mode_enabled() else y.requires_grad_()


@bug("versions under inference_mode", "looks an operand's version up, which inference tensors lack",
     gradient_mode="inference")  # fmt: skip
class Version(Layer):
    """Raises in one mode."""

    def read(self, problem: Problem) -> Problem:
        y = problem.inputs * 1
        assert y._version >= 0
        return problem


@bug("saved tensors unpacked twice", "reads what autograd saved twice, which a checkpointed region refuses",
     saved_tensors="checkpoint")  # fmt: skip
class Unpacked(Layer):
    """An autograd function of its own around the rest."""

    def call(self, problem: Problem) -> Tensor:
        y: Tensor = _TwiceUnpacked.apply(super().call(problem), problem.inputs)  # type: ignore[no-untyped-call]
        return y


class _TwiceUnpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        [_], [_] = ctx.saved_tensors, ctx.saved_tensors
        return grad, None


@bug("a queue of saved activations", "pushes in forward and takes the oldest in backward", saved_tensors="checkpoint")
class Queue(Layer):
    """A checkpointed region pushes twice; passes in another order take what is another call's."""

    def __init__(self) -> None:
        self.queue: list[Problem] = []

    def forward(self, problem: Problem) -> Tensor:
        self.queue.append(problem)
        return super().forward(problem)

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        return super().backward(self.queue.pop(0) if self.queue else problem, dOut, needs)


@bug("autocast followed", "leaves a product of its own to autocast, which rounds to 16 bits", autocast="forward pass")
class Autocast(Layer):
    """The operands in autocast's dtype, for a function that should ignore it."""

    def call(self, problem: Problem) -> Tensor:
        if torch.is_autocast_enabled(problem.device.type) and problem.dtype == torch.float32:
            return super().call(problem).to(torch.bfloat16).float()
        return super().call(problem)


@bug("another path in deterministic mode", "forgets the biases where deterministic algorithms are asked for",
     algorithms="deterministic", biases="there")  # fmt: skip
class Deterministic(Layer):
    """A path that no test took."""

    def read(self, problem: Problem) -> Problem:
        biases = problem.expert_biases
        if biases is None or not torch.are_deterministic_algorithms_enabled():
            return problem
        return replace(problem, expert_biases=torch.zeros_like(biases))


@bug("fp32 gradients rounded to the activations' dtype", "stores dA in 16 bits and casts it to the parameter's dtype",
     parameters="fp32", dtype="bf16", values="ordinary")  # fmt: skip
class Narrow(Layer):
    """Half of the mantissa that an optimiser in fp32 expects."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        return found | {n: None if (x := found[n]) is None else x.to(problem.dtype).to(x.dtype) for n in ("dA", "dB")}


def _unsaved(*names: str) -> Callable[[], Layer]:
    class Unsaved(Layer):
        unsaved = names

    return Unsaved


_ON_CTX = "keeps an operand as an attribute of ctx, so that a change in place between the passes goes unnoticed"

adapters_unsaved = bug("A and B not saved as autograd saves", _ON_CTX)(_unsaved("lora_A", "lora_B"))
x_unsaved = bug("x not saved as autograd saves", _ON_CTX)(_unsaved("inputs"))
gates_unsaved = bug("gates not saved as autograd saves", _ON_CTX)(_unsaved("gates"))
packed_unsaved = bug("packed weights not saved as autograd saves", _ON_CTX)(_unsaved("packed", "scales"))
routing_unsaved = bug("routing not saved as autograd saves", _ON_CTX)(
    _unsaved("sorted_expert_idxs", "sorted_scattered_idxs", "expert_offsets")
)
