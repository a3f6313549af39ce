"""The first call of a candidate: in rare circumstances, which it leaves as they were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mxref
from mxref.verification.candidates import starting_point
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.probe import call_first, runs_interpreted


def test_the_call_that_looks_for_an_interpreter_leaves_no_state_changed() -> None:
    """What it left would be taken for what was there before the first item."""

    def leaks(**operands: Any) -> Tensor:
        torch.use_deterministic_algorithms(True)
        return mxref.parallel_linear_lora(**operands)

    assert not runs_interpreted(Candidate("leaks", leaks), torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_process_s_first_call_is_made_in_rare_circumstances() -> None:
    seen: list[tuple[bool, bool, torch.dtype]] = []

    def noting(**operands: Any) -> Tensor:
        modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        seen.append((*modes, torch.get_default_dtype()))
        return mxref.parallel_linear_lora(**operands)

    call_first(Candidate("noting", noting), torch.device("cpu"))
    assert seen == [(True, True, torch.bfloat16)]
    assert torch.get_default_dtype() == torch.float32


def test_the_first_call_leaves_random_numbers_alone() -> None:
    """A candidate that sets the same seed in every call would have set it before the checks look."""

    def seeding(**operands: Any) -> Tensor:
        torch.manual_seed(0)
        return starting_point.layer(**operands)

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    call_first(Candidate("seeding", seeding), torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), before)
