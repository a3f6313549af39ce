"""Suites: every routing, option and kind of data is in them."""

from __future__ import annotations

import pytest

from mxref.verification.cases import suites


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
