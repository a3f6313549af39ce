"""How callers call: contexts, threads, what they overwrite and keep, and whose memory results have."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from judging import ask
from tapped import tap
from torch import Tensor

import mxref
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.shipped import golden, torch_composite
from mxref.verification.cases.call import Call
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw
from mxref.verification.checks.finding import Status

SMALL = Case("small", 2, 64, 96, 9, 2, 4, bias=True, gate_slots=2)
BF16 = Case("bf16", 3, 64, 96, 21, 2, 4, torch.bfloat16, torch.float32, bias=True, gate_slots=2, routing="sentinels")


def tapped(operand: str, change: Any) -> Candidate:
    """The golden model with a change to one operand's gradient; "Y": to dOut."""

    def call(**operands: Any) -> Tensor:
        if operand == "Y":
            return tap(mxref.parallel_linear_lora(**operands), change)
        return mxref.parallel_linear_lora(**operands | {operand: tap(operands[operand], change)})

    return Candidate("tapped", call)


@pytest.mark.parametrize(
    ("call", "state"),
    [
        (Call(algorithms="deterministic"), torch.are_deterministic_algorithms_enabled),
        (Call(default_dtype=torch.bfloat16), lambda: torch.get_default_dtype() == torch.bfloat16),
        (Call(autocast="backward pass to fp16"), lambda: torch.is_autocast_enabled("cpu")),
        (Call(autocast="both passes"), lambda: torch.is_autocast_enabled("cpu")),
    ],
)
def test_global_state_holds_in_the_backward_pass_too(call: Call, state: Any) -> None:
    sample = draw(replace(SMALL, data="integer", scaling=0.5, call=call))
    wrong = tapped("inputs", lambda grad: grad / 2 if state() else grad)
    assert {finding.tensor for finding in ask("integer", wrong, sample) if not finding.ok} == {"dX"}
    assert not state()


def test_a_backward_pass_that_changes_dOut_is_told() -> None:
    sample = draw(replace(SMALL, data="integer", scaling=0.5))
    (finding, *_) = ask("integer", tapped("Y", lambda grad: grad.zero_() + 1.0), sample)
    assert "changes dOut or an operand in place" in finding.reason


def test_a_gradient_whose_rows_share_memory_is_told() -> None:
    sample = draw(replace(SMALL, data="integer", scaling=0.5))
    (finding, *_) = ask("integer", tapped("lora_A", lambda grad: grad.new_zeros(1, 1).expand(grad.shape)), sample)
    assert "returned dA with rows or columns that share memory" in finding.reason


def test_a_gradient_with_a_graph_is_told() -> None:
    sample = draw(replace(SMALL, data="integer", scaling=0.5))
    (finding, *_) = ask("integer", tapped("lora_A", lambda grad: grad.clone().requires_grad_()), sample)
    assert "dA has a graph of its own" in finding.reason


@pytest.mark.parametrize("autocast", ["forward pass", "backward pass to fp16", "both passes"])
def test_plain_pytorch_ignores_autocast_in_either_pass(autocast: Any) -> None:
    case = replace(SMALL, call=Call(autocast=autocast))
    findings = ask("interval", torch_composite(), draw(case))
    assert [str(finding) for finding in findings if finding.status is not Status.PASS] == []


def test_each_pass_runs_in_the_thread_that_the_call_says() -> None:
    seen: list[bool] = []
    main = threading.get_ident()

    def noting(**operands: Any) -> Tensor:
        seen.append(threading.get_ident() != main)
        y = mxref.parallel_linear_lora(**operands)
        y.register_hook(lambda dOut: seen.append(threading.get_ident() != main))  # type: ignore[no-untyped-call]
        return y

    for threads in ("one", "another", "another in backward"):
        Candidate("noting", noting).run(draw(replace(SMALL, call=Call(threads=threads))))
    assert seen == [False, False, True, False, False, True]


def test_what_is_raised_in_another_thread_is_raised_here() -> None:
    def leaving(**operands: Any) -> Tensor:
        raise SystemExit(0)

    (finding,) = ask("interval", Candidate("leaving", leaving), draw(replace(SMALL, call=Call(threads="another"))))
    assert finding.status is Status.FAIL
    assert "SystemExit" in finding.reason


class _Remembering(torch.autograd.Function):
    """The identity, which is NaN backwards where its output is NaN by then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, save: bool) -> Tensor:
        y = x.clone()
        ctx.save_for_backward(*([y] if save else []))
        ctx.y = None if save else y.detach()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (y,) = ctx.saved_tensors if ctx.y is None else (ctx.y,)
        return torch.where(y.isnan(), y, grad), None


def test_an_output_that_the_caller_overwrites_is_saved_or_not_needed() -> None:
    """Autograd refuses a saved one that was changed; the case is then asked as it is without the change."""

    def remembering(save: bool) -> Candidate:
        return Candidate("", lambda **o: _Remembering.apply(mxref.parallel_linear_lora(**o), save))  # type: ignore[no-untyped-call]

    sample = draw(replace(SMALL, data="integer", scaling=0.5, call=Call(output="overwritten")))
    assert all(finding.ok for finding in ask("integer", remembering(save=True), sample))
    assert not all(finding.ok for finding in ask("integer", remembering(save=False), sample))
    assert all(finding.ok for finding in ask("integer", golden(), sample))


@pytest.mark.parametrize("owner", ["leaf", "parameter", "computed"])
def test_gradients_accumulate(owner: Any) -> None:
    sample = draw(replace(SMALL, data="integer", scaling=0.5, call=Call(backward="accumulated", owner=owner)))
    passes: list[int] = []

    def kept_in_one_buffer(grad: Tensor) -> Tensor:
        passes.append(1)
        return grad * len(passes)

    assert all(finding.ok for finding in ask("integer", golden(), sample))
    findings = ask("integer", tapped("lora_A", kept_in_one_buffer), sample)
    assert {finding.tensor for finding in findings if not finding.ok} == {"dA"}


def test_an_operand_that_is_changed_behind_autograd_s_back_is_told() -> None:
    """In any case, not only where memory is watched."""

    def parking(**operands: Any) -> Tensor:
        y = mxref.parallel_linear_lora(**operands)
        operands["sorted_scattered_idxs"].data[operands["sorted_expert_idxs"] >= operands["expert_offsets"].numel()] = 0
        return y

    (finding,) = ask("interval", Candidate("parking", parking), draw(BF16))
    assert "changes sorted_scattered_idxs in place" in finding.reason
    assert all(finding.ok for finding in ask("interval", Candidate("parking", parking), draw(SMALL))), "no sentinels"


class _Straight(torch.autograd.Function):
    """y; dOut is the gradient of x too."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda inputs, **operands: inputs, "Y shares memory with inputs"),
        (lambda inputs, **operands: _Straight.apply(inputs.detach(), inputs), "dX shares memory with dOut"),
    ],
)
def test_results_have_memory_of_their_own(call: Any, told: str) -> None:
    square = Case("square", 1, 64, 64, 9, 1, 4, call=Call(needs=("dX",)))
    (finding,) = ask("interval", Candidate("sharing", call), draw(square))
    assert told in finding.reason
