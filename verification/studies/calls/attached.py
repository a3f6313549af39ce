"""Bugs of what a call attaches to tensors or leaves behind: plans, modes, a requirement, results that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.verification.studies.calls.layer import Gradients, Layer, bug
from mxref.verification.studies.calls.memory import copied, leaving
from mxref.verification.studies.calls.seldom import turned, where
from mxref.weights import MXWeights

__all__: list[str] = []


_LEFT = "sets what it needs and leaves it"
_matmul = torch.backends.cuda.matmul
_onednn: Any = torch.backends.mkldnn

deterministic_off = bug("deterministic algorithms off", _LEFT, algorithms="deterministic")(
    leaving(lambda: torch.use_deterministic_algorithms(False))
)
autocast_off = bug("autocast off", _LEFT, autocast="forward pass")(
    leaving(lambda: [torch.set_autocast_enabled(each, False) for each in ("cpu", "cuda")])
)
fp32_by_default = bug("fp32 by default", _LEFT, default_dtype="bf16")(
    leaving(lambda: torch.set_default_dtype(torch.float32))
)
gradients_on = bug("gradients on", _LEFT, gradient_mode="no_grad")(leaving(lambda: torch.set_grad_enabled(True)))
sums_in_fp16 = bug("sums in fp16", _LEFT)(leaving(lambda: setattr(_matmul, "allow_fp16_accumulation", True)))
onednn_in_bf16 = bug("fp32 products of oneDNN in bf16", _LEFT)(
    leaving(lambda: setattr(_onednn.matmul, "fp32_precision", "bf16"))
)


@bug("a frozen A unfrozen", "has A require a gradient where another operand does", gradients="dX alone")
class Unfrozen(Layer):
    """A gets a gradient that nobody asked for."""

    def call(self, problem: Problem) -> Tensor:
        A = problem.lora_A
        if A is not None and A.is_leaf and problem.inputs.requires_grad and not A.is_inference():
            A.requires_grad_()
        return super().call(problem)


@bug("dA with a graph", "computes dA with gradients on and does not detach it")
class WithGraph(Layer):
    """Whoever adds such gradients up keeps every graph."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        return found | {"dA": None if found["dA"] is None else found["dA"].requires_grad_()}


def _planned(
    on: Callable[[Problem], Tensor], plan: Callable[[Problem], Any], follow: Callable[[Problem], Mapping[str, Any]]
) -> Callable[[], Layer]:
    """What was planned in the first call with a tensor is an attribute of it, and followed in later ones."""

    class Planned(Layer):
        def read(self, problem: Problem) -> Problem:
            tensor = on(problem)
            if not hasattr(tensor, "plan"):
                tensor.plan = plan(problem)  # type: ignore[attr-defined]
            own = tensor.plan  # type: ignore[attr-defined]
            return problem if own == plan(problem) else replace(problem, **follow(problem))

    return Planned


def _bytes(p: Problem) -> Tensor:
    return p.expert_weights.packed if isinstance(p.expert_weights, MXWeights) else p.expert_weights


_PLANNED = "plans a call once for a tensor that calls share"

plan_of_rank = bug("a plan's rank", _PLANNED)(_planned(_bytes, lambda p: p.rank, turned("lora_B")))
plan_of_dtype = bug("a plan's dtype", _PLANNED)(_planned(_bytes, lambda p: p.dtype, turned("inputs")))
plan_of_order = bug("a plan's order of Y", _PLANNED)(
    _planned(lambda p: p.sorted_scattered_idxs, lambda p: p.grouped_out, turned("inputs"))
)


@bug("a plan's gradients", _PLANNED)
class PlanOfGradients(Layer):
    """Parameters that train later than x have no gradient."""

    def call(self, problem: Problem) -> Tensor:
        A, tensor = problem.lora_A, _bytes(problem)
        trains = A is not None and A.requires_grad and torch.is_grad_enabled()
        if A is None or not torch.is_grad_enabled() or not (trains or problem.inputs.requires_grad):
            return super().call(problem)
        if not hasattr(tensor, "trains"):
            tensor.trains = trains  # type: ignore[attr-defined]
        stays = trains and not tensor.trains  # type: ignore[attr-defined]
        return super().call(replace(problem, lora_A=A * 0 + A.detach()) if stays else problem)


narrow_offsets = bug("offsets as wide as positions", "takes the second index tensor's dtype for both",
                     indices="int32, positions int64")(
    where(lambda p: p.sorted_scattered_idxs.element_size() > p.expert_offsets.element_size() and p.E > 1 and p.P > 0,
          turned("inputs"))
)  # fmt: skip


@bug("experts that are columns of one matrix", "reads dense weights by their first and last stride")
class SideBySide(Layer):
    """Experts that are columns of one matrix."""

    def read(self, problem: Problem) -> Problem:
        W = problem.expert_weights
        if isinstance(W, MXWeights) or min(W.shape) < 2 or W.is_contiguous() or not W.transpose(0, 1).is_contiguous():
            return problem
        return replace(problem, **turned("inputs")(problem))


@bug("inference tensors that never change", "keeps a copy of positions that no version counts")
class NeverChanging(Layer):
    """They do."""

    def __init__(self) -> None:
        self.known: list[tuple[Tensor, Tensor]] = []

    def read(self, problem: Problem) -> Problem:
        positions = problem.sorted_scattered_idxs
        if not positions.is_inference():
            return problem
        for held, copy in self.known:
            if held is positions:
                return replace(problem, sorted_scattered_idxs=copy)
        self.known = [*self.known[-3:], (positions, positions.clone())]
        return problem


@bug("weights known by their sum", "looks decoded weights up by a sum of their bytes")
class BySum(Layer):
    """Experts may change places."""

    def __init__(self) -> None:
        self.known: dict[Any, MXWeights] = {}

    def read(self, problem: Problem) -> Problem:
        W = problem.expert_weights
        if not isinstance(W, MXWeights):
            return problem
        key = W.packed.shape, int(W.packed.long().sum()), int(W.scales.long().sum())
        return replace(problem, expert_weights=self.known.setdefault(key, copied(W)))


@bug("zeros kept", "gives the same zeros wherever no row is an expert's")
class ZerosKept(Layer):
    """The caller writes to them."""

    def __init__(self) -> None:
        self.kept: dict[Any, Tensor] = {}

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        dA = found["dA"]
        if dA is None or int(problem.expert_offsets[-1]):
            return found
        return found | {"dA": self.kept.setdefault((dA.shape, dA.dtype, dA.device), dA)}


@bug("dbias is dOut", "returns the sum of one row without adding")
class OneRow(Layer):
    """Two tensors that are one."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        own = problem.P == 1 and problem.E == 1 and problem.gates is None and int(problem.expert_offsets[-1]) == 1
        return found | {"dbias": dOut} if own and found["dbias"] is not None else found


@bug("gates that are all zero", "returns early, where nothing comes through the gates")
class ClosedGates(Layer):
    """Their own gradients are not zero."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found, gates = super().backward(problem, dOut, needs), problem.gates
        if gates is None or not gates.numel() or bool(gates.any()) or found["dgates"] is None:
            return found
        return found | {"dgates": torch.zeros_like(found["dgates"])}


@bug("autocast to fp16 in the backward pass", "multiplies under whatever autocast there is",
     autocast="backward pass to fp16")  # fmt: skip
class AutocastBackward(Layer):
    """dX through fp16."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found, device = super().backward(problem, dOut, needs), dOut.device.type
        to_fp16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        dX = found["dX"]
        return found | {"dX": dX.half().to(dX.dtype)} if to_fp16 and dX is not None else found
