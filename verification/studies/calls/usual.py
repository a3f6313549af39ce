"""Bugs at sizes and options that models have every day, which fixtures are easily without."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.verification.studies.calls.layer import Gradients, Layer, bug
from mxref.verification.studies.calls.seldom import turned, where
from mxref.verification.studies.calls.values import rows_of
from mxref.weights import MXWeights

__all__: list[str] = []

_BF16, _FP32 = torch.bfloat16, torch.float32
_ALIGNED = 16
_TILED = "has a fast path where sizes are what it takes them for"

few_columns = bug("fewer columns than sixteen", "masks a tile by its last sixteen columns", N="odd, below a tile")(
    where(lambda p: 1 < p.N < 16, turned("inputs"))
)
one_column_more = bug("a column more or fewer than whole tiles", "rounds N to tiles, and forgets one column")(
    where(lambda p: p.N > 1 and p.N % 128 in (1, 127), turned("inputs"))
)
three_tiles = bug("K of three tiles", "splits K in halves until it fits", K="whole tiles")(
    where(lambda p: p.K % 128 == 0 and p.K & (p.K - 1) != 0, turned("inputs"))
)
odd_K = bug("dense K that is odd", "loads two numbers of dense rows at once", weights="dense", K="no whole block")(
    where(lambda p: p.K % 2 == 1, turned("inputs"))
)
less_than_a_block = bug("dense K below a block", "has one step at least", weights="dense", K="no whole block")(
    where(lambda p: p.K < 32, turned("inputs"))
)
warps_and_a_half = bug("experts behind whole warps", "scans experts by warps, and not what is left", experts="a warp")(
    where(lambda p: p.E in (40, 96), turned("inputs"))
)
square = bug("as many rows as columns of x", "tells x from its transpose by its shape")(
    where(lambda p: p.inputs.shape[0] == p.K or p.P == p.K, turned("inputs"))
)
long_and_many = bug("long sums of many experts", "offsets a stack of experts by a 16-bit product of sizes")(
    where(lambda p: p.E >= 32 and p.K >= 512, turned("inputs"))
)
one_token = bug("one token, many experts", "has a path for decoding, which counts in one warp")(
    where(lambda p: p.inputs.shape[0] == 1 and p.E >= 32, turned("inputs"))
)
mostly_remote = bug("mostly sentinels", "takes the commonest owner for the first expert's", routing="sentinels")(
    where(lambda p: 0 < 2 * int(p.expert_offsets[-1]) < p.P, turned("inputs"))
)
equal_counts = bug("equal counts on dense weights", "calls bmm where all experts have as many rows", weights="dense")(
    where(lambda p: isinstance(p.expert_weights, Tensor) and p.E > 1 and _alike(p), turned("inputs"))
)
a_row_fewer = bug("a row fewer than a tile in 16 bits", _TILED, dtype="bf16")(
    where(lambda p: p.dtype == _BF16 and bool((rows_of(p) % 128 == 127).any()), turned("inputs"))
)
apart_from_packed = bug(
    "scales less aligned than codes", "asks the codes alone for their alignment", **{"layout of weights": "offset"}
)(where(lambda p: isinstance(p.expert_weights, MXWeights) and _scales_alone(p.expert_weights), turned("inputs")))
pitched = bug("dense columns with a pitch", "takes column-major weights for contiguous", weights="dense")(
    where(lambda p: isinstance(p.expert_weights, Tensor) and _is_pitched(p.expert_weights), turned("inputs"))
)
one_row_of_gates = bug("one row of gates", "reads gates with a pitch of k", **{"layout of gates": "one row"})(
    where(lambda p: p.gates is not None and p.gates.shape[0] > 1 and p.gates.stride(0) == 0, turned("gates"))
)
whole_scaling = bug("a positive int scaling", "takes an int for the rank", scaling="an int")(
    where(lambda p: type(p.scaling) is int and p.scaling > 0, turned("lora_B"))
)
large_fraction = bug(
    "a fraction above one", "rounds alpha / rank where it is larger than one", scaling="sixteen thirds"
)(where(lambda p: p.scaling > 1 and p.scaling % 1 != 0, turned("lora_B")))


@bug("adapters of a first layer", "adds dB up twice where no other gradient is asked for", gradients="dA and dB")
class FirstLayer(Layer):
    """x of embeddings that are frozen needs no gradient."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        dB, asked = found["dB"], {name for name, needed in needs.items() if needed}
        return found | {"dB": 2 * dB} if dB is not None and asked == {"dA", "dB"} else found


@bug("frozen biases of many experts", "saves what dbias needs, and dB is made of, only where that is asked for")
class FrozenBiases(Layer):
    """As gpt-oss is trained."""

    def backward(self, problem: Problem, dOut: Tensor, needs: Mapping[str, bool]) -> Gradients:
        found = super().backward(problem, dOut, needs)
        dB, frozen = found["dB"], problem.expert_biases is not None and not needs["dbias"]
        return found | {"dB": -dB} if dB is not None and frozen and problem.E >= 32 and problem.k > 1 else found


def _alike(p: Problem) -> bool:
    rows = rows_of(p)
    return bool((rows == rows[0]).all()) and int(rows[0]) > 1


def _scales_alone(weights: MXWeights) -> bool:
    return weights.packed.data_ptr() % _ALIGNED == 0 != weights.scales.data_ptr() % _ALIGNED


def _is_pitched(weights: Tensor) -> bool:
    """Whether columns begin at multiples of sixteen, further apart than they are long."""
    E, K, N = weights.shape
    return E * N > 1 and K > 1 and weights.stride(1) == 1 and weights.stride(2) % 16 == 0 and weights.stride(2) > K
