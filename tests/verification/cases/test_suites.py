"""Suites: every routing, option and kind of data is in them."""

from __future__ import annotations

import pytest
import torch

from mxref.verification.candidates.shipped import golden
from mxref.verification.cases import suites
from mxref.verification.cases.draw import draw
from mxref.verification.cases.scope import Scope


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_quick_suite_has_every_option(device_type: str) -> None:
    cases = suites.drawn_cases("quick", device_type)
    for option in ("bias", "grouped_in", "grouped_out", "use_fused_dX", "use_fused_gather", "gate_slots"):
        assert {bool(getattr(case, option)) for case in cases} == {True, False}
    assert {"uniform", "empty_experts", "one_expert", "sentinels"} <= {case.routing for case in cases}
    assert {"plain", "balanced", "wide", "boundary"} <= {case.data for case in cases}
    assert {0, 1, 3, 16, 20, 128} <= {case.rank for case in cases}
    assert {1, 2, 8} <= {case.k for case in cases}
    assert any(case.tokens == 0 for case in cases)
    assert any(case.K % 64 and case.N % 64 and case.tokens % 2 for case in cases)
    assert set(cases) < set(suites.drawn_cases("full", device_type))


def test_plain_pytorch_decodes_every_byte_in_every_dtype() -> None:
    """On a CPU too, where interpreted kernels are asked in fp32 alone."""
    every = {(torch.float32, 255), (torch.bfloat16, 255), (torch.float16, 255), (torch.float16, 141)}
    asked = {
        (case.dtype, byte)
        for case in suites.decode_cases(Scope("quick", "cpu", interpreted=False))
        for byte in case.scale_bytes
    }
    assert every <= asked
    assert {case.dtype for case in suites.decode_cases(Scope("quick", "cpu"))} == {torch.float32}


@pytest.mark.parametrize("interpreted", [False, True])
def test_experts_have_whole_tiles_of_rows_and_one_more_or_fewer(interpreted: bool) -> None:
    tiles = (16, 32, 64) if interpreted else (16, 32, 64, 128, 256)
    rows = set()
    for case in suites.exact_cases(Scope("quick", "cpu", interpreted=interpreted)):
        if case.routing == "about_tiles":
            offsets = draw(case).problem.expert_offsets
            rows |= set(torch.diff(offsets, prepend=offsets[:1] * 0).tolist())
            assert case.tokens % 128 == 0
    assert {n + more for n in tiles for more in (-1, 0, 1)} <= rows


def test_a_row_of_zeros_meets_a_bias() -> None:
    cases = suites.exact_cases(Scope("quick", "cpu", interpreted=False))
    biased = [case for case in cases if case.bias and not case.gate_slots and case.tokens in (9, 20)]
    assert biased
    for case in biased[:5]:
        assert not bool(draw(case).problem.inputs[1].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_gradient_is_subnormal_somewhere(dtype: torch.dtype) -> None:
    """And beyond the range of fp16, where that is what is judged."""
    cases = suites.ordinary_cases(Scope("quick", "cpu", interpreted=False))
    (tiny,) = [case for case in cases if case.data == "tiny dOut" and case.dtype == dtype]
    found = golden().run(draw(tiny))
    for name in ("dX", "dA", "dB", "dbias", "dgates"):
        x = found[name]
        assert x is not None
        assert bool(((x != 0) & (x.abs() < torch.finfo(x.dtype).smallest_normal)).any()), name
    large = [case for case in cases if case.data == "large"]
    assert {case.dtype for case in large} == {torch.float16}
