"""Bugs at boundaries: tiles and tails, both ends of a range, rows of zeros, operands that are not copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.verification.studies.calls.layer import Gradients, Layer, bug
from mxref.verification.studies.calls.values import reading
from mxref.weights import MXWeights, decode_mxfp4

_BF16, _FP16 = torch.bfloat16, torch.float16


def _finite(x: Tensor) -> Tensor:
    """What saturates where it should overflow."""
    return x.clamp(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max)


def _normal(x: Tensor) -> Tensor:
    """What flushes subnormals."""
    return torch.where(x.abs() < torch.finfo(x.dtype).smallest_normal, 0.0, x)


def _decoding(dtype: torch.dtype, change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Layer]:
    """Decodes in a way of its own for one dtype; `change`: of W and its scale bytes, both [E, N, K]."""

    def decoded(problem: Problem) -> dict[str, Tensor]:
        weights = problem.expert_weights
        if not isinstance(weights, MXWeights) or problem.dtype != dtype:
            return {}
        bytes_ = weights.scales.repeat_interleave(weights.block_size, -1)
        return {"expert_weights": change(decode_mxfp4(weights, dtype), bytes_).mT}

    return reading(decoded)


def _returning(change: Callable[[Tensor], Tensor], *names: str) -> Callable[[], Layer]:
    """Changes gradients on their way out."""

    class Returning(Layer):
        def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
            found = super().backward(problem, dOut, needs)
            return found | {name: change(x) for name in names if (x := found[name]) is not None}

    return Returning


byte_0 = bug("byte 0 as zero in bf16", "shifts the byte into a bf16's exponent, where 0 stands for a subnormal")(
    _decoding(_BF16, lambda W, bytes_: torch.where(bytes_ == 0, 0.0, W))
)
byte_254 = bug("the largest bytes without infinity in bf16", "adds exponents and clamps their sum")(
    _decoding(_BF16, lambda W, bytes_: torch.where(bytes_ < 255, _finite(W), W))
)
fp16_weights = bug("fp16 weights that saturate", "clamps decoded weights to what fp16 holds")(
    _decoding(_FP16, lambda W, bytes_: _finite(W))
)
fp16_small_weights = bug("small fp16 weights flushed", "shifts the byte into an fp16's exponent, without subnormals")(
    _decoding(_FP16, lambda W, bytes_: _normal(W))
)

_UNIT_OFF, _CLAMPED = "has subnormals off in one kernel", "clamps what it stores"

adapters_flushed = bug("subnormal gradients of adapters flushed", _UNIT_OFF)(_returning(_normal, "dA", "dB"))
biases_flushed = bug("subnormal gradients of biases flushed", _UNIT_OFF)(_returning(_normal, "dbias"))
gates_flushed = bug("subnormal gradients of gates flushed", _UNIT_OFF)(_returning(_normal, "dgates"))
adapters_saturate = bug("gradients of adapters that saturate", _CLAMPED)(_returning(_finite, "dA", "dB"))
biases_saturate = bug("gradients of biases that saturate", _CLAMPED)(_returning(_finite, "dbias"))
gates_saturate = bug("gradients of gates that saturate", _CLAMPED)(_returning(_finite, "dgates"))

gates_in_fp16 = bug("gates in fp16", "keeps gates in fp16, which holds what a softmax gives")(
    reading(lambda p: {} if p.gates is None else {"gates": p.gates.detach().half().to(p.gates.dtype)})
)
scaling_whole = bug("scaling as an int", "takes alpha // rank for alpha / rank", scaling="sixteen thirds")(
    reading(lambda p: {"scaling": float(int(p.scaling)) if abs(p.scaling) > 1 else p.scaling})
)
positions_narrow = bug("positions of the width of experts", "takes one index dtype for all",
                       indices="int64, others int32")(
    reading(lambda p: {"sorted_scattered_idxs": p.sorted_scattered_idxs.flip(0)}
            if p.sorted_scattered_idxs.dtype != p.sorted_expert_idxs.dtype else {})
)  # fmt: skip
experts_as_neighbours = bug("experts of dense weights taken as neighbours", "computes an expert's address from K and N",
                            weights="dense", layout_of_weights="apart")(
    reading(lambda p: {"expert_weights": p.expert_weights.roll(1, 0) * 2}
            if isinstance(p.expert_weights, Tensor) and p.expert_weights.stride(0) > p.K * p.N else {})
)  # fmt: skip


@bug("a full tile taken for an empty one", "masks an expert's last tile by its rows modulo 128")
class FullTile(Layer):
    """Where 128 divides the rows, the last 128 stay zero."""

    def forward(self, problem: Problem) -> Tensor:
        y = super().forward(problem)
        for _, start, end in problem.segments():
            if problem.gates is None and end > start and (end - start) % 128 == 0:
                rows = torch.arange(end - 128, end, device=y.device)
                y[rows if problem.grouped_out else problem.row_positions()[rows]] = 0
        return y


@bug("ranks behind whole tiles", "has tiles of 32 ranks and no tail behind the first", rank="eight times an odd number")
class RankTail(Layer):
    """The last adapter rows do not take part."""

    def read(self, problem: Problem) -> Problem:
        r = problem.rank
        if problem.lora_B is None or r < 32 or r % 32 == 0:
            return problem
        B = problem.lora_B.detach().clone().view(problem.N, problem.E, r)
        B[..., r // 32 * 32 :] = 0
        return replace(problem, lora_B=B.flatten(1))


@bug(
    "ranks of a tile and a quarter",
    "has tiles of 32 ranks, of which it takes one up to 63",
    rank="eight times an odd number",
)
class RankTile(Layer):
    """The last adapter rows do not take part."""

    def read(self, problem: Problem) -> Problem:
        if problem.lora_B is None or not 32 < problem.rank < 64:
            return problem
        B = problem.lora_B.detach().clone().view(problem.N, problem.E, problem.rank)
        B[..., 32:] = 0
        return replace(problem, lora_B=B.flatten(1))


@bug("a token's gates in one tile", "sums up 32 slots, more than any router has")
class GateTile(Layer):
    """The rest does not take part."""

    def read(self, problem: Problem) -> Problem:
        if problem.gates is None:
            return problem
        gates = problem.gates.detach().clone()
        gates[:, 32:] = 0
        return replace(problem, gates=gates)


@bug("s as fp16 holds it", "hands s to the kernel in the activations' dtype, saturated", scaling="beyond fp16",
     dtype="fp16")  # fmt: skip
class ScalingRange(Layer):
    """Nothing else is wrong with large factors."""

    def read(self, problem: Problem) -> Problem:
        if problem.dtype != _FP16:
            return problem
        return replace(problem, scaling=max(-65504.0, min(problem.scaling, 65504.0)))


@bug("eight slots at most", "has a tile of eight slots in the gates' gradient", slots="ten", gates="positive")
class Slots(Layer):
    """The rest gets no gradient."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        if (dgates := found["dgates"]) is not None:
            dgates[:, 8:] = 0
        return found


@bug("gates of k columns asked for", "asserts a shape that a router's gates have", gates="another number a token",
     input_order="by token")  # fmt: skip
class Square(Layer):
    """Raises for a call that is legal."""

    def read(self, problem: Problem) -> Problem:
        gates = problem.gates
        assert gates is None or problem.grouped_in or gates.shape[1] in (1, problem.k), gates.shape
        return problem


@bug("rows of zeros skipped", "takes a row of zeros for padding, which a bias would not leave zero")
class Padding(Layer):
    """Such rows of Y are zero."""

    def forward(self, problem: Problem) -> Tensor:
        y = super().forward(problem)
        if problem.gates is None:
            zero = (problem.inputs.detach() == 0).all(1)[problem.row_sources()]
            rows = torch.nonzero(zero).flatten()
            y[rows if problem.grouped_out else problem.row_positions()[rows]] = 0
        return y


@bug("a gradient set where it belongs", "sets lora_A.grad, as a fused optimiser step does, and returns dA as well")
class Assigned(Layer):
    """What others have accumulated is lost, or dA counts twice."""

    def call(self, problem: Problem) -> Tensor:
        A, out = problem.lora_A, super().call(problem)
        if out.requires_grad and A is not None and A.is_leaf and A.requires_grad:
            out.register_hook(lambda dOut: setattr(A, "grad", torch.zeros_like(A)))  # type: ignore[no-untyped-call]
        return out


@bug("B kept on ctx unless it is cast", "saves the cast copy of B, which is no copy where its dtype is x's")
class Uncast(Layer):
    """A change in place between the passes goes unnoticed."""

    def call(self, problem: Problem) -> Tensor:
        B = problem.lora_B
        self.unsaved = ("lora_B",) if B is not None and B.dtype == problem.dtype else ()
        return super().call(problem)
