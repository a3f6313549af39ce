"""Bugs of what sizes leave over behind whole tiles, as those of real models do, and of paths that sizes choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.verification.studies.calls.layer import Gradients, Layer, bug
from mxref.verification.studies.calls.seldom import turned, where
from mxref.verification.studies.calls.values import rows_of
from mxref.weights import MXWeights

__all__: list[str] = []

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


def _without_last(operand: str, columns: int) -> Callable[[Problem], Mapping[str, Any]]:
    """A change of an operand: its last columns are zero."""

    def change(p: Problem) -> Mapping[str, Any]:
        x = getattr(p, operand)
        return {} if x is None else {operand: torch.cat((x[:, :-columns], 0 * x[:, -columns:]), 1).detach()}

    return change


def _storing(holds: Callable[[Problem], bool], columns: int) -> Callable[[], Layer]:
    """The last columns of Y are never written, where something holds."""

    class Storing(Layer):
        def forward(self, problem: Problem) -> Tensor:
            out = super().forward(problem)
            if holds(problem):
                out[:, -columns:] = 0.0
            return out

    return Storing


half_step = bug("half a step of K", "loops by two steps of 64, from some on without the odd one")(
    where(lambda p: p.K > 512 and p.K % 128 == 64, _without_last("inputs", 64))
)
blocks_by_fours = bug("blocks of Z by fours", "splits K into four parts of whole blocks, and two are left")(
    where(lambda p: p.K > 256 and p.K // 32 % 4 == 2, _without_last("lora_A", 64))
)
ring = bug("the last step of a ring", "drains a ring of four stages one step too early, in tall tiles")(
    where(
        lambda p: p.P > 128 and p.K > 256 and -(-p.K // 64) % 4 == 1 and int(rows_of(p).max()) > 128,
        _without_last("inputs", 64),
    )
)
vectors_of_K = bug("dense K by eights", "loads eight columns at once and has no loop for others")(
    where(lambda p: isinstance(p.expert_weights, Tensor) and p.K > 64 and p.K % 8 != 0, _without_last("inputs", 4))
)
half_tile = bug("half a tile of N", "stores tiles in two halves, the second if it is more than half full")(
    _storing(lambda p: p.N > 128 and p.N % 128 == 64, 64)
)
odd_tiles = bug("tiles of N by eights", "visits tiles of columns in groups of eight, the last as if it were whole")(
    _storing(lambda p: p.N > 1024 and p.N % 128 == 0 and p.N // 128 % 8 != 0, 128)
)
eight_columns = bug("half a vector of N", "stores sixteen columns at once, then fewer than eight")(
    _storing(lambda p: p.dtype != _FP32 and p.N % 16 == 8, 8)
)
long_tf32 = bug("long sums in TF32", "takes tensor cores for fp32 where K is long")(
    where(
        lambda p: p.dtype == _FP32 and p.K >= 512,
        lambda p: {"inputs": (p.inputs.detach().view(torch.int32) & ~0x1FFF).view(_FP32)},
    )
)
between_tiles = bug("ranks between tiles", "rounds a rank up, but for those between 20 and 32")(
    where(lambda p: 20 < p.rank < 32, turned("lora_B"))
)
tile_and_a_half = bug("a tile and a half of ranks", "walks ranks by tiles of 64 where they divide by 32")(
    where(lambda p: p.rank > 64 and p.rank % 64 == 32, turned("lora_B"))
)


@bug("the next expert's A masked by zero", "multiplies what lies behind its ranks by zero")
class MaskedByZero(Layer):
    """NaN · 0 is NaN."""

    def forward(self, problem: Problem) -> Tensor:
        out, A, r = super().forward(problem), problem.lora_A, problem.rank
        if A is None or r < 4 or problem.gates is not None:
            return out
        after = A.detach().view(problem.E, r, -1)[1:, :1].isnan().any(2).flatten().nonzero().flatten()
        rows = torch.isin(problem.sorted_expert_idxs, after)
        out[rows.nonzero().flatten() if problem.grouped_out else problem.row_positions()[rows]] = float("nan")
        return out


@bug("a sentinel behind a full tile", "masks sentinels in an expert's last tile, which is full")
class BehindFullTiles(Layer):
    """It gets that expert's biases."""

    def forward(self, problem: Problem) -> Tensor:
        out, biases, owned = super().forward(problem), problem.expert_biases, int(problem.expert_offsets[-1])
        if biases is not None and problem.gates is None and 0 < owned < problem.P and owned % 64 == 0:
            out[owned if problem.grouped_out else problem.row_positions()[owned]] = biases[-1].detach().to(out.dtype)
        return out


full_tiles = bug("full tiles without adapters", "adds the adapter's term in the loop over a tile's masked rows")(
    where(lambda p: p.P > 128 and bool((rows_of(p) == 128).any()), turned("lora_B"))
)
experts_by_256 = bug("experts by 256", "scans experts by 256 and loses a last half")(
    where(lambda p: p.E % 256 == 128, turned("inputs"))
)
token_in_int16 = bug("tokens in 16 bits", "numbers tokens in int16")(
    where(lambda p: len(p.inputs) > 2**15 and p.k > 1, turned("inputs"))
)


def _codes_lost(p: Problem, bytes_: slice) -> dict[str, Any]:
    """Zeros under some scale bytes."""
    weights = p.expert_weights
    if not isinstance(weights, MXWeights):
        return {}
    lost = torch.isin(weights.scales, torch.arange(256, dtype=torch.uint8)[bytes_].to(weights.scales.device))
    packed = torch.where(lost.repeat_interleave(16, -1), weights.packed & 0x88, weights.packed)
    return {"expert_weights": replace(weights, packed=packed)}


few_in_fp16 = bug("small fp16 weights of few rows", "flushes subnormals where it takes vectors for tiles")(
    where(lambda p: p.dtype == _FP16 and 0 < p.P <= 4 * p.E, lambda p: _codes_lost(p, slice(100, 103)))
)
few_in_bf16 = bug("small bf16 weights of few rows", "shifts bytes 1 and 2 where it takes vectors for tiles")(
    where(lambda p: p.dtype == _BF16 and 0 < p.P <= 16 * p.E, lambda p: _codes_lost(p, slice(1, 3)))
)
ordered_in_bf16 = bug("infinite weights in expert order", "clamps scales where rows lie in order")(
    where(
        lambda p: p.dtype == _BF16 and p.grouped_in and isinstance(p.expert_weights, MXWeights),
        lambda p: {"expert_weights": replace(p.expert_weights, scales=_clamped(p.expert_weights.scales))},  # type: ignore[type-var, union-attr]
    )
)  # fmt: skip


def _clamped(scales: Tensor) -> Tensor:
    return torch.where(scales == 255, scales, scales.clamp(max=252))


@bug("V unrounded beside dense weights", "keeps V in registers where adapters are frozen")
class UnroundedV(Layer):
    """One rounding point less."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        alone = sum(needs.values()) == 1 and needs["dX"]
        if not alone or isinstance(problem.expert_weights, MXWeights) or problem.dtype != _BF16:
            return found
        operands: dict[str, Any] = {
            n: x.float() for n, x in problem.arguments().items() if isinstance(x, Tensor) and x.is_floating_point()
        }
        dX = super().backward(replace(problem, **operands), dOut.float(), needs)["dX"]
        return found | {"dX": None if dX is None else dX.to(_BF16)}


s_in_A = bug("s in lora_A in fp16", "multiplies A by s while it loads it, a power of two")(
    where(
        lambda p: p.lora_A is not None and p.dtype == _FP16 and abs(p.scaling) == 2.0,
        lambda p: {"lora_A": (p.lora_A.detach() * p.scaling).half(), "scaling": 1.0},  # type: ignore[union-attr]
    )
)


@bug("split sums in 16 bits", "splits K in two for few rows, and adds what it has rounded")
class SplitSums(Layer):
    """One rounding point more."""

    def forward(self, problem: Problem) -> Tensor:
        if problem.K < 1024 or problem.K % 256 or problem.P > 16:
            return super().forward(problem)
        first, second = problem.inputs.detach().clone(), problem.inputs.detach().clone()
        first[:, problem.K // 2 :] = second[:, : problem.K // 2] = 0.0
        out = super().forward(replace(problem, inputs=first))
        return out + super().forward(replace(problem, inputs=second, expert_biases=None))
