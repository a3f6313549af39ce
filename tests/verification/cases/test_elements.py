"""Every code with every scale byte in every place: the samples hold them, and return them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mxref.scattermoe import RoundingPoints, backward, forward
from mxref.verification.candidates.shipped import golden
from mxref.verification.cases.draw import draw
from mxref.verification.cases.elements import (
    all_elements,
    element_cases,
    element_cases_with_options,
    finite_bytes,
    one_hot_elements,
)
from mxref.weights import MXWeights, decode_mxfp4


def test_the_exhaustive_fixtures_hold_every_element() -> None:
    weights = all_elements()
    codes, scales = weights.codes(), weights.scales.repeat_interleave(32, 2)
    place = torch.arange(256).expand(2, 256, -1) % 32
    seen = (codes.long() * 256 + scales) * 32 + place
    assert seen.unique().numel() == 16 * 256 * 32
    packed = weights.packed.long() * 256 + weights.scales.long().repeat_interleave(16, 2)
    assert packed.unique().numel() == 256 * 256, "every two codes under every byte"
    apart = weights.scales.int().diff(dim=2).abs()
    assert (int(apart.max()), (apart > 127).any((0, 2)).all()) == (255, True)
    assert finite_bytes(torch.bfloat16) == finite_bytes(torch.float32) == list(range(253))
    assert finite_bytes(torch.float16) == list(range(141))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_exhaustive_samples_return_the_weights_themselves(dtype: torch.dtype) -> None:
    points = RoundingPoints.contract(dtype)
    finite, *others = map(draw, element_cases(dtype))
    W = decode_mxfp4(finite.problem.expert_weights, dtype).double()  # [E, N, K]
    fwd = forward(finite.problem, points)
    assert torch.equal(fwd.out.value, W.transpose(1, 2).flatten(0, 1))
    d = backward(finite.problem, fwd, finite.grad_out, points).dx.value
    assert torch.equal(d.view(2, 256, 256)[:, : W.shape[1]], W)
    covered = 0
    for sample in others:
        fwd = forward(sample.problem, points)
        d = backward(sample.problem, fwd, sample.grad_out, points).dx.value
        W = decode_mxfp4(sample.problem.expert_weights, dtype).double()
        if sample.case.name.startswith("byte 255 alone"):
            assert fwd.out.value.isnan().all()
            assert d.isnan().all()
            continue
        assert torch.equal(fwd.out.value.nan_to_num(nan=7.0), W.diagonal(0, 1, 2).nan_to_num(nan=7.0))
        assert torch.equal(d.nan_to_num(nan=7.0), fwd.out.value.nan_to_num(nan=7.0))
        covered += W.shape[1] // 32
    assert covered == 256 - len(finite_bytes(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_smaller_sample_holds_each_finite_byte_once(dtype: torch.dtype) -> None:
    sample, points = draw(one_hot_elements(dtype)), RoundingPoints.contract(dtype)
    weights = sample.problem.expert_weights
    assert weights.scales.flatten().tolist() == finite_bytes(dtype)
    assert weights.codes()[0].sort().values.tolist() == [sorted([*range(16)] * 2)] * len(finite_bytes(dtype))
    W = decode_mxfp4(weights, dtype).double()[0]  # [N, K]
    fwd = forward(sample.problem, points)
    rows = torch.arange(len(W))
    assert torch.equal(fwd.out.value, W.T[rows % weights.K])
    assert torch.equal(backward(sample.problem, fwd, sample.grad_out, points).dx.value, W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_byte_is_asked_beside_every_option(dtype: torch.dtype) -> None:
    """And changes nothing: what is computed beside it is zero, or one."""
    plain, options = element_cases(dtype), element_cases_with_options(dtype)
    fused, finite, *others = options[: 1 + len(plain)]
    assert (fused.rank, fused.use_fused_dX, fused.use_fused_gather) == (0, True, True)
    for case, with_options in zip(plain, (finite, *others), strict=True):
        one, other = (golden().run(draw(each)) for each in (case, with_options))
        assert other.keys() == {"Y", "dX", "dA", "dB", "dbias", "dgates"}
        each = with_options.tokens // case.tokens  # rows of an expert, all alike
        assert (each > 1) == (case.data == "nonfinite")
        for name in ("Y", "dX"):
            once = one[name].nan_to_num(2.0).repeat_interleave(each, 0)  # type: ignore[union-attr]
            assert torch.equal(once, other[name].nan_to_num(2.0))  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_that_is_not_scaled_yet_overflows(dtype: torch.dtype) -> None:
    case = element_cases_with_options(dtype)[-1]
    assert case.special == "large partners"
    sample = draw(case)
    assert golden().run(sample)["Y"].isfinite().all()  # type: ignore[union-attr]
    weights = sample.problem.expert_weights
    assert isinstance(weights, MXWeights)
    unscaled = replace(weights, scales=torch.full_like(weights.scales, 127))
    assert golden().run(sample.changed(expert_weights=unscaled))["Y"].isinf().any()  # type: ignore[union-attr]
