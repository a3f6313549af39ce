"""The first call of a candidate: in rare circumstances, and whether it runs in Triton's interpreter."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from mxref.verification.candidates.answer import answered
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.global_state import GlobalState
from mxref.verification.cases.draw import draw
from mxref.verification.cases.small import smallest


def call_first(candidate: Candidate, device: torch.device) -> None:
    """One small call under inference_mode and autocast, with bf16 as the default dtype.

    Whatever a candidate makes once and keeps is made in it, and has to do for training. A candidate that fails the
    call, or leaves torch's state changed, which is put back, is for the checks to find.
    """
    case = candidate.covers.of(candidate.covers.fitted(smallest(torch.float32)))
    before, sample = GlobalState.now(), draw(case, device)
    with torch.random.fork_rng():  # or a seed that every call sets would be set before the checks look
        torch.set_default_dtype(torch.bfloat16)
        answered(lambda: candidate.run(sample.called(mode="inference", autocast="forward pass")))
    before.restore()


def runs_interpreted(candidate: Candidate, device: torch.device) -> bool:
    """Whether a candidate's first call, `call_first`, starts an interpreted kernel: such a one computes in fp32 alone.

    A candidate that fails the call is taken to be plain PyTorch.
    """
    if device.type != "cpu":
        call_first(candidate, device)
        return False
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        call_first(candidate, device)
        return False
    started = False
    launch = GridExecutor.__call__

    def noticed(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal started
        started = True
        return launch(self, *args, **kwargs)

    with patch.object(GridExecutor, "__call__", noticed):
        call_first(candidate, device)
    return started
