"""Sequences of calls on streams of a GPU: who leaves the caller's stream is seen."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from judging import BY_NAME
from torch import Tensor

from mxref.verification.candidates.call_machine import CallMachine, DifferentError
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.shipped import golden, torch_composite
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.draw import draw
from mxref.verification.cases.scope import Scope


def sample(device: str) -> Sample:
    (case, *_) = BY_NAME["sequences"].cases(Scope("quick", device))
    assert isinstance(case, Case)
    return draw(case, device)


def test_what_is_asked_on_two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU there is one: operands are filled, and each call's results are its own."""
    for name, instead in {
        "Stream": type("Stream", (), {"wait_stream": lambda self, other: None}),
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda: None,
        "_sleep": lambda cycles: None,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, instead)
    seen: list[Any] = []
    calls = CallMachine(golden(), sample("cpu"), seen)
    calls.on_streams("a", "d")
    assert seen
    assert calls.script == ["layer(a) and layer(d) and their gradients, each on a stream of its own"]


@pytest.mark.gpu
def test_an_operand_that_is_read_on_the_default_stream_is_seen() -> None:
    honest, asked = torch_composite(), sample("cuda")

    def early(inputs: Tensor, **others: Any) -> Any:
        with torch.cuda.stream(torch.cuda.default_stream()):
            inputs = inputs * 1.0  # before it is filled
        return honest.call(inputs=inputs, **others)

    CallMachine(honest, asked, []).on_streams("a", "d")
    with pytest.raises(DifferentError):
        CallMachine(Candidate("early", early), asked, []).on_streams("a", "d")
