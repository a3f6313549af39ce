"""Bugs that show in what a caller's graph has beside a call, in tensors that are not plain ones, or once seldom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxref import scattermoe
from mxref.formats import MX_BLOCK_SIZE
from mxref.problem import Problem
from mxref.verification.arithmetic.accumulation import declared_points
from mxref.verification.studies.calls.layer import Gradients, Layer, bug, save, saved
from mxref.verification.studies.calls.seldom import turned, where, without_adapters
from mxref.verification.studies.calls.values import each, rows_of
from mxref.weights import MXWeights, decode_mxfp4

__all__: list[str] = []


@bug("dOut noted by a hook", "notes dOut in a hook of its own on Y, which runs before the caller's")
class Noted(Layer):
    """Another hook may change it."""

    def call(self, problem: Problem) -> Tensor:
        out = super().call(problem)
        if out.requires_grad:
            out.register_hook(self.note)  # type: ignore[no-untyped-call]
        return out

    def note(self, dOut: Tensor) -> None:
        self.dOut = dOut

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        return super().backward(problem, self.dOut.clone(), needs)


@bug("dX in a node of its own", "reads A for dX where nothing says that it does")
class Apart(Layer):
    """An optimiser may step as soon as dA is there."""

    def call(self, problem: Problem) -> Tensor:
        apart = _DX.apply(self, problem, problem.inputs)  # type: ignore[no-untyped-call]
        out: Tensor = super().call(replace(problem, inputs=problem.inputs.detach())) + apart
        return out


class _DX(torch.autograd.Function):
    """Zero, with a gradient for x."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, problem: Problem, x: Tensor) -> Tensor:
        save(ctx, layer, replace(problem, inputs=x, lora_A=None if problem.lora_A is None else problem.lora_A.detach()))
        P = problem.P if problem.gates is None else problem.gates.shape[0]
        N = problem.expert_weights.N if isinstance(problem.expert_weights, MXWeights) else problem.N
        return x.new_zeros(P, N)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dOut: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, Layer.backward(ctx.layer, saved(ctx), dOut, {})["dX"]


@bug("no gradient for Y", "takes dOut for a tensor without asking torch to make one of None")
class NotMaterialised(Layer):
    """Part of a loss may not see Y."""

    def call(self, problem: Problem) -> Tensor:
        out: Tensor = _NotMaterialised.apply(super().call(problem))  # type: ignore[no-untyped-call]
        return out


class _NotMaterialised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dOut: Tensor) -> Tensor:
        return dOut.clone()


@bug("anomaly mode without s", "checks its sums in anomaly mode, by another path")
class Anomalous(Layer):
    """The path is never taken otherwise."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        s = 1.0 if torch.is_anomaly_enabled() else problem.scaling
        return super().backward(replace(problem, scaling=s), dOut, needs)


@bug("no product in a recomputation", "leaves Y as it is where a checkpointed region runs again")
class Recomputed(Layer):
    """What follows in the region reads it."""

    def forward(self, problem: Problem) -> Tensor:
        out = super().forward(problem)
        return out if torch._C._current_graph_task_id() == -1 else torch.zeros_like(out)


def _by_storage(*names: str) -> Callable[[], Layer]:
    """A copy of what lies in a storage, of the last few, which are held: none has the address of another."""

    class ByStorage(Layer):
        def __init__(self) -> None:
            self.known: list[tuple[Tensor, int, Tensor]] = []

        def read(self, problem: Problem) -> Problem:
            found: dict[str, Any] = {}
            for name in names:
                x: Tensor | None = getattr(problem, name)
                if x is not None and not x.is_inference():
                    found[name] = self.copy_of(x).view(x.shape)
            return replace(problem, **found)

        def copy_of(self, x: Tensor) -> Tensor:
            for held, version, copy in self.known:
                same = held.dtype == x.dtype and held.numel() == x.numel() and version == x._version
                if same and held.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
                    return copy
            self.known = [*self.known[-3:], (x.detach(), x._version, x.detach().clone().contiguous())]
            return self.known[-1][-1]

    return ByStorage


_BY_STORAGE = "looks a copy up by where its operand's storage lies"

x_by_storage = bug("x known by its storage", _BY_STORAGE)(_by_storage("inputs"))
adapters_by_storage = bug("adapters known by their storage", _BY_STORAGE)(_by_storage("lora_A", "lora_B"))


negatives = bug("negatives taken for what memory holds", "reads the memory of x, whatever torch says of its sign")(
    each(lambda x, p: torch._neg_view(x) if x.is_neg() else x, "inputs")
)
plain_adapters = bug("adapters that are plain tensors", "takes whatever is no tensor or parameter for no adapter")(
    where(
        lambda p: p.lora_A is not None and type(p.lora_A) not in (Tensor, torch.nn.Parameter),
        without_adapters,
    )
)


@bug("blocks of zeros skipped", "takes 0 · ∞ for 0 in blocks without a nonzero")
class ZeroBlocks(Layer):
    """NaN is lost."""

    def forward(self, problem: Problem) -> Tensor:
        out, weights, x = super().forward(problem), problem.expert_weights, problem.inputs.detach()
        if not isinstance(weights, MXWeights) or not x.isinf().any():
            return out
        zero = (decode_mxfp4(weights, torch.float32)[..., :MX_BLOCK_SIZE] == 0).all(2).all(0)
        finite = super().forward(replace(problem, inputs=torch.where(x.isinf(), 0.0, x)))
        return torch.where(zero & out.isnan(), finite, out)


rows_in_fp16 = bug("rows counted in fp16", "numbers an expert's rows in the dtype of activations")(
    where(
        lambda p: p.dtype == torch.float16 and int(rows_of(p).max()) > 2048,
        turned("inputs"),
    )
)
finite_beside_rows = bug("infinite weights beside many rows", "decodes once for a tile of rows, by shifts",
                         weights="packed")(
    where(
        lambda p: isinstance(p.expert_weights, MXWeights) and p.P >= 16 * p.E,
        lambda p: {"expert_weights": replace(p.expert_weights, scales=p.expert_weights.scales.clamp(max=252))},  # type: ignore[type-var, union-attr]
    )
)  # fmt: skip


@bug("Z unrounded for one token", "has a kernel for one token, which keeps Z in fp32")
class OneToken(Layer):
    """One rounding point less."""

    def forward(self, problem: Problem) -> Tensor:
        if problem.inputs.shape[0] > 1:
            return super().forward(problem)
        points = declared_points(("z-unrounded",), problem.dtype)
        return scattermoe.forward(problem, points).out.value.to(problem.dtype)
