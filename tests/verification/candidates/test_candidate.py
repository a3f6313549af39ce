"""What a callable may leave out, how it is found, and plain PyTorch beside the golden model."""

from __future__ import annotations

import inspect
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from judging import ask, integers
from torch import Tensor

import mxref
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.arithmetic.tensor_bytes import share_elements
from mxref.verification.candidates import starting_point
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.loading import declare, load
from mxref.verification.candidates.probe import call_first, runs_interpreted
from mxref.verification.candidates.shipped import golden, torch_composite
from mxref.verification.cases.call import Call
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


def test_the_candidate_works_on_copies() -> None:
    def scribble(**operands: Any) -> Tensor:
        out = mxref.parallel_linear_lora(**operands)
        operands["inputs"].detach().zero_()
        return out

    sample = draw(SMALL)
    before = sample.problem.inputs.clone()
    Candidate("scribble", scribble).trace(sample)
    assert torch.equal(sample.problem.inputs, before)


@pytest.mark.gpu
def test_work_left_on_another_stream_is_noticed() -> None:
    def late(**operands: Any) -> Tensor:
        y = mxref.parallel_linear_lora(**operands)
        out, stream = torch.zeros_like(y), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000_000)  # a second: longer than a busy host looks away
            out = out + y
        return out

    (finding,) = ask("interval", Candidate("late", late), draw(SMALL, "cuda"))
    assert "Y changed after the call had returned" in finding.reason


@pytest.fixture
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("own_path")
class TestLoad:
    SOURCE = """
from mxref import parallel_linear_lora
def layer(**operands):
    return parallel_linear_lora(**operands)
layer.mxref_points = ("z-unrounded",)
layer.mxref_accumulation = "fp32-blocks-32"
layer.mxref_covers = "forward, gates=none"
class holder:
    layer = staticmethod(layer)
number = 3
def odd(): ...
odd.mxref_points = "rounded-twice"
def part(): ...
part.mxref_covers = "gates=purple"
"""

    def test_declarations_come_from_the_callable_or_the_caller(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.py"
        file.write_text(self.SOURCE)
        own = load(f"{file}:layer")
        assert own.declared_points == ("z-unrounded",)
        assert own.accumulation == ACCUMULATIONS["fp32-blocks-32"]
        assert str(own.covers) == "forward, gates=none"
        assert own.points(torch.bfloat16).z is False
        told = declare(load(f"{file}:holder.layer"), [], "undeclared")
        assert told.declared_points == ()
        assert str(declare(load(f"{file}:layer"), None, None, "rank>=16").covers) == "rank>=16"
        assert told.accumulation == ACCUMULATIONS["undeclared"]

    def test_modules_of_the_current_folder_come_after_installed_ones(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("")
        (tmp_path / "only_here_layer.py").write_text(self.SOURCE)
        monkeypatch.chdir(tmp_path)
        before = list(sys.path)
        assert load("only_here_layer:layer").name == "only_here_layer:layer"
        assert sys.path == [*before, str(tmp_path)]

    @pytest.mark.parametrize(
        ("attribute", "message"),
        [
            ("absent", "has no 'absent'"),
            ("number", "expected a callable"),
            ("odd", "'rounded-twice' is unknown"),
            ("part", "'purple' is no class of gates"),
        ],
    )
    def test_errors_say_what_is_wrong(self, tmp_path: Path, attribute: str, message: str) -> None:
        file = tmp_path / "mine.py"
        file.write_text(self.SOURCE)
        with pytest.raises(ValueError, match=message):
            load(f"{file}:{attribute}")

    @pytest.mark.parametrize("source", ["import nothing_of_that_name", "def (", "import sys; sys.exit(0)"])
    def test_a_file_that_does_not_import(self, tmp_path: Path, source: str) -> None:
        file = tmp_path / "broken.py"
        file.write_text(source)
        with pytest.raises(ValueError, match="does not import"):
            load(f"{file}:layer")


def test_the_call_that_looks_for_an_interpreter_leaves_no_state_changed() -> None:
    """What it left would be taken for what was there before the first item."""

    def leaks(**operands: Any) -> Tensor:
        torch.use_deterministic_algorithms(True)
        return mxref.parallel_linear_lora(**operands)

    assert not runs_interpreted(Candidate("leaks", leaks), torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()


class _Tap(torch.autograd.Function):
    """The identity, whose gradient goes through a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Any) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.change(grad), None


def tapped(operand: str, change: Any) -> Candidate:
    """The golden model with a change to one operand's gradient; "Y": to dOut."""

    def call(**operands: Any) -> Tensor:
        if operand == "Y":
            return _Tap.apply(mxref.parallel_linear_lora(**operands), change)  # type: ignore[no-any-return, no-untyped-call]
        given = _Tap.apply(operands[operand], change)  # type: ignore[no-untyped-call]
        return mxref.parallel_linear_lora(**operands | {operand: given})

    return Candidate("tapped", call)


@pytest.mark.parametrize(
    ("context", "state"),
    [
        ("deterministic", torch.are_deterministic_algorithms_enabled),
        ("bf16 by default", lambda: torch.get_default_dtype() == torch.bfloat16),
        ("autocast in backward", lambda: torch.is_autocast_enabled("cpu")),
        ("autocast in both passes", lambda: torch.is_autocast_enabled("cpu")),
    ],
)
def test_global_state_holds_in_the_backward_pass_too(context: Any, state: Any) -> None:
    sample = draw(replace(SMALL, data="integer", scaling=0.5, call=Call(context=context)))
    wrong = tapped("inputs", lambda grad: grad / 2 if state() else grad)
    assert {finding.tensor for finding in ask("integer", wrong, sample) if not finding.ok} == {"dX"}
    assert not state()


def test_a_backward_pass_that_changes_dOut_is_told() -> None:
    sample = draw(replace(SMALL, data="integer", scaling=0.5))
    (finding, *_) = ask("integer", tapped("Y", lambda grad: grad.zero_() + 1.0), sample)
    assert "changes dOut or an operand in place" in finding.reason


@pytest.mark.parametrize("context", ["autocast", "autocast in backward", "autocast in both passes"])
def test_plain_pytorch_ignores_autocast_in_either_pass(context: Any) -> None:
    case = replace(SMALL, call=Call(context=context))
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


def test_parts_of_one_buffer_share_no_elements() -> None:
    buffer = torch.zeros(6, 8)
    assert share_elements(buffer, buffer[2:3, 3:4])
    assert share_elements(buffer[:, 0], buffer[5])
    assert not share_elements(buffer[:, ::2], buffer[:, 1::2])
    assert not share_elements(buffer[:3], buffer[3:])
    assert not share_elements(buffer[:0], buffer)
    assert not share_elements(buffer, buffer.clone())


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
