"""Values that overflow or not as they are rounded, by the order of summation: what depends on one is undecided."""

from __future__ import annotations

import pytest
import torch
from judging import ask, failed
from torch import Tensor

from mxref.scattermoe import RoundingPoints, backward, forward
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.arithmetic.bounds import intervals
from mxref.verification.arithmetic.interval import may_overflow
from mxref.verification.candidates.answer import Outputs
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.draw import draw
from mxref.verification.studies.honest.emulation import Emulated, fused_chain

FP16, POINTS = torch.float16, RoundingPoints.contract(torch.float16)
TERMS = torch.tensor([65504, 15, 255 / 256] + 8 * [2.0**-10])
"""Their sum is 65520 + 2^-8, in fp16 infinite; added up one after the other in fp32 they stop 2^-8 below 65520."""


def test_where_a_value_may_overflow() -> None:
    inf, nan = torch.inf, torch.nan
    q = torch.tensor([0, 65519, 65519, -65520, -65520, 1e6, inf, inf, nan, 5], dtype=torch.float64)
    e = torch.tensor([1e4, 0.5, 1, 0, 0.5, 1e3, 0, inf, inf, inf], dtype=torch.float64)
    found = may_overflow(q, e, FP16)
    assert found is not None
    assert found.nonzero().flatten().tolist() == [2, 4, 9]
    assert may_overflow(q[:2], e[:2], FP16) is None
    most = torch.tensor([torch.finfo(torch.float32).max], dtype=torch.float64)
    assert may_overflow(most, most * 2.0**-20, None) is not None
    assert may_overflow(most, most * 2.0**-30, None) is None


def terms_of_y() -> Sample:
    """Row 1 of Y overflows in column 0."""
    sample = draw(Case("Y", 1, 32, 3, 4, 1, 0, FP16, routing="one_expert", dense=True, gate_slots=1))
    x, weights = torch.ones(4, 32, dtype=FP16), torch.full((1, 32, 3), 0.5, dtype=FP16)
    x[1, len(TERMS) :], x[1, : len(TERMS)], weights[..., 0] = 0, TERMS, 1
    return sample.changed(inputs=x, expert_weights=weights, gates=torch.ones(4, 1, dtype=FP16))


def terms_of_z() -> Sample:
    """Z overflows in row 1, rank 2."""
    sample = draw(Case("Z", 1, 32, 3, 4, 1, 3, FP16, routing="one_expert", dense=True, scaling=2.0**-12))
    x, A = torch.ones(4, 32, dtype=FP16), torch.full((3, 32), 2.0**-6, dtype=FP16)
    x[1, len(TERMS) :], x[1, : len(TERMS)], A[2] = 0, TERMS, 1
    zero = torch.zeros_like(sample.problem.expert_weights)
    return sample.changed(inputs=x, lora_A=A, expert_weights=zero)


def terms_of_v() -> Sample:
    """V overflows in row 1, rank 2."""
    sample = draw(Case("V", 1, 64, 32, 4, 1, 3, FP16, routing="one_expert", dense=True, scaling=2.0**-12))
    dOut, B = torch.ones(4, 32, dtype=FP16), torch.full((32, 3), 2.0**-6, dtype=FP16)
    dOut[1, len(TERMS) :], dOut[1, : len(TERMS)], B[:, 2] = 0, TERMS, 1
    zero = torch.zeros_like(sample.problem.expert_weights)
    return sample.changed(dOut, lora_B=B, expert_weights=zero)


def terms_of_d(slots: int, grouped_in: bool = False) -> Sample:
    """D overflows in row 1, column 0; with two slots it is added up with row 0."""
    case = Case("D", 1, 32, 32, 4, slots, 0, FP16, routing="one_expert", dense=True, grouped_in=grouped_in)
    sample = draw(case)
    dOut, weights = torch.ones(case.rows, 32, dtype=FP16), torch.full((1, 32, 32), 0.5, dtype=FP16)
    dOut[1, len(TERMS) :], dOut[1, : len(TERMS)], weights[:, 0] = 0, TERMS, 1
    return sample.changed(dOut, expert_weights=weights)


def undecided(sample: Sample) -> dict[str, list[list[int]]]:
    """Coordinates by tensor."""
    fwd = forward(sample.problem, POINTS)
    bwd = backward(sample.problem, fwd, sample.grad_out, POINTS)
    found = intervals(sample.problem, fwd, bwd, sample.grad_out, POINTS, ACCUMULATIONS["undeclared"])
    masks = {name: interval.undecided for name, interval in found.items()}
    return {name: mask.nonzero().tolist() for name, mask in masks.items() if mask is not None}


def of_row(row: int, columns: int) -> list[list[int]]:
    return [[row, column] for column in range(columns)]


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (terms_of_y(), {"Y": [[1, 0]], "dgates": [[1, 0]]}),
        (terms_of_z(), {"Y": of_row(1, 3), "dB": [[n, 2] for n in range(3)]}),
        (terms_of_v(), {"dX": of_row(1, 64), "dA": of_row(2, 64)}),
        (terms_of_d(2), {"dX": [[0, 0]]}),
        (terms_of_d(1), {"dX": [[1, 0]]}),
        (terms_of_d(1, grouped_in=True), {"dX": [[1, 0]]}),
    ],
    ids=["Y", "Z", "V", "D", "D alone", "D by expert"],
)
def test_an_order_of_summation_decides_what_overflows(sample: Sample, expected: dict[str, list[list[int]]]) -> None:
    """An honest result has another class than the reference there; what depends on no such value is judged."""
    assert undecided(sample) == expected
    honest = Emulated(fused_chain(), FP16, POINTS)
    reference, got = forward(sample.problem, POINTS).out.value, honest.run(sample)
    tensor, coordinates = next(iter(expected.items()))
    if tensor == "Y":
        here = tuple(coordinates[0])
        assert torch.isfinite(got["Y"][here]) != torch.isfinite(reference[here])
    assert not failed(ask("interval", honest, sample, POINTS))
    for name, where in expected.items():
        changed = _Changed(honest, name, tuple(where[0]))
        assert not failed(ask("interval", changed, sample, POINTS)), "whatever it is there"
        changed = _Changed(honest, name, (0, 0) if name in ("dA", "dB") else (-1, -1))
        assert failed(ask("interval", changed, sample, POINTS)) == {("interval", name)}


class _Changed:
    """An implementation that returns NaN for one element."""

    def __init__(self, honest: Emulated, tensor: str, at: tuple[int, ...]) -> None:
        self.honest, self.tensor, self.at = honest, tensor, at

    def run(self, sample: Sample) -> Outputs:
        outputs: dict[str, Tensor | None] = dict(self.honest.run(sample))
        x = outputs[self.tensor]
        assert x is not None
        outputs[self.tensor] = x.clone()
        outputs[self.tensor][self.at] = torch.nan
        return outputs
