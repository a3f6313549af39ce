"""How the activation between the projections is asked: forward and backward, in memory that is watched."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import torch

from mxref.verification.candidates.answer import Answer, Outputs, answered
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.memory import FreshRedZones, RedZone
from mxref.verification.candidates.own.interpreted import checked_indices, checked_memory
from mxref.verification.cases.own.activation import ActivationSample

__all__ = ["with_its_gradient"]


def with_its_gradient(candidate: Candidate, sample: ActivationSample) -> list[Answer]:
    """ "H" and "dgate_up" of one call.

    What is allocated lies between red zones, and so do the operands if they are contiguous; interpreted, addresses and
    the width of indices are watched too.
    """
    operators = candidate.operators
    assert operators is not None
    contiguous = sample.gate_up.is_contiguous()
    zones = [RedZone(x, float("nan")) for x in (sample.gate_up, sample.grad)] if contiguous else []
    gate_up, grad = (zone.inside for zone in zones) if contiguous else (sample.gate_up, sample.grad)

    def run() -> Outputs:
        leaf = gate_up.detach().requires_grad_()
        with ExitStack() as watched:
            if leaf.device.type == "cpu":
                watched.enter_context(checked_memory())
                watched.enter_context(checked_indices())
            h = operators.layer.activation.gated(leaf, sample.case.form)
            (gradient,) = torch.autograd.grad(h, leaf, grad.to(h.dtype))
        return {"H": h.detach(), "dgate_up": gradient}

    with FreshRedZones() as fresh:
        answer = answered(run)
    operands = (zone.written(name) for name, zone in zip(("gate_up", "dH"), zones, strict=False))
    return [replace(answer, written=(*operands, fresh.written()))]
