"""Sizes beside the domain's: what they leave over behind whole tiles, and that their draws show it."""

from __future__ import annotations

import pytest
import torch

from mxref.verification.cases.draw import draw
from mxref.verification.cases.named import exact_sizes
from mxref.verification.cases.scope import Scope

PLAIN = Scope("quick", "cpu", interpreted=False)
CASES = {case.name.removeprefix("integer, ").removesuffix(", rounded"): case for case in exact_sizes(PLAIN)}


def test_sizes_leave_over_what_those_of_real_models_do() -> None:
    """2880 = 22·128 + 64 and 5760 = 45·128; steps of 64 and blocks of 32 along K."""
    many = [case for case in CASES.values() if not case.dense]
    assert any(case.K > 512 and case.K % 128 == 64 and case.rows // case.experts > 128 for case in many)
    assert any(case.K // 64 % 4 == 1 and case.K // 32 % 4 == 2 for case in many)
    assert any(case.N > 256 and case.N % 128 == 64 for case in many)
    assert any(case.N > 1024 and case.N // 128 % 2 and case.N % 128 == 0 for case in many)
    assert any(case.K >= 1024 and case.K % 256 == 0 and case.rows <= 16 for case in many)
    assert {24, 96} <= {case.rank for case in many}
    assert {128, 384, 512} <= {case.experts for case in many}


@pytest.mark.parametrize("seed", [0, 1])
def test_every_draw_succeeds_and_first_and_last_experts_have_rows(seed: int) -> None:
    for case in CASES.values():
        offsets = draw(case, seed=seed).problem.expert_offsets
        assert case.rows < 20 or case.experts == 1 or 0 < offsets[0] <= offsets[-2] < offsets[-1], case.name


def test_layers_of_models_are_asked_whole() -> None:
    """Many experts beside long sums, biases that are frozen, and one token for as many."""
    layers = [case for case in CASES.values() if case.experts >= 32 and case.K >= 512]
    frozen = [case for case in layers if case.bias and not case.call.wants("dbias")]
    assert {(case.grouped_in, case.grouped_out, case.gate_slots > 0) for case in frozen} >= {
        (False, True, False),
        (True, False, True),
    }
    assert any(case.tokens == 1 and case.k > 1 for case in layers)


def test_counts_may_be_equal() -> None:
    for name in ("equal counts", "equal counts in expert order"):
        problem = draw(CASES[name]).problem
        rows = torch.diff(problem.expert_offsets, prepend=problem.expert_offsets.new_zeros(1))
        assert len(set(rows.tolist())) == 1
        assert problem.E > 1


def test_numbers_in_fp32_are_beyond_tf32_in_either_pass() -> None:
    beyond = set()
    for case in CASES.values():
        if "TF32" in case.name:
            sample = draw(case)
            for name, x in (("x", sample.problem.inputs), ("dOut", sample.grad_out)):
                if bool((x.view(torch.int32) & 0x1FFF).any()):
                    beyond.add(name)
    assert beyond == {"x", "dOut"}


def test_tiles_before_sentinels_are_full() -> None:
    for name in ("full tiles before sentinels", "full tiles before sentinels, gates"):
        problem = draw(CASES[name]).problem
        assert problem.expert_offsets.tolist() == [128, 256]
        assert problem.P > 256
    assert draw(CASES["full tiles before sentinels"]).problem.P == 384


def test_only_s_times_Z_leaves_fp16() -> None:
    problem = draw(CASES["s·Z beyond fp16"]).problem
    assert problem.lora_A is not None
    A = problem.lora_A.view(problem.E, problem.rank, -1)
    Z = torch.stack([problem.inputs.double() @ each.double().T for each in A]).half()
    alone = Z.abs()[Z.isfinite() & (Z != 0)]
    assert alone.numel()
    assert bool((alone.double() * problem.scaling).half().isinf().all())
