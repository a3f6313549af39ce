"""Some tokens of a sample: alone they are computed as among the others; changed, they change no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mxref.scattermoe import RoundingPoints, backward, forward
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.draw import draw
from mxref.verification.cases.tokens import disturbed, select, tokens_of, without

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"grouped_out": True},
    {"top_k": 4, "fan_out": 1, "gate_slots": 4},
    {"grouped_in": True, "gate_slots": 2},
    {"routing": "sentinels", "bias": True},
]


def results(sample: Sample) -> dict[str, torch.Tensor]:
    points = RoundingPoints.exact()
    fwd = forward(sample.problem, points)
    bwd = backward(sample.problem, fwd, sample.grad_out, points)
    named = {"Y": fwd.out, "dX": bwd.dx, "dgates": bwd.dgates}
    return {name: rounded.exact for name, rounded in named.items() if rounded is not None}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tokens_alone_are_computed_as_among_the_others(layout: dict[str, Any]) -> None:
    sample = draw(Case("layout", **{"experts": 5, "K": 32, "N": 32, "tokens": 12} | layout))
    keep = torch.tensor([1, 4, 5, 10])
    part = without(sample, keep)
    part.problem.validate(check_values=True)
    whole, alone = results(sample), results(part)
    assert whole.keys() == alone.keys() == tokens_of(sample).keys()
    for tensor, rows in alone.items():
        assert rows.shape[0] > 0
        assert torch.equal(select(sample, tensor, whole[tensor], keep), rows), tensor


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_other_values_change_their_own_tokens_alone(layout: dict[str, Any]) -> None:
    sample = draw(Case("layout", **{"experts": 5, "K": 32, "N": 32, "tokens": 12} | layout))
    odd = torch.arange(1, 12, 2)
    before, after = results(sample), results(disturbed(sample, odd))
    for tensor, tokens in tokens_of(sample).items():
        changed = (before[tensor] != after[tensor]).any(1)
        assert not changed[~torch.isin(tokens, odd)].any(), tensor
        assert changed[torch.isin(tokens, odd)].any(), tensor
