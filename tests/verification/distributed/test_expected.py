"""Fixtures whose sums are exact however ranks share them, and intervals that hold what fp32 gives."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

import mxref
from mxref.rounding import precision_bits
from mxref.routing import flatten_sort_count
from mxref.verification.distributed.cases import CASES, StepCase
from mxref.verification.distributed.expected import LOCAL, REDUCED, Expected
from mxref.verification.distributed.fixtures import Fixture, draw, shared, updated
from mxref.verification.distributed.protocol import Batch, Declared, Model
from mxref.verification.distributed.reduction import Reduction, parse_reduction
from mxref.weights import MXWeights

EXACT = [case for case in CASES if case.exact]
ROUNDED = [case for case in CASES if not case.exact and case.dtype != torch.float32]
IN_FP32 = [case for case in CASES if not case.exact and case.dtype == torch.float32]
DECLARED = [Declared(), Declared("mean"), Declared("mean", Reduction(torch.bfloat16))]


def golden(model: Model, batch: Batch, scale: float) -> dict[str, Tensor]:
    """The public golden layer and autograd."""
    x, A, B = (t.clone().requires_grad_() for t in (batch.x, model.lora_A, model.lora_B))
    assert batch.gates is not None
    gates = batch.gates.clone().requires_grad_()
    weights = MXWeights(model.packed, model.scales, x.shape[1], model.packed.shape[1])
    order = flatten_sort_count(batch.experts, weights.E)
    k, biases = batch.experts.shape[1], model.biases
    Y = mxref.parallel_linear_lora(x, weights, k, *order, A, B, model.scaling, biases, gates)
    dX, dA, dB, dgates = torch.autograd.grad(Y, (x, A, B, gates), batch.targets * scale)
    return {"Y": Y.detach(), "dX": dX, "dA": dA, "dB": dB, "dgates": dgates}


@pytest.mark.parametrize("declared", DECLARED, ids=lambda d: f"{d.loss}, {d.reduction}")
@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_exact_results_are_the_golden_layer_s(case: StepCase, declared: Declared) -> None:
    fixture = draw(case, 0, declared)
    model = fixture.model
    for batch, expected in zip(fixture.batches, Expected(fixture, case.share(2), declared).steps, strict=True):
        found = golden(model, batch, fixture.scale)
        for name, tensor in found.items():
            assert torch.equal(tensor.double(), expected[name].exact), name
        model = updated(model, found["dA"].double(), found["dB"].double())


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_gradients_are_exact_in_any_partition(case: StepCase) -> None:
    """Sixteen parts of the tokens added up in bf16, for every element from the least to the largest."""
    declared = Declared("mean", Reduction(torch.bfloat16))
    fixture = draw(case, 3, declared)
    batch, expected = fixture.batches[0], Expected(fixture, case.share(1), declared).steps[0]
    parts = [golden(fixture.model, part, fixture.scale) for part in shared(batch, [case.tokens // 16] * 16)]
    for name in ("dA", "dB"):
        total = torch.zeros_like(expected[name].exact).bfloat16()
        for part in torch.stack([part[name] for part in parts]).sort(0).values:
            total = total + part.bfloat16()
        assert torch.equal(total.double(), expected[name].exact)


def test_sums_that_are_too_long_for_a_dtype_are_not_asked_for() -> None:
    """Of thousands of tokens on one expert every one counts in fp32, and few do where sums run in bf16."""
    case = StepCase("crowded", K=32, N=32, tokens=8192, routing="one_expert")
    in_fp32, in_bf16 = (draw(case, 0, Declared("sum", Reduction(dtype))) for dtype in (torch.float32, torch.bfloat16))
    assert bool((in_fp32.batches[0].x != 0).any(1).all())
    assert float((in_bf16.batches[0].x != 0).any(1).float().mean()) <= 0.5


def test_every_draw_says_something() -> None:
    """Gradients of every expert with tokens, in every exact case."""
    for case in EXACT:
        steps = Expected(draw(case, 0, Declared()), case.share(2), Declared()).steps
        for number, step in enumerate(steps):
            for name, interval in step.items():
                assert bool((interval.exact != 0).any()), (case.name, number, name)


def test_two_steps_see_two_models() -> None:
    case = next(case for case in CASES if case.batches > 1)
    fixture = draw(case, 0, Declared())
    first = Fixture(case, fixture.model, fixture.batches[1:], fixture.scale)
    stale, right = (Expected(f, case.share(2), Declared()).steps[-1] for f in (first, fixture))
    assert all(not torch.equal(stale[name].exact, right[name].exact) for name in ("Y", "dX", "dA", "dB"))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("outputs", ["whole", "summed"])
@pytest.mark.parametrize("case", ROUNDED, ids=lambda case: case.name)
def test_what_16_bits_round_is_accepted_and_little_else(
    case: StepCase, outputs: Literal["whole", "summed"], ranks: int
) -> None:
    """The golden layer lies inside. Of most elements three neighbours of 16 bits at most are accepted; where ranks
    round parts and add them up, some units for each rounding."""
    declared = Declared("mean", outputs=outputs)
    fixture = draw(case, 1, declared)
    accepted = Expected(fixture, case.share(ranks), declared).steps[0]
    for name, tensor in golden(fixture.model, fixture.batches[0], fixture.scale).items():
        interval = accepted[name]
        got = tensor.double()
        assert bool(((interval.low <= got) & (got <= interval.high)).all()), name
        if name in LOCAL:
            _, exponent = torch.frexp(interval.exact)
            ulps = (interval.high - interval.low) / 2.0 ** (exponent - precision_bits(case.dtype))
            assert float(ulps.median()) <= (2 if outputs == "whole" or ranks == 1 else 4 * (ranks + 1)), name


@pytest.mark.parametrize("case", IN_FP32, ids=lambda case: case.name)
def test_intervals_see_16_bits(case: StepCase) -> None:
    """One rounding to bf16 of a tensor's largest elements is more than is accepted of any, unless it is declared."""
    narrow, wide = (Declared("mean", parse_reduction(text)) for text in ("float32", "bfloat16"))
    of_fp32, of_bf16 = (Expected(draw(case, 0, each), case.share(4), each).steps[0] for each in (narrow, wide))
    for name, interval in of_fp32.items():
        radius, wider = interval.radius, of_bf16[name].radius
        assert radius is not None
        assert wider is not None
        assert bool((radius > 0).all())
        assert name == "loss" or float(radius.max()) < 2.0**-8 * float(interval.exact.abs().max()), name
        assert bool((wider > radius).all()) if name in REDUCED else torch.equal(wider, radius)


def test_shares_add_up() -> None:
    for case in CASES:
        for ranks in (1, 2, 3, 4, 8):
            shares = case.share(ranks)
            assert sum(shares) == case.tokens
            assert len(shares) == ranks
            assert min(shares) >= 0
    by_name = {case.name: case for case in CASES}
    assert by_name["a rank without tokens"].share(4)[1] == 0
    assert by_name["all tokens on one rank"].share(4)[:3] == [0, 0, 0]
    assert len(set(by_name["uneven tokens"].share(4))) > 2
