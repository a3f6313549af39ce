"""What the gate does with a candidate, one step at a time: a guard, or several that share a run, on one case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mxref.checkpoints import ExpertTensor, read_expert_weights
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, Accumulation
from mxref.verification.arithmetic.thresholds import INTERPRETED_RUNS, RUNS
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.memory.interpreted import checked_memory
from mxref.verification.candidates.memory.margins import foreign_rows_guard, wild_offsets_guard, wild_positions_guard
from mxref.verification.cases.case import Case, Sample, sample_for_weights
from mxref.verification.cases.suites import (
    behaviour_cases,
    configuration_cases,
    full_cases,
    integer_cases,
    quick_cases,
    usual_dtype,
    with_dense_weights,
)
from mxref.verification.checks.bits import BEHAVIOURS, configuration_guard, determinism_guard
from mxref.verification.checks.drift import drift_guard, slopes_of
from mxref.verification.checks.exact import decode_guard, expect, integer_guard, interval_guard, raised
from mxref.verification.checks.finding import DriftMap, ErrorSample, Finding, Status
from mxref.verification.checks.operators import operators_guard

__all__ = ["Step", "behaviour_steps", "case_steps", "checkpoint_steps", "decode_steps", "promise_steps", "suite_steps"]

Outcome = tuple[list[Finding], Sequence[ErrorSample | DriftMap]]
"""Findings, and what pictures are drawn from."""


@dataclass(frozen=True)
class Step:
    """One guard on one case. `judge` takes the candidate and the accumulation that it is to be judged by."""

    guard: str
    case: str
    judge: Callable[[Candidate, Accumulation], Outcome]


def decode_steps(device: torch.device) -> list[Step]:
    """The exhaustive decode, once for each activation dtype that is judged on this device."""
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.bfloat16, torch.float16, torch.float32)

    def step(dtype: torch.dtype) -> Step:
        name = f"decode, {str(dtype).removeprefix('torch.')}"
        return Step("decode", name, lambda candidate, _: (decode_guard(candidate, device, dtype), []))

    return [step(dtype) for dtype in dtypes]


def case_steps(cases: Iterable[Case], device: torch.device, seed: int, drift: bool = False) -> list[Step]:
    """Drawn cases: integer fixtures by bits, all others by intervals and, from the same run, by `drift` if asked for.

    The probability of a false alarm is that of all these steps together: the slopes of every case are counted first.
    """
    cases = list(cases)
    slopes = sum(slopes_of(case) for case in cases if case.data != "integer") if drift else None

    def step(case: Case) -> Step:
        if case.data == "integer":
            return Step(
                "integer", case.name, lambda candidate, _: (integer_guard(candidate, case.build(device, seed)), [])
            )
        return Step(
            "interval", case.name, lambda candidate, how: _drawn(candidate, case.build(device, seed), how, slopes)
        )

    return [step(case) for case in cases]


def behaviour_steps(device: torch.device, seed: int) -> list[Step]:
    """Guards that compare a candidate with itself, and every configuration that its dispatch can reach."""
    runs = INTERPRETED_RUNS if device.type == "cpu" else RUNS
    guards = BEHAVIOURS | {"determinism": partial(determinism_guard, runs=runs)}

    def behave(guard: str, case: Case) -> Step:
        return Step(guard, case.name, lambda candidate, _: (guards[guard](candidate, case.build(device, seed)), []))

    def configure(case: Case) -> Step:
        return Step(
            "configurations",
            case.name,
            lambda candidate, how: configuration_guard(candidate, [case.build(device, seed)], how),
        )

    steps = [behave(guard, case) for guard in guards for case in behaviour_cases(device.type)]
    return steps + [configure(case) for case in configuration_cases(device.type)]


def promise_steps(device: torch.device, seed: int) -> list[Step]:
    """What this project promises beyond the contract; of candidates without its `operators` nothing is asked.

    Every public operator, weights that are dense already, indices out of range that nobody checked, and on a CPU the
    decoding in 16 bits: its values are exact, so the interpreter's arithmetic is good enough for them. Interpreted, an
    access outside every tensor is a finding; it would end this process otherwise.
    """
    base = integer_cases(device.type)[0]
    sentinels = replace(base, routing="sentinels", gate_slots=2)
    fused = replace(base, K=96, use_fused_dX=True, use_fused_gather=True)

    def step(guard: str, name: str, judge: Callable[[Candidate], list[Finding]]) -> Step:
        def asked(candidate: Candidate, _: Accumulation) -> Outcome:
            if candidate.operators is None:
                return [], []
            try:
                with checked_memory() if device.type == "cpu" else nullcontext():
                    return judge(candidate), []
            except Exception as error:  # whatever a candidate raises is a finding about it
                return [raised(guard, name, error)], []

        return Step(guard, name, asked)

    def on(guard: str, case: Case, judge: Callable[[Candidate, Sample], list[Finding]]) -> Step:
        return step(guard, case.name, lambda candidate: judge(candidate, case.build(device, seed)))

    def decoded(dtype: torch.dtype) -> Step:
        name = f"decode, {str(dtype).removeprefix('torch.')}"
        return step("decode", name, lambda candidate: decode_guard(candidate, device, dtype, nonfinite=False))

    return [
        *(map(decoded, (torch.bfloat16, torch.float16)) if device.type == "cpu" else ()),
        on("integer", replace(sentinels, name="dense weights"), _dense),
        on("operators", replace(base, name="operators", routing="sentinels"), _operators),
        on("margins", replace(sentinels, name="foreign rows", top_k=1, gate_slots=1), foreign_rows_guard),
        on("integer", replace(base, name="129 columns", N=129, use_fused_dX=True), integer_guard),
        on("margins", replace(base, name="wild positions"), wild_positions_guard),
        on("margins", replace(fused, name="wild positions, fused"), wild_positions_guard),
        on("margins", replace(base, name="wild offsets", experts=6, routing="empty_experts"), wild_offsets_guard),
    ]


def _dense(candidate: Candidate, sample: Sample) -> list[Finding]:
    return integer_guard(candidate, with_dense_weights(sample))


def _operators(candidate: Candidate, sample: Sample) -> list[Finding]:
    assert candidate.operators is not None
    return operators_guard(candidate.operators, sample)


def suite_steps(device: torch.device, full: bool, seed: int, every_guard: bool = False) -> list[Step]:
    """All steps of the quick suite, or of the full one; `every_guard` adds drift and behaviour."""
    grid = full_cases if full else quick_cases
    drawn = integer_cases(device.type) + grid(device.type)
    steps = decode_steps(device) + case_steps(drawn, device, seed, drift=every_guard)
    return [*steps, *behaviour_steps(device, seed), *promise_steps(device, seed)] if every_guard else steps


def checkpoint_steps(
    path: Path, tensors: Sequence[ExpertTensor], experts: int | None, device: torch.device, seed: int
) -> list[Step]:
    """A checkpoint's own expert weights under random activations and adapters, by intervals.

    Args:
        path: safetensors file or directory, see `mxref.checkpoint`.
        tensors: the projections to judge, from `list_expert_tensors`.
        experts: how many of each projection's experts, from the first; None for all.
        device: where to judge.
        seed: of everything that is not the checkpoint's.
    """

    def step(tensor: ExpertTensor) -> Step:
        count = tensor.E if experts is None else min(experts, tensor.E)
        name = f"{tensor.name}, experts 0–{count - 1} of {tensor.E}"

        def judge(candidate: Candidate, how: Accumulation) -> Outcome:
            _, weights = next(iter(read_expert_weights(path, [tensor.name])))
            weights = weights.select(torch.arange(count)).to(device)
            dtype = usual_dtype(device.type)
            down = tensor.name.endswith("down_proj")
            slots = min(4, count)
            options = {"grouped_in": True, "gate_slots": slots} if down else {"grouped_out": True}
            sample = sample_for_weights(weights, name, top_k=slots, dtype=dtype, seed=seed, bias=True, **options)
            return _drawn(candidate, sample, how, None)

        return Step("interval", name, judge)

    return [step(tensor) for tensor in tensors]


class _Once:
    """A candidate that runs its one sample once, and repeats what came of it, exceptions too."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate, self._outcome = candidate, list[dict[str, Tensor | None] | Exception]()

    def run(self, sample: Sample) -> dict[str, Tensor | None]:
        if not self._outcome:
            try:
                self._outcome.append(self._candidate.run(sample))
            except Exception as error:  # for the guards to judge, each on its own
                self._outcome.append(error)
        outcome = self._outcome[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def _drawn(candidate: Candidate, sample: Sample, how: Accumulation, slopes: int | None) -> Outcome:
    """Judge one run by `how`, for drift too where `slopes`, their number in the whole run, is given.

    A candidate that declared nothing gets a second chance against the order-free bound.
    """
    points, once = candidate.points(sample.problem.dtype), _Once(candidate)

    def judge(how: Accumulation) -> tuple[list[Finding], list[ErrorSample | DriftMap]]:
        expected = expect(sample, points, how)
        findings, errors = interval_guard(once, sample, points, how, expected)
        pictures: list[ErrorSample | DriftMap] = [*errors]
        if slopes is not None and not any(finding.tensor == "all" for finding in findings):
            drifts, maps = drift_guard(once, sample, points, how, slopes, expected=expected)
            findings, pictures = findings + drifts, [*pictures, *maps]
        return findings, pictures

    findings, pictures = judge(how)
    if candidate.accumulation is not None or all(finding.ok for finding in findings):
        return findings, pictures
    again, order_free = judge(ACCUMULATIONS["undeclared"])
    second = {(finding.guard, finding.tensor): finding for finding in again if finding.ok}
    weak = {(f.guard, f.tensor) for f in findings if f.status is Status.FAIL and (f.guard, f.tensor) in second}
    reason = (
        "outside the bound of this device's default accumulation, inside the order-free one; declare the accumulation "
        "for a full verdict"
    )
    redrawn = {tensor for guard, tensor in weak if guard == "interval"}
    return (
        [
            replace(second[f.guard, f.tensor], status=Status.WEAK, reason=reason) if (f.guard, f.tensor) in weak else f
            for f in findings
        ],
        [entry for entry in pictures if entry.tensor not in redrawn]
        + [entry for entry in order_free if entry.tensor in redrawn],
    )
