"""What a callable may leave out and must not do, and plain PyTorch beside the golden model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from judging import ask, integers
from torch import Tensor

import mxref
from mxref.verification.candidates import candidate
from mxref.verification.candidates.answer import UnusableAnswerError
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.shipped import golden, torch_composite
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw
from mxref.verification.checks.finding import Status

SMALL = Case("small", 2, 64, 96, 9, 2, 4, bias=True, gate_slots=2)
BF16 = Case("bf16", 3, 64, 96, 21, 2, 4, torch.bfloat16, torch.float32, bias=True, gate_slots=2, routing="sentinels")


@pytest.mark.parametrize("case", [SMALL, BF16, *integers("cpu")], ids=lambda case: case.name)
def test_plain_pytorch_agrees_with_the_golden_model(case: Case) -> None:
    findings = ask("integer" if case.exact else "interval", torch_composite(), draw(case))
    assert findings
    assert [str(finding) for finding in findings if finding.status is not Status.PASS] == []


def test_plain_pytorch_rounds_where_the_contract_does() -> None:
    sample = draw(BF16, seed=3)
    expected, got = golden().run(sample), torch_composite().run(sample)
    for tensor in ("Y", "dX"):
        mine, theirs = got[tensor], expected[tensor]
        assert mine is not None
        assert theirs is not None
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, theirs), tensor


def lacking(missing: str, instead: str = "") -> Candidate:
    """The golden model behind a signature that lacks one keyword, and has another in its place."""

    def call(**operands: Any) -> Tensor:
        operands.pop(instead, None)
        return mxref.parallel_linear_lora(**operands)

    names = inspect.signature(mxref.parallel_linear_lora).parameters.keys() - {missing} | ({instead} - {""})
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in sorted(names)]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return Candidate("lacking", call)


def test_a_keyword_the_callable_lacks_is_a_failure_where_a_call_needs_it() -> None:
    plain = Case("plain", 2, 64, 96, 9, 2, 4, bias=True)
    assert {finding.status for finding in ask("interval", lacking("gates"), draw(plain))} == {Status.PASS}
    (finding,) = ask("interval", lacking("gates"), draw(SMALL))
    assert finding.status is Status.FAIL
    assert "takes no argument 'gates'. " in finding.reason
    (finding,) = ask("interval", lacking("gates", "gate"), draw(SMALL))
    assert "takes no argument 'gates'; the nearest that it has is 'gate'" in finding.reason
    fused = replace(plain, use_fused_dX=True)
    (finding,) = ask("interval", lacking("use_fused_dX", "use_fused_dx"), draw(fused))
    assert "'use_fused_dx'" in finding.reason


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda **operands: mxref.parallel_linear_lora(**operands).detach(), "declare `--covers forward`"),
        (lambda **operands: mxref.parallel_linear_lora(**operands)[:-1], "Y has shape (8, 96); expected (9, 96)"),
        (lambda **operands: mxref.parallel_linear_lora(**operands).half(), "torch.float16; expected torch.float32"),
    ],
)
def test_what_cannot_be_judged_fails(call: Any, reason: str) -> None:
    (finding,) = ask("interval", Candidate("unusable", call), draw(SMALL))
    assert finding.status is Status.FAIL
    assert reason in finding.reason


def test_a_wider_output_is_none_either() -> None:
    """Not even of no rows: the next operation would be another one."""
    wide = Candidate("wide", lambda **operands: mxref.parallel_linear_lora(**operands).float())
    for tokens in (0, 9):
        (finding,) = ask("interval", wide, draw(replace(SMALL, dtype=torch.bfloat16, tokens=tokens)))
        assert (finding.status, finding.reason) == (
            Status.FAIL, "returned torch.float32; expected torch.bfloat16, that of inputs"
        )  # fmt: skip


def test_torch_s_own_not_implemented_error_is_no_declining() -> None:
    def unsupported(**operands: Any) -> Tensor:
        raise NotImplementedError("'addmm' not implemented for 'Float8'")

    (finding,) = ask("interval", Candidate("unsupported", unsupported), draw(SMALL))
    assert finding.status is Status.FAIL
    assert "mxref.NotCovered" in finding.reason


class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise mxref.NotCovered("gradients")


def test_a_backward_pass_may_decline_too() -> None:
    candidate = Candidate("half", lambda **operands: Half.apply(mxref.parallel_linear_lora(**operands)))
    (finding,) = ask("interval", candidate, draw(SMALL))
    assert (finding.status, finding.reason) == (Status.NOT_COVERED, "gradients")


def test_a_backward_pass_that_sets_a_gradient_itself_fails() -> None:
    def assigning(lora_A: Tensor, **operands: Any) -> Tensor:
        y = mxref.parallel_linear_lora(lora_A=lora_A, **operands)
        y.register_hook(lambda dOut: setattr(lora_A, "grad", torch.zeros_like(lora_A)))  # type: ignore[no-untyped-call]
        return y

    (finding,) = ask("interval", Candidate("assigning", assigning), draw(SMALL))
    assert finding.status is Status.FAIL
    assert "sets lora_A.grad itself" in finding.reason


@pytest.mark.parametrize("error", [mxref.NotCovered("checkpoints"), SystemExit(3)])
def test_no_error_passes_a_checkpointed_region(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch before 2.13 leaves the hooks of such a region where they are: whoever declines would be blamed for them."""

    def refuse(**operands: Any) -> Tensor:
        raise error

    def region(function: Callable[[], Any], **options: Any) -> Any:
        try:
            return function()
        except BaseException:
            pytest.fail("the region raises")

    monkeypatch.setattr(candidate, "checkpoint", region)
    with pytest.raises(type(error)):
        Candidate("refuse", refuse).run(draw(SMALL).called(saved="checkpoint"))


def test_the_candidate_works_on_copies() -> None:
    def scribble(**operands: Any) -> Tensor:
        out = mxref.parallel_linear_lora(**operands)
        operands["inputs"].detach().zero_()
        return out

    sample = draw(SMALL)
    before = sample.problem.inputs.clone()
    with pytest.raises(UnusableAnswerError, match="changes inputs in place"):
        Candidate("scribble", scribble).trace(sample)
    assert torch.equal(sample.problem.inputs, before)


@pytest.mark.gpu
def test_work_left_on_another_stream_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when the gate waits for all of the GPU's work: no host is too busy to see it."""
    waiting, finish = list[tuple[Tensor, Tensor]](), torch.cuda.synchronize

    def late(**operands: Any) -> Tensor:
        y = mxref.parallel_linear_lora(**operands)
        waiting.append((torch.zeros_like(y), y.detach()))
        return waiting[-1][0]

    def synchronize() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            while waiting:
                out, y = waiting.pop()
                out.detach().copy_(y)
        finish()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    (finding,) = ask("interval", Candidate("late", late), draw(SMALL, "cuda"))
    assert "Y changed after the call had returned" in finding.reason
