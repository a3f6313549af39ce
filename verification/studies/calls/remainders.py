"""Bugs that a remainder, a size between two thresholds, or a size with an option beside it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxref import scattermoe
from mxref.problem import Problem
from mxref.scattermoe import RoundingPoints
from mxref.verification.studies.calls.layer import Gradients, Layer, bug
from mxref.verification.studies.calls.seldom import turned, where
from mxref.verification.studies.calls.values import reading, rows_of
from mxref.weights import MXWeights

__all__: list[str] = []

_BF16, _FP32 = torch.bfloat16, torch.float32
_N, _K, _RANK, _SLOTS, _EXPERTS = (
    f"masks {tail} as the sizes do that it was tried with"
    for tail in ("a tail of N", "a tail of K", "ranks", "slots", "experts")
)

columns_of_six = bug("N six more than eights", _N, N="twice an odd number")(
    where(lambda p: p.N % 8 == 6, turned("inputs"))
)
columns_of_three = bug("N three or five more than eights", _N, N="odd, below a tile")(
    where(lambda p: p.N % 8 in (3, 5), turned("inputs"))
)
columns_of_twelve = bug("N twelve more than sixteens", _N, N="four times an odd number")(
    where(lambda p: p.N % 16 == 12, turned("inputs"))
)
three_blocks = bug("three blocks behind whole fours", _K, K="a step and a tail")(
    where(lambda p: p.K > 128 and p.K % 128 == 96, turned("inputs"))
)
dense_twos = bug("dense K twice an odd number", _K, K="no whole block")(where(lambda p: p.K % 4 == 2, turned("inputs")))
odd_ranks = bug("odd ranks above three", _RANK, rank="odd")(
    where(lambda p: p.rank > 3 and p.rank % 2 == 1, turned("lora_B"))
)
twice_odd_ranks = bug("ranks twice an odd number", _RANK, rank="twice an odd number")(
    where(lambda p: p.rank > 2 and p.rank % 4 == 2, turned("lora_B"))
)
ranks_by_sixteen = bug("ranks of five or seven tiles", _RANK, rank="sixteen times an odd number")(
    where(lambda p: p.rank in (80, 112), turned("lora_B"))
)
odd_slots = bug("five or seven slots", _SLOTS, slots="odd")(where(lambda p: p.k in (5, 7), turned("inputs")))
many_slots = bug("twelve or sixteen slots", _SLOTS, slots="seventeen")(
    where(lambda p: p.k in (12, 16), turned("inputs"))
)
two_warps = bug("two warps of experts", _EXPERTS, experts="a warp")(where(lambda p: p.E == 64, turned("inputs")))
table_of_experts = bug("as many experts as a table", _EXPERTS)(where(lambda p: p.E == 512, turned("inputs")))
usual_batch = bug("a training batch's rows", "splits rows from 2,048 on and forgets the last part below 65,536")(
    where(lambda p: 2048 <= p.P < 65536, turned("inputs"))
)


def _whole(p: Problem) -> bool:
    """Whether K and N are whole tiles."""
    return p.K % 128 == 0 == p.N % 128


unmasked_sentinels = bug(
    "whole tiles, sentinels and biases",
    "adds biases to whole tiles without looking at owners",
    K="whole tiles",
    N="whole tiles",
)(
    where(
        lambda p: _whole(p) and p.expert_biases is not None and int(p.expert_offsets[-1]) < p.P,
        turned("expert_biases"),
    )
)
unmasked_slots = bug(
    "whole tiles, more than two slots",
    "has a fast path of whole tiles, for one or two slots",
    K="whole tiles",
    N="whole tiles",
)(where(lambda p: _whole(p) and p.k > 2, turned("inputs")))
unmasked_dense = bug(
    "whole tiles of dense weights",
    "has a fast path of whole tiles, for packed weights",
    K="whole tiles",
    N="whole tiles",
)(where(lambda p: _whole(p) and isinstance(p.expert_weights, Tensor), turned("inputs")))


def _scales(change: Callable[[Problem, Tensor], Tensor]) -> Callable[[], Layer]:
    """The scale bytes are read otherwise."""

    def read(p: Problem) -> Mapping[str, Any]:
        W = p.expert_weights
        return {"expert_weights": replace(W, scales=change(p, W.scales))} if isinstance(W, MXWeights) else {}

    return reading(read)


def _of_last_block(p: Problem, scales: Tensor) -> Tensor:
    if p.K < 512 or p.P < 64:
        return scales
    return torch.cat((scales[..., :-1], scales[..., -2:-1]), 2)


next_expert = bug("whole tiles, the next expert's scales", "fetches scales one tile ahead, past an expert's end")(
    _scales(lambda p, s: s.roll(-1, 0) if bool(((rows_of(p) > 0) & (rows_of(p) % 64 == 0)).any()) else s)
)
wrapped_experts = bug("scales of the expert 512 before", "masks the number of an expert by nine bits")(
    _scales(lambda p, s: s[torch.arange(p.E) % 512])
)
last_block = bug("the last block's scale from the one before", "loads scales a step ahead, and the last not at all")(
    _scales(_of_last_block)
)


@bug("dA rounded at rank sixteen", "returns dA in the activations' dtype where a whole tile is stored",
     rank="sixteen", parameters="fp32")  # fmt: skip
class WholeRank(Layer):
    """The dtype is right, the bits are not."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        dA = found["dA"]
        return found if dA is None or problem.rank != 16 else found | {"dA": dA.to(problem.dtype).to(dA.dtype)}


@bug("long sums in two parts of 16 bits", "splits K beyond 1,024 and adds the parts up in the output's dtype")
class TwoParts(Layer):
    """Rounded twice more."""

    def forward(self, problem: Problem) -> Tensor:
        if problem.K <= 1024 or problem.dtype == _FP32 or problem.gates is not None:
            return super().forward(problem)
        first = torch.arange(problem.K) < problem.K // 64 * 32
        base = replace(problem, inputs=problem.inputs * first, expert_biases=None, lora_A=None, lora_B=None)
        rest = scattermoe.forward(problem, RoundingPoints.contract(problem.dtype)).out.exact
        part = scattermoe.forward(base, RoundingPoints.contract(problem.dtype)).out.exact
        return (part.to(problem.dtype).double() + (rest - part)).to(problem.dtype)


@bug("ties away from zero beside many experts", "rounds by adding half a unit to the bits, for more than 8 experts")
class TiesAway(Layer):
    """Half of all ties."""

    def forward(self, problem: Problem) -> Tensor:
        if problem.E <= 8 or problem.dtype != _BF16 or problem.gates is not None:
            return super().forward(problem)
        exact = scattermoe.forward(problem, RoundingPoints.contract(problem.dtype)).out.exact.float()
        away = ((exact.view(torch.int32) + 0x8000) & -0x10000).view(_FP32)
        return torch.where(exact.isfinite(), away, exact).to(_BF16)


short_of_bits = bug("TF32 for many rows", "permits TF32 where a batch is large")(
    reading(
        lambda p: (
            {"inputs": (p.inputs.detach().view(torch.int32) & ~0x1FFF).view(_FP32)}
            if p.dtype == _FP32 and p.P > 8192
            else {}
        )
    )
)
