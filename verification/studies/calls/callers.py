"""Bugs that show by who calls: wider strides, who owns an operand, how gradients are asked for, surroundings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.verification.studies.calls.layer import Gradients, Layer, bug
from mxref.verification.studies.calls.layouts import as_if_contiguous
from mxref.verification.studies.calls.values import reading, rows_of
from mxref.weights import MXWeights

__all__: list[str] = []


def _operands(change: Callable[[Tensor], Tensor], *names: str) -> Callable[[], Layer]:
    """Some operands are read otherwise in both passes."""

    def changed(problem: Problem) -> dict[str, Tensor]:
        there = {name: getattr(problem, name) for name in names}
        return {name: change(x.detach()) for name, x in there.items() if isinstance(x, Tensor)}

    return reading(changed)


def _called(change: Callable[..., dict[str, Any]]) -> Callable[[], Layer]:
    """The keywords of the call are changed before autograd sees them."""

    class Called(Layer):
        def __call__(self, **operands: Any) -> Tensor:
            return super().__call__(**operands | change(**operands))

    return Called


def _wide(x: Tensor) -> Tensor:
    """Where columns are neighbours, the row stride is taken for the number of columns."""
    return as_if_contiguous(x) if x.ndim > 1 and x.stride(-1) == 1 else x


_PADDED = "tests for neighbouring columns, and takes the number of columns for the row stride"

x_padded = bug("rows of x taken as dense", _PADDED, layout_of_x="padded")(_operands(_wide, "inputs"))
A_padded = bug("rows of A taken as dense", _PADDED, layout_of_A="padded")(_operands(_wide, "lora_A"))
biases_padded = bug("rows of biases taken as dense", _PADDED, layout_of_biases="padded", biases="there")(
    _operands(_wide, "expert_biases")
)
weights_alike = bug(
    "experts that share memory",
    "reads a stride of 0 as a stride of a matrix",
    weights="dense",
    layout_of_weights="expanded",
)(_operands(lambda W: W.roll(1, 1) if W.ndim == 3 and W.stride(0) == 0 else W, "expert_weights"))
gates_alike = bug("gates that share memory", "reads them as if they lay one behind the other",
                  layout_of_gates="expanded", gates="positive", slots="two")(
    _operands(lambda g: g.roll(1, 0) if g.stride(1) == 0 else g, "gates")
)  # fmt: skip
gates_subnormal = bug("subnormal gates flushed", "has subnormals off", gates="subnormal in fp16", dtype="fp16")(
    _operands(lambda g: torch.where(g.abs() < 2.0**-14, 0.0, g), "gates")
)
B_nan = bug("NaN in B taken as padding", "cleans its tile of B", adapters="NaN in B")(
    _operands(lambda B: B.nan_to_num(0.0, float("inf"), -float("inf")), "lora_B")
)
biases_nan = bug("NaN in a bias dropped", "cleans biases", biases="one NaN")(
    _operands(lambda b: b.nan_to_num(0.0), "expert_biases")
)
offsets_wide = bug(
    "offsets of the width of positions", "takes one index dtype for all", indices="int32, offsets int64"
)(reading(lambda p: {"expert_offsets": _halved(p)} if p.expert_offsets.dtype != p.sorted_scattered_idxs.dtype else {}))
scaling_default = bug("s = 2 by default", "gives scaling a default of its own", arguments="defaults left out",
                      scaling="one")(
    _called(lambda scaling=2.0, **_: {"scaling": scaling})
)  # fmt: skip
quantised = bug("weights in the dtype that they came from", "decodes to orig_dtype", weights="packed, from fp32")(
    _called(lambda expert_weights, **_: {"expert_weights": _negated(expert_weights)})
)
leaf_A = bug("adapters that are no leaves taken as frozen", "asks is_leaf", operands="computed")(
    _called(lambda lora_A=None, **_: {"lora_A": lora_A if lora_A is None or lora_A.is_leaf else lora_A.detach()})
)
parameter_A = bug("parameters taken by their data", "unwraps nn.Parameter", operands="parameter")(
    _called(lambda lora_A=None, **_: {"lora_A": getattr(lora_A, "data", None)} if _is_parameter(lora_A) else {})
)
default_dtype = bug("sums in the default dtype", "makes a buffer without a dtype", default_dtype="bf16")(
    _operands(lambda x: x.to(torch.get_default_dtype()).to(x.dtype) * _usual(), "inputs")
)


def _usual() -> float:
    return 1.0 if torch.get_default_dtype() == torch.float32 else 1.125


def _halved(problem: Problem) -> Tensor:
    """Every second half of 64-bit offsets, read in 32 bits."""
    offsets = problem.expert_offsets
    return offsets.view(torch.int32)[: problem.E].to(offsets.dtype)


def _negated(weights: Any) -> Any:
    return replace(weights, packed=weights.packed ^ 0x88) if _from_fp32(weights) else weights


def _from_fp32(weights: Any) -> bool:
    return isinstance(weights, MXWeights) and weights.orig_dtype == torch.float32


def _is_parameter(x: Any) -> bool:
    return isinstance(x, torch.nn.Parameter)


def _backward(change: Callable[[Problem, Tensor, Mapping[str, bool], Gradients], Gradients]) -> Callable[[], Layer]:
    class Backward(Layer):
        def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
            found = super().backward(problem, dOut, needs)
            return found | change(problem, dOut, needs, found)

    return Backward


def _times(found: Gradients, name: str, factor: float) -> Gradients:
    x = found[name]
    return {} if x is None else {name: x * factor}


dOut_scalar = bug("dOut with equal columns", "takes any stride of 0 for a sum's gradient", layout_of_dOut="one column")(
    _backward(lambda p, dOut, needs, found: _times(found, "dX", 2.0) if _one_column(dOut) else {})
)
x_alike = bug("dX of rows that share memory", "adds their gradients up, which is autograd's", layout_of_x="expanded")(
    _backward(lambda p, dOut, needs, found: _times(found, "dX", len(p.inputs)) if p.inputs.stride(0) == 0 else {})
)
gates_only = bug("dgates without biases", "recomputes Y for gates alone, and forgets biases")(
    _backward(lambda p, dOut, needs, found: _times(found, "dgates", 2.0) if _alone("dgates", needs) else {})
)
row_a_slot = bug("g taken for k", "takes x's fan-out from the gates", gates="positive", fan_out="a row a slot",
                 slots="two")(
    _backward(lambda p, dOut, needs, found: {} if p.gates is None or p.grouped_in or p.k == p.gates.shape[1]
              else _times(found, "dX", 0.5))
)  # fmt: skip


def _one_column(dOut: Tensor) -> bool:
    return dOut.stride(1) == 0 and dOut.stride(0) != 0


def _alone(name: str, needs: Mapping[str, bool]) -> bool:
    return needs[name] and sum(needs.values()) == 1


gates_across = bug("dX of gates across tokens", "takes gates for those of a row's own slots", gates="across tokens",
                   slots="two", input_order="by token", fan_out="a row a token")(
    _backward(lambda p, dOut, needs, found: _times(found, "dX", 2.0) if p.gates is not None and p.gates.shape[1] % p.k
              else {})
)  # fmt: skip
autocast_backward = bug("autocast followed in backward", "leaves a product of its backward pass to autocast",
                        autocast="backward pass to fp16", dtype="fp32")(
    _backward(lambda p, dOut, needs, found: {"dX": _through_bf16(found["dX"])} if p.dtype == torch.float32
              and torch.is_autocast_enabled(dOut.device.type) else {})
)  # fmt: skip
zeros_shared = bug("one buffer of zeros", "gives all gradients that are zero the same memory", scaling="zero",
                   gradients="all")(
    _backward(lambda p, dOut, needs, found: _in_one_buffer(found, "dA", "dB") if p.scaling == 0 else {})
)  # fmt: skip
held_added = bug("what .grad holds added twice", "adds lora_A.grad to what it returns, which autograd does",
                 backward_pass="accumulated")(
    _backward(lambda p, dOut, needs, found: _plus_held(found["dA"], p.lora_A))
)  # fmt: skip


def _through_bf16(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.bfloat16).to(x.dtype)


def _in_one_buffer(found: Gradients, *names: str) -> Gradients:
    there = {name: x for name in names if (x := found[name]) is not None}
    if len({x.dtype for x in there.values()}) != 1 or any(x.count_nonzero() for x in there.values()):
        return {}
    zeros = torch.cat([x.flatten() for x in there.values()])
    return {name: zeros[: x.numel()].view(x.shape) for name, x in there.items()}


def _plus_held(dA: Tensor | None, A: Tensor | None) -> Gradients:
    return {} if dA is None or A is None or not A.is_leaf or A.grad is None else {"dA": dA + A.grad}


@bug("4,096 columns at most", "ends a loop over columns there")
class Columns(Layer):
    """The rest is zero."""

    def forward(self, problem: Problem) -> Tensor:
        """Y."""
        y = super().forward(problem)
        y[:, 4096:] = 0
        return y


@bug("dA in parts of 64 rows in 16 bits", "adds an expert's tiles up in the activations' dtype")
class Parts(Layer):
    """Rounded once more for each tile."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        """As often as the largest expert has tiles."""
        found = super().backward(problem, dOut, needs)
        dA = found["dA"]
        if dA is None or problem.dtype != torch.bfloat16 or int(rows_of(problem).max()) <= 64:
            return found
        third = dA.double() / 3
        return found | {"dA": (third.to(problem.dtype) * 3).to(dA.dtype)}


@bug("Z kept beyond fp16", "rounds Z's fraction, and keeps its exponent", adapters="Z beyond fp16", dtype="fp16")
class ZRange(Layer):
    """Infinite results that a Z of more than fp16's range would have left finite."""

    def forward(self, problem: Problem) -> Tensor:
        """Y, saturated."""
        return super().forward(problem).clamp(-65504, 65504)
