"""What wrong elements have in common, which often names the cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_FEW = 3
"""Names that are listed one by one; more are counted."""


@dataclass(frozen=True)
class Axis:
    """One dimension of a result.

    Attributes:
        name: of an index: "row", "column".
        groups: what its indices belong to, by name, such as a row's expert: int64 [size]; negative for none.
        block: size of its blocks of K; 0 for none.
    """

    name: str
    groups: tuple[tuple[str, Tensor], ...] = ()
    block: int = 0


def patterns(wrong: Tensor, got: Tensor, exact: Tensor, axes: Sequence[Axis]) -> list[str]:
    """What the wrong elements have in common, the most telling first.

    Right zeros say nothing: a wrong factor or sign keeps them.

    Args:
        wrong: bool, of the result's shape, not all False.
        got, exact: fp64, of the same shape.
        axes: one a dimension.
    """
    told, silent = [], (exact == 0) & ~wrong
    if bool((wrong | silent).all()):
        told.append("every element")
    else:
        for dimension, axis in enumerate(axes):
            told += _along(wrong, silent, dimension, axis)
    return told + _ratios(wrong, got, exact)


def _along(wrong: Tensor, silent: Tensor, dimension: int, axis: Axis) -> list[str]:
    other = [d for d in range(wrong.ndim) if d != dimension]
    hit = wrong.any(tuple(other)) if other else wrong
    free = silent.all(tuple(other)) if other else silent
    whole = (wrong | silent).all(tuple(other)) if other else wrong | silent
    size, count = hit.numel(), int(hit.sum())
    indices, right = hit.nonzero().flatten().tolist(), (~hit & ~free).nonzero().flatten().tolist()
    if not right:
        return []
    if count == 1:
        belongs = [f"{name} {int(group[indices[0]])}" for name, group in axis.groups if group[indices[0]] >= 0]
        return [f"{axis.name} {indices[0]} of {size} only{''.join(f' ({each})' for each in belongs)}"]
    for name, group in axis.groups:
        text = _grouped(hit, hit | free, group, name, axis.name)
        if text:
            return [text]
    if right[-1] < indices[0]:
        return [f"the last {size - indices[0]} of {size} {axis.name}s, from {indices[0]} on"]
    if axis.block and size > axis.block and indices[-1] // axis.block == indices[0] // axis.block:
        block = indices[0] // axis.block
        end = min(size, (block + 1) * axis.block) - 1
        return [f"K-block {block} only ({axis.name}s {block * axis.block} to {end})"]
    step = _step(indices)
    if step > 1 and count > _FEW and count >= (size - indices[0]) // step:
        return [f"one {axis.name} in {step}, from {indices[0]} on"]
    if count <= _FEW:
        return [f"{axis.name}s {', '.join(map(str, indices))} of {size} only"]
    return [f"{count} of {size} {axis.name}s, each of them whole"] if bool(whole[hit].all()) else []


def _grouped(hit: Tensor, possible: Tensor, group: Tensor, name: str, member: str) -> str:
    """The groups of all hits, where fewer than all groups."""
    present = sorted({g for g in group.tolist() if g >= 0})
    wrong = sorted(set(group[hit].tolist()))
    if len(present) < 2 or not wrong or wrong[0] < 0 or len(wrong) >= len(present) or len(wrong) > _FEW:
        return ""
    inside = torch.isin(group, torch.tensor(wrong, device=group.device))
    all_of_them = bool(possible[inside].all())
    which = f"{name}{'s' if len(wrong) > 1 else ''} {', '.join(map(str, wrong))}"
    return f"{'every' if all_of_them else 'some'} {member}{'' if all_of_them else 's'} of {which}, and no other"


def _ratios(wrong: Tensor, got: Tensor, exact: Tensor) -> list[str]:
    """The one ratio of all wrong elements to exact values: a power of two, a sign or zero."""
    value, right = got[wrong], exact[wrong]
    if bool(torch.isnan(value).all()) and not bool(torch.isnan(right).any()):
        return ["all of them NaN"]
    usable = torch.isfinite(value) & torch.isfinite(right) & (right != 0)
    if not bool(usable.all()):
        return []
    if bool((value == 0).all()):
        return ["all of them zero"]
    ratio = value / right
    octave = torch.log2(ratio.abs()).round()
    near = (ratio.abs() / 2.0**octave - 1).abs() < 2.0**-6
    same = bool((octave == octave[0]).all()) and bool(near.all()) and bool((ratio.sign() == ratio[0].sign()).all())
    if not same or (octave[0] == 0 and ratio[0] > 0):
        return []
    sign = "−" if ratio[0] < 0 else ""
    return [f"ratio {sign}2^{int(octave[0])}".replace("^-", "^−") if octave[0] else "ratio −1"]


def _step(indices: Sequence[int]) -> int:
    """The distance of neighbours if constant; else 0."""
    steps = {b - a for a, b in pairwise(indices)}
    return steps.pop() if len(steps) == 1 else 0
