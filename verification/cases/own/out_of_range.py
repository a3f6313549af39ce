"""Samples with positions and offsets out of range, which a correct kernel must not follow."""

from __future__ import annotations

import torch
from torch import Tensor

from mxref.verification.cases.case import Sample


def positions_out_of_range(sample: Sample) -> tuple[Sample, Tensor]:
    """Five positions below 0 or beyond P−1, and which rows of Y no such position belongs to: bool [P].

    Args:
        sample: ungrouped and without gates, of at least six routed rows.
    """
    problem = sample.problem
    positions = problem.sorted_scattered_idxs.clone()
    kept = torch.ones(problem.P, dtype=torch.bool, device=problem.device)
    for row, position in {0: -1, 1: -3, 3: problem.P, 4: problem.P + 5, 5: 2**40}.items():
        kept[positions[row]] = False
        positions[row] = position
    return sample.changed(sorted_scattered_idxs=positions), kept


def offsets_out_of_range(sample: Sample) -> dict[str, Sample]:
    """Offsets outside 0..P, which count as if they were forced into it, a little and far beyond.

    Args:
        sample: its first and last experts have no rows, and it has no sentinels.
    """
    samples, P = {}, sample.problem.P
    for name, below, above in (("near", -3, P + 5), ("far", 5 - 2**40, 2**40)):
        offsets = sample.problem.expert_offsets.clone()
        offsets[offsets == 0] = below
        offsets[offsets == P] = above
        samples[name] = sample.changed(expert_offsets=offsets)
    return samples
