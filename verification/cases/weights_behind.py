"""The input bytes behind a wrong element: which codes and scale bytes met there.

Cases whose sums are exact have so few nonzeros that the weights behind one element of Y or dX can be
named. Elsewhere hundreds of products meet, and a case, a seed and a coordinate say it all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxref.formats import E2M1_VALUES, E8M0_BIAS
from mxref.verification.cases.case import Sample
from mxref.weights import MXLayout, MXWeights

_MOST = 4  # terms worth naming


@dataclass(frozen=True)
class Weight:
    """One packed weight W_e[k, n], and what it was multiplied with."""

    expert: int
    k: int
    n: int
    code: int
    scale_byte: int
    factor: float = 1.0

    def __str__(self) -> str:
        value = E2M1_VALUES[self.code]
        times = "" if self.factor == 1 else f"{self.factor:g} · "
        return (
            f"{times}W[expert {self.expert}, k {self.k}, n {self.n}]: code 0x{self.code:X} ({value:g}), "
            f"scale byte 0x{self.scale_byte:02X} ({self.scale_byte})"
        )


def weight_at(weights: MXWeights, expert: int, k: int, n: int, factor: float = 1.0) -> Weight:
    """The packed weight at one place."""
    own = weights.select(torch.tensor([expert])).repack(MXLayout.FWD)
    byte = int(own.packed[0, n, k // 2])
    return Weight(expert, k, n, byte >> 4 if k % 2 else byte & 15, int(own.scales[0, n, k // 32]), factor)


def weights_behind(sample: Sample, tensor: str, coordinate: tuple[int, ...]) -> list[Weight]:
    """The weights whose products make up one element of Y or dX; empty where they are many, or it is another's."""
    problem = sample.problem
    if problem.gates is not None or not isinstance(problem.expert_weights, MXWeights) or len(coordinate) != 2:
        return []
    row, column = coordinate
    positions, grouped_out = problem.row_positions(), problem.grouped_out
    if tensor == "Y":
        routed = row if grouped_out else int((positions == row).nonzero()[0])
        factors = problem.inputs[problem.row_sources()[routed]]
        places = [(int(k), column) for k in _nonzero(factors)]
    elif tensor == "dX":
        feeds = (problem.row_sources() == row).nonzero()[:, 0]
        if feeds.numel() != 1:
            return []
        routed = int(feeds[0])
        factors = sample.grad_out[routed if grouped_out else positions[routed]]
        places = [(column, int(n)) for n in _nonzero(factors)]
    else:
        return []
    expert = int(problem.sorted_expert_idxs[routed])
    if expert >= problem.E:
        return []
    found = [
        weight_at(problem.expert_weights, expert, k, n, float(factors[k if tensor == "Y" else n])) for k, n in places
    ]
    telling = [weight for weight in found if E2M1_VALUES[weight.code] != 0]
    telling = telling or [weight for weight in found if weight.scale_byte != E8M0_BIAS][:1]  # a zero under a wild scale
    return telling if len(telling) <= _MOST else []


def _nonzero(factors: Tensor) -> list[int]:
    return [int(index) for index in torch.nonzero(factors.detach())[:, 0]]
