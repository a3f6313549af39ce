"""Honest arithmetic, what a derived bound accepts, and how much lies outside of it."""

from __future__ import annotations

from torch import Tensor

from mxref.scattermoe import RoundingPoints, backward, forward
from mxref.verification.arithmetic.accumulation import Accumulation
from mxref.verification.arithmetic.bounds import intervals
from mxref.verification.arithmetic.interval import Interval
from mxref.verification.cases.case import Sample
from mxref.verification.studies.honest.emulation import Dot, blocks, fused_chain

HONEST: dict[str, Dot] = {
    **{f"blocks of {b}, {o}, {i}": blocks(b, o, i)
       for b in (8, 16, 64) for o in ("forward", "backward", "shuffled") for i in ("sequential", "pairwise")},
    "one block, pairwise": blocks(4096, inner="pairwise"),
    "one block, largest first": blocks(4096, inner="by size"),
    "one block, fp64": blocks(4096, inner="fp64"),
    "fused chain": fused_chain(),
    "fused chain, backward": fused_chain("backward"),
}  # fmt: skip


def accepted(sample: Sample, points: RoundingPoints, how: Accumulation) -> dict[str, Interval]:
    """Intervals of every output that the rounding points and the accumulation allow."""
    fwd = forward(sample.problem, points)
    return intervals(
        sample.problem, fwd, backward(sample.problem, fwd, sample.grad_out, points), sample.grad_out, points, how
    )


def outside(outputs: dict[str, Tensor], within: dict[str, Interval]) -> dict[str, int]:
    """Elements of each output that lie outside of their interval."""
    assert outputs.keys() == within.keys()
    return {
        name: int(((outputs[name] < interval.low) | (outputs[name] > interval.high)).sum())
        for name, interval in within.items()
    }
