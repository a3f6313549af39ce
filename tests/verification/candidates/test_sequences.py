"""Sequences of calls: who leaves the caller's stream is seen, and what torch itself refuses is no fault."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from judging import BY_NAME
from torch import Tensor

from mxref.scattermoe import RoundingPoints
from mxref.verification.candidates import sequences
from mxref.verification.candidates.answer import OPERAND_OF, UnusableAnswerError
from mxref.verification.candidates.call_machine import WAYS, DifferentError
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.graphs import GRAPHS
from mxref.verification.candidates.operand_sets import CHANGED, changed, operand_sets
from mxref.verification.candidates.shipped import golden, torch_composite
from mxref.verification.candidates.written_steps import WrittenSteps
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.draw import draw
from mxref.verification.cases.integer import is_exact_everywhere
from mxref.verification.cases.scope import Scope
from mxref.verification.cases.subset import parse_subset
from mxref.verification.gate.plan import plan
from mxref.verification.gate.run import run_gate


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
    calls = WrittenSteps(golden(), sample("cpu"), seen)
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

    WrittenSteps(honest, asked, []).on_streams("a", "d")
    with pytest.raises(DifferentError):
        WrittenSteps(Candidate("early", early), asked, []).on_streams("a", "d")


class _ReadsY(torch.autograd.Function):
    """Y through a custom function whose backward pass reads it: torch refuses gradients once Y was changed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        out = y.clone()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, dOut: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return torch.where(out.isnan(), 0.0, dOut)


class _GivesView(torch.autograd.Function):
    """Y as a view that a custom function made: torch refuses the change itself."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone().view(y.shape)

    @staticmethod
    def backward(ctx: Any, dOut: Tensor) -> Tensor:
        return dOut.clone()


class _KeepsY(torch.autograd.Function):
    """The same as the first, but Y is kept where torch does not see that it changes."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.out = y.clone()
        ctx.first = ctx.out.detach().clone()
        return ctx.out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dOut: Tensor) -> Tensor:
        return torch.where(ctx.out == ctx.first, dOut, 0.0)


def _through(function: Any) -> Candidate:
    honest = torch_composite()
    return Candidate(function.__name__, lambda **operands: function.apply(honest.call(**operands)))


@pytest.mark.parametrize("function", [_ReadsY, _GivesView])
def test_what_torch_refuses_of_a_changed_output_is_no_fault(function: Any) -> None:
    for how in GRAPHS:
        WrittenSteps(_through(function), sample("cpu"), []).in_graph("a", how)


def test_a_changed_output_that_is_read_unseen_is_one() -> None:
    with pytest.raises(DifferentError, match="added to Y"):
        WrittenSteps(_through(_KeepsY), sample("cpu"), []).in_graph("a", "1 is added to Y in place")


@pytest.mark.parametrize(
    ("covers", "left"),
    [
        ("dtype=fp32", {"another dtype"}),
        ("adapters=ordinary", {"no adapters"}),
        ("routing=sentinels", {"no rows"}),
        ("weights=packed", {"decoded", "decoded, signs put off"}),
        ("layout of x=contiguous", {"e", "f"}),
        ("storage=its own", {"one storage"}),
    ],
)
def test_sequences_ask_for_what_is_covered_alone(covers: str, left: set[str]) -> None:
    """Sets that a candidate does not cover are left out, and a takes their place."""
    asked, honest = sample("cpu"), torch_composite()
    part = Candidate("", honest.call, covers=parse_subset(covers))
    machine = WrittenSteps(part, asked, [])
    assert operand_sets(asked).keys() - machine.samples.keys() == left
    for which in left:
        machine.forward(which)
        assert machine.pending[-1].which == "a"


def test_all_signs_read_wrongly_do_not_cancel() -> None:
    """Where every operand's sign is put off, the results of who reads memory alone are right."""
    honest = torch_composite()

    def reads_memory(**operands: Any) -> Any:
        read = {n: torch._neg_view(x) if isinstance(x, Tensor) and x.is_neg() else x for n, x in operands.items()}
        return honest.call(**read)

    machine = WrittenSteps(Candidate("", reads_memory), sample("cpu"), [])
    machine.forward("signs put off")
    with pytest.raises(DifferentError):
        machine.forward("sign of x put off")


def test_operands_in_one_storage_have_versions_of_their_own() -> None:
    """Who makes one a module's parameter changes that one's version, and no other."""
    problem = operand_sets(sample("cpu"))["one storage"].problem
    A, B = problem.lora_A, problem.lora_B
    assert A is not None
    assert B is not None
    assert A.untyped_storage().data_ptr() == B.untyped_storage().data_ptr()
    before = B._version
    A.neg_()
    assert B._version == before


def test_nobody_who_has_no_backward_pass_is_asked_for_dX_alone() -> None:
    asked = sample("cpu")
    assert "dX alone" in operand_sets(asked)
    assert "dX alone" not in operand_sets(asked.called(needs=()))


@pytest.mark.parametrize("covers", ["forward", "gradients=none", "one backward"])
def test_who_has_no_backward_pass_is_asked_all_the_same(covers: str) -> None:
    """No step of a sequence wants what is not covered, nor goes wrong for want of it."""
    part = Candidate("", torch_composite().call, covers=parse_subset(covers))
    items = plan(Scope("quick", "cpu", subset=part.covers), own=False, checks=[BY_NAME["sequences"]])[:1]
    findings = run_gate(part, items, torch.device("cpu"), suite="", seed=0).findings
    assert {finding.check for finding in findings} >= {"sequences"}
    assert [str(finding) for finding in findings if not finding.ok] == []


def test_many_outputs_in_a_row_are_told_once() -> None:
    seen: list[Any] = []
    machine = WrittenSteps(golden(), sample("cpu"), seen)
    for _ in range(3):
        machine.forward("d")
    assert seen[0][1].circumstance == "after «y0 = layer(d), 3 times»"


@pytest.mark.parametrize("operand", CHANGED)
def test_changes_keep_sums_exact_and_one_is_of_one_element(operand: str) -> None:
    for case in BY_NAME["sequences"].cases(Scope("quick", "cpu", interpreted=False)):
        assert isinstance(case, Case)
        asked = operand_sets(draw(case, "cpu"))["a"]
        for times in range(4):
            for old, new in changed(asked.problem, operand, times):
                if times == 1 and operand in (*OPERAND_OF.values(), "packed", "expert_weights"):
                    assert int((old != new).sum()) == 1
                old.copy_(new)
            assert is_exact_everywhere(asked.problem, asked.grad_out, RoundingPoints.contract(torch.bfloat16))


def test_a_parameter_is_the_same_in_every_call() -> None:
    """It holds a gradient already, which stays."""
    honest, given = torch_composite(), list[Tensor]()

    def noting(**operands: Any) -> Any:
        given.append(operands["lora_A"])
        return honest.call(**operands)

    machine = WrittenSteps(Candidate("", noting), sample("cpu"), [], owner="parameter")
    for _ in range(2):
        machine.forward("a")
        machine.backward(index=0, retain=False)
    first, second = given
    assert first is second
    assert isinstance(first, torch.nn.Parameter)
    assert torch.equal(first.grad, torch.ones_like(first))


def test_a_way_that_is_not_covered_is_left_out() -> None:
    part = Candidate("", torch_composite().call, covers=parse_subset("operands=leaf"))
    assert WrittenSteps(part, sample("cpu"), [], **WAYS[1].how).script == ["in all calls autocast: both passes"]


class _Forgetful:
    """Honest plain PyTorch, but for what one part remembers, or does, between calls."""

    def __init__(self, part: str) -> None:
        self.part, self.calls, self.kept = part, 0, dict[Any, Any]()

    def __call__(self, **operands: Any) -> Any:
        x, self.calls = operands["inputs"], self.calls + 1
        if self.part == "last Y" and x is self.kept.get("Y"):
            x = operands["inputs"] = x * 2
        refused = x.shape[0] * operands["k"] != len(operands["sorted_expert_idxs"])
        if self.part == "k":
            self.kept["k"] = operands["k"]
            x.detach().clone()
            operands["k"] = self.kept["k"]
        if self.part == "two slots":
            slot = self.calls % 2
            self.kept[slot] = x.detach().clone()
            x.detach().clone()
            operands["inputs"] = x * torch.ones(()) if torch.equal(self.kept[slot], x.detach()) else x * 0
        if self.part == "mode":
            before = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(False)
        if self.part == "refusal":
            self.kept["refused"] = refused or self.kept.get("refused", False)
            operands["scaling"] *= 1 + self.kept["refused"]
        if self.part == "dtype" and refused:
            torch.set_default_dtype(torch.float32)
        if refused:
            raise ValueError("k does not fit")
        y = torch_composite().call(**operands)
        if self.part == "mode":
            torch.use_deterministic_algorithms(before)
        if self.part == "dOut":
            y.register_hook(lambda dOut: dOut * 2 if dOut.requires_grad or dOut.is_inference() else dOut)
        if self.part == "address":
            at, B = operands["lora_B"].data_ptr(), operands["lora_B"]
            y.register_hook(lambda dOut: dOut if B.data_ptr() == at else dOut * 2)
        self.kept["Y"] = y
        return y


@pytest.mark.parametrize(
    ("part", "asks"),
    [
        ("last Y", lambda machine: machine.chained()),
        ("k", lambda machine: machine.at_once("a", "row by row")),
        ("two slots", lambda machine: machine.at_once("a", "d", "b")),
        ("mode", lambda machine: machine.at_once("a", "d", algorithms="deterministic")),
        ("address", lambda machine: (machine.forward("a"), machine.taken_again("a"), machine.backward(0, False))),
        ("refusal", sequences._as_behind_errors),
        ("dtype", sequences._as_behind_errors),
        ("dOut", lambda machine: machine.given("a", "dOut requires a gradient")),
        ("dOut", lambda machine: machine.given("a", "dOut was made under inference_mode")),
    ],
)
def test_what_a_candidate_remembers_between_calls_is_seen(part: str, asks: Callable[[WrittenSteps], None]) -> None:
    asks(WrittenSteps(Candidate("", _Forgetful("")), sample("cpu"), []))
    with pytest.raises((DifferentError, UnusableAnswerError, IndexError)):
        asks(WrittenSteps(Candidate("", _Forgetful(part)), sample("cpu"), []))


def test_what_is_raised_is_told_with_the_sequence() -> None:
    def second(**operands: Any) -> Any:
        if operands["scaling"] < 0:
            raise ValueError("s is negative")
        return torch_composite().call(**operands)

    (answer,) = sequences.in_sequences(Candidate("", second), sample("cpu"), shrink=False)
    assert isinstance(answer.error, ValueError)
    assert answer.circumstance.endswith("y521 = layer(a); y522 = layer(b)»")
