"""What a candidate is compared with itself on: what it may not do, done on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from judging import ask, failed
from torch import Tensor

import mxref
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.shipped import golden, torch_composite
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.draw import draw
from mxref.verification.checks.finding import Status

PLAIN = draw(Case("plain", 3, 32, 64, 9, 2, 4))
ALL = draw(Case("everything", 3, 64, 32, 9, 2, 4, bias=True, gate_slots=2, routing="sentinels"))
GROUPED = draw(Case("grouped", 4, 32, 32, 12, 1, 3, grouped_in=True, grouped_out=True, routing="empty_experts"))
SAMPLES = pytest.mark.parametrize("sample", [PLAIN, ALL, GROUPED], ids=lambda sample: sample.case.name)

Call = Callable[..., Tensor]


def layer(**operands: Any) -> Tensor:
    operands.pop("use_fused_dX", None)
    operands.pop("use_fused_gather", None)
    return mxref.parallel_linear_lora(**operands)


def candidate(call: Call, **options: Any) -> Candidate:
    return Candidate("under test", call, **options)


class Gradient(torch.autograd.Function):
    """The identity, whose gradient goes through a callable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad), None


@SAMPLES
@pytest.mark.parametrize("make", [golden, torch_composite])
@pytest.mark.parametrize("checks", ["rows", "second backward", "determinism", ("poison", "unmutated")], ids=str)
def test_eager_implementations_pass(make: Callable[[], Candidate], sample: Sample, checks: str) -> None:
    findings = ask(checks, make(), sample)
    assert findings
    assert {finding.status for finding in findings} == {Status.PASS}


@pytest.mark.parametrize(("run", "how"), [(2, ", its programs in reverse order"), (3, "")])
def test_bits_that_change_from_run_to_run(run: int, how: str) -> None:
    runs = iter(range(1, 100))

    def restless(**operands: Any) -> Tensor:
        return layer(**operands) + (next(runs) == run) * 1e-6

    found = {finding.tensor: finding for finding in ask("determinism", candidate(restless), PLAIN)}
    assert found.keys() >= {"Y", "dX"}
    assert found["Y"].status is Status.FAIL
    assert found["dX"].status is Status.PASS
    assert found["Y"].reason.startswith(f"other bits in run {run}{how}: ")
    assert found["Y"].counterexample is not None


def test_a_gradient_that_comes_and_goes() -> None:
    for first in (0, 1):
        runs = iter(range(first, 100))

        def forgetful(runs: Iterator[int] = runs, **operands: Any) -> Tensor:
            return layer(**operands | {"lora_A": operands["lora_A"].detach()} if next(runs) % 2 else operands)

        found = {finding.tensor: finding for finding in ask("determinism", candidate(forgetful), PLAIN)}
        assert found["Y"].status is Status.PASS
        assert found["dA"].status is Status.FAIL
        assert found["dA"].reason.startswith("other bits in run 2")


def test_rows_that_see_each_other() -> None:
    def by_largest(**operands: Any) -> Tensor:
        scale = operands["inputs"].detach().abs().amax() * 3
        return layer(**operands | {"inputs": operands["inputs"] / scale}) * scale

    assert ("rows", "Y") in failed(ask("rows", candidate(by_largest), PLAIN))


def test_rows_that_see_how_many_there_are() -> None:
    def by_count(config: int = 0, **operands: Any) -> Tensor:
        return layer(**operands) * (1 + 1e-6 * operands["sorted_expert_idxs"].numel())

    assert failed(ask("rows", candidate(by_count), ALL)) == set()
    findings = ask("rows", candidate(by_count, configs=lambda dtype: [0, 1]), ALL)
    assert failed(findings) == {("rows", "Y"), ("rows", "dX"), ("rows", "dgates")}
    assert {finding.case for finding in findings if not finding.ok} == {f"everything, {i}, fewer rows" for i in (0, 1)}


def overread(x: Tensor, rows: int) -> Tensor:
    """The rows behind a tensor's last one, in the same memory."""
    return torch.as_strided(x.detach(), (rows, x.shape[1]), x.stride(), x.storage_offset() + x.numel())


def test_what_lies_around_an_operand() -> None:
    def reads_past_the_end(**operands: Any) -> Tensor:
        x, y = operands["inputs"], layer(**operands)
        behind = overread(x, 1) if x.untyped_storage().nbytes() // 4 > x.storage_offset() + x.numel() else x[:1] * 0
        return y + 0 * behind.sum()

    calls = count()

    def multiplies_what_it_should_mask(**operands: Any) -> Tensor:
        scratch = torch.empty(4) if next(calls) else torch.zeros(4)  # memory that happens to be zero at first
        return layer(**operands) + (0 * scratch).sum() * torch.ones(1)

    assert ("poison", "Y") in failed(ask("poison", candidate(reads_past_the_end), PLAIN))
    findings = ask("poison", candidate(multiplies_what_it_should_mask), PLAIN)
    assert failed(findings) == {("poison", "Y")}
    assert "of them NaN" in findings[0].reason


def test_operands_that_are_written_to() -> None:
    def flips_a_code(**operands: Any) -> Tensor:
        y = layer(**operands)
        operands["expert_weights"].packed[0, 0, 0] ^= 1
        return y

    def writes_past_the_end(**operands: Any) -> Tensor:
        A = operands["lora_A"].detach()
        if A.storage_offset():
            overread(A, 1).fill_(1)
        return layer(**operands)

    def scales_the_gradient_in_place(**operands: Any) -> Tensor:
        out: Tensor = Gradient.apply(layer(**operands), lambda grad: grad.mul_(2))
        return out

    assert ("unmutated", "lora_A") in failed(ask("unmutated", candidate(writes_past_the_end), PLAIN))
    assert ("unmutated", "grad_out") in failed(ask("unmutated", candidate(scales_the_gradient_in_place), PLAIN))
    own = draw(PLAIN.case)
    assert ("unmutated", "packed") in failed(ask("unmutated", candidate(flips_a_code), own))


def test_a_backward_pass_that_uses_its_graph_up() -> None:
    def twice(**operands: Any) -> Tensor:
        seen: list[int] = []

        def change(grad: Tensor) -> Tensor:
            seen.append(1)
            return grad * len(seen)

        out: Tensor = Gradient.apply(layer(**operands), change)
        return out

    def keeps_the_first(**operands: Any) -> Tensor:
        memory: list[Tensor] = []

        def change(grad: Tensor) -> Tensor:
            memory.append(grad.clone())
            return memory[0].clone()

        out: Tensor = Gradient.apply(layer(**operands), change)
        return out

    def hands_its_own_memory_out(**operands: Any) -> Tensor:
        memory: list[Tensor] = []

        def change(grad: Tensor) -> Tensor:
            memory.append(grad.clone())
            return memory[0] if len(memory) == 1 else memory[0] * -2.0

        x = Gradient.apply(operands["inputs"], change)
        return layer(**operands | {"inputs": x})

    assert ("second backward", "dX") in failed(ask("second backward", candidate(twice), PLAIN))
    assert ("second backward", "dX") in failed(ask("second backward", candidate(keeps_the_first), PLAIN))
    assert ("second backward", "dX") in failed(ask("second backward", candidate(hands_its_own_memory_out), PLAIN))
    (finding,) = ask("second backward", candidate(lambda **operands: layer(**operands).detach()), PLAIN)
    assert finding.status is Status.FAIL


def test_a_configuration_that_is_wrong_and_a_dispatch_that_strays() -> None:
    def configured(config: int | None = None, **operands: Any) -> Tensor:
        factor = {0: 1.0, 1: 1.5, 2: 1 + 2.0**-20}[2 if config is None else config]
        return layer(**operands) * factor

    def judged(configs: list[int]) -> set[tuple[str, str]]:
        return failed(ask("configurations", candidate(configured, configs=lambda dtype: configs), PLAIN))

    assert judged([0, 2]) == set()
    assert judged([0]) == {("configurations", "dispatch")}
    assert ("configurations", "Y") in judged([1, 2])
    assert ask("configurations", candidate(layer), PLAIN) == []


def raises(error: Exception) -> Call:
    def call(**operands: Any) -> Tensor:
        raise error

    return call


@pytest.mark.parametrize("check", ["poison", "rows", "second backward", "determinism"])
def test_exceptions_are_findings(check: str) -> None:
    (finding,) = ask(check, candidate(raises(RuntimeError("boom"))), PLAIN)
    assert (finding.status, finding.reason) == (Status.FAIL, "raised RuntimeError: boom")
    (finding,) = ask(check, candidate(raises(mxref.NotCovered("no gates"))), PLAIN)
    assert (finding.status, finding.reason) == (Status.NOT_COVERED, "no gates")


def test_a_smaller_batch_keeps_its_rows() -> None:
    """Golden rows of the sub-batch equal the golden rows of the whole, in every layout."""
    pinned = candidate(lambda config=0, **operands: layer(**operands), configs=lambda dtype: [0])
    layouts: list[dict[str, Any]] = [
        {"grouped_out": True}, {"top_k": 4, "fan_out": 1, "gate_slots": 4}, {"grouped_in": True, "gate_slots": 2}
    ]  # fmt: skip
    for options in layouts:
        sample = draw(replace(Case("layout", 5, 32, 32, 12, 2, 4, bias=True), **options))
        findings = ask("rows", pinned, sample)
        assert failed(findings) == set()
        assert all(finding.elements for finding in findings)


@SAMPLES
def test_gradients_may_lie_in_memory_with_any_strides(sample: Sample) -> None:
    def strided(inputs: Tensor, **operands: Any) -> Tensor:
        return layer(inputs=Gradient.apply(inputs, lambda g: torch.stack((g, g), -1)[..., 0]), **operands)

    findings = [
        f for check in ("poison", "second backward", "determinism") for f in ask(check, candidate(strided), sample)
    ]
    assert findings
    assert [str(finding) for finding in findings if not finding.ok] == []
