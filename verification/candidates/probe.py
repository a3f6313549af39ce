"""Whether a candidate's kernels run in Triton's interpreter, seen by running one small call."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from mxref.verification.candidates.answer import answered
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.global_state import GlobalState
from mxref.verification.cases.draw import draw
from mxref.verification.cases.small import smallest


def runs_interpreted(candidate: Candidate, device: torch.device) -> bool:
    """Whether a call on the device starts an interpreted kernel: such a candidate computes in fp32 alone.

    A candidate that fails the call is taken to be plain PyTorch; what it fails at, or leaves changed in torch's state,
    which is put back, is for the checks to find.
    """
    if device.type != "cpu":
        return False
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return False
    started = False
    launch = GridExecutor.__call__

    def noticed(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal started
        started = True
        return launch(self, *args, **kwargs)

    before, sample = GlobalState.now(), draw(smallest(torch.float32))
    with patch.object(GridExecutor, "__call__", noticed):
        answered(lambda: candidate.run(sample))
    before.restore()
    return started
