"""The gate's guards on a few small cases: what every mutant is judged by, in seconds.

All samples are drawn on the CPU, once, and each trial moves its own to the device that it judges on. The process that
makes the layers forks one for each mutant, and a process that has touched a GPU cannot hand it to those that it forks.

Each layer is one guard with its own samples, so that a table can say what only that guard sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from types import ModuleType

import torch

from mxref.formats import MX_BLOCK_SIZE
from mxref.verification.arithmetic.accumulation import Accumulation
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.memory.guard_pages import cliff_guard
from mxref.verification.candidates.memory.interpreted import (
    checked_memory,
    decode_index_guard,
    index_guard,
    memory_guard,
)
from mxref.verification.candidates.memory.margins import (
    Margins,
    foreign_rows_guard,
    margins_guard,
    wild_offsets_guard,
    wild_positions_guard,
)
from mxref.verification.cases.elements import all_elements, nonfinite_samples
from mxref.verification.cases.small import drawn_weights, fixtures, integer_samples, one_hot, smallest
from mxref.verification.cases.suites import Case, Sample, usual_dtype
from mxref.verification.checks.bits import determinism_guard, poison_guard, row_guard, second_backward_guard
from mxref.verification.checks.drift import drift_guard
from mxref.verification.checks.exact import integer_guard, interval_guard
from mxref.verification.checks.finding import Finding, Status
from mxref.verification.checks.operators import operators_guard
from mxref.verification.checks.schedule import schedule_guard
from mxref.verification.gate.plan import Step, suite_steps
from mxref.weights import MXWeights, decode_mxfp4, encode_mxfp4

__all__ = ["Layer", "Question", "Trial", "gate_layers", "layers", "questions"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Judge = Callable[[Candidate], list[Finding]]
Guard = Callable[[Candidate, Sample], list[Finding]]


@dataclass(frozen=True)
class Trial:
    """One guard on one case, everything drawn beforehand."""

    name: str
    judge: Judge


@dataclass(frozen=True)
class Layer:
    """One guard and its cases, cheap and deadly ones first; `slow`: several runs a trial, asked last."""

    name: str
    trials: tuple[Trial, ...]
    slow: bool = False


@dataclass(frozen=True)
class Question:
    """One trial, and the check that it belongs to."""

    check: str
    trial: Trial


def questions(asked: Sequence[Layer]) -> list[Question]:
    """The first trial of every layer, then the second of every layer, and so on, the slow layers last."""
    one_by_one = {layer.name: [Question(layer.name, trial) for trial in layer.trials] for layer in asked}
    rounds = zip_longest(*(one_by_one[layer.name] for layer in asked if not layer.slow))
    quick = [question for each in rounds for question in each if question is not None]
    return quick + [question for layer in asked if layer.slow for question in one_by_one[layer.name]]


def layers(device: torch.device, seed: int = 0) -> list[Layer]:
    """Every layer that judges mutants on `device`, in the order in which they run.

    A GPU compiles for every case anew. There only some integer fixtures are asked, with those that its tilings need,
    and intervals first of all: they show what nothing but a GPU rounds.
    """
    dtype, gpu = usual_dtype(device.type), device.type == "cuda"
    integer = integer_samples(dtype, gpu, seed)
    interval = fixtures(device, seed)
    plain, fused = ([sample for sample in interval if sample.case.name == name] for name in ("plain", "fused"))
    operators = replace(smallest(dtype), name="operators", experts=3, routing="sentinels").build(seed=seed)
    foreign = replace(integer[1].case, name="foreign rows", top_k=1, gate_slots=1, tokens=18).build(seed=seed)

    def layer(name: str, samples: Sequence[Sample], guard: Guard, slow: bool = False) -> Layer:
        return Layer(name, tuple(_trial(sample.case.name, sample, guard, device) for sample in samples), slow)

    extremes = nonfinite_samples(dtype, "cpu")
    decode = layer("decode", [*(one_hot(each) for each in _DTYPES), *extremes], integer_guard)
    margins = layer("margins", integer, margins_guard)
    wild = [_trial(f"wild positions, {s.case.name}", s, wild_positions_guard, device) for s in (integer[0], integer[2])]
    empty = replace(integer[1].case, name="wild offsets", experts=5, routing="empty_experts").build(seed=seed)
    offsets = _trial("wild offsets", empty, wild_offsets_guard, device)
    spread = _trial("foreign rows", foreign, foreign_rows_guard, device)
    memory, indices = ([], []) if gpu else _interpreted(integer, empty, dtype, seed)
    intervals = layer("interval", interval, _intervals)
    return [
        *([intervals] if gpu else []),
        layer("integer", integer, integer_guard),
        replace(decode, trials=(*_decodes(device), *decode.trials)),
        Layer("schedule", (Trial("tables", lambda candidate: schedule_guard(_kernels(), device)),)),
        *memory,
        *([] if gpu else [intervals]),
        layer("drift", plain, _drift),
        layer("operators", [operators], lambda candidate, sample: operators_guard(_kernels(), sample)),
        layer("poison", plain + fused, poison_guard, slow=True),
        replace(margins, trials=(spread, *wild, offsets, *margins.trials)),
        *indices,
        layer("rows", plain, row_guard, slow=True),
        layer("second backward", plain, second_backward_guard, slow=True),
        layer(
            "determinism",
            plain,
            lambda candidate, sample: determinism_guard(candidate, sample, runs=2),
            slow=True,
        ),
        *([layer("cliffs", integer, cliff_guard, slow=True)] if gpu else []),
    ]


def gate_layers(device: torch.device, seed: int = 0) -> list[Layer]:
    """The quick gate itself, a layer a guard: whether a mutant would pass it. The samples are drawn by each child."""
    by_guard: dict[str, list[Trial]] = {}
    for step in suite_steps(device, full=False, seed=seed, every_guard=True):
        by_guard.setdefault(step.guard, []).append(Trial(step.case, partial(_step, step)))
    return [Layer(guard, tuple(trials)) for guard, trials in by_guard.items()]


def _step(step: Step, candidate: Candidate) -> list[Finding]:
    return step.judge(candidate, _declared(candidate))[0]


def _trial(name: str, sample: Sample, guard: Guard, device: torch.device) -> Trial:
    """A guard that takes one sample, on that sample."""
    return Trial(name, lambda candidate: guard(candidate, sample.to(device)))


def _intervals(candidate: Candidate, sample: Sample) -> list[Finding]:
    return interval_guard(candidate, sample, candidate.points(sample.problem.dtype), _declared(candidate))[0]


def _drift(candidate: Candidate, sample: Sample) -> list[Finding]:
    return drift_guard(candidate, sample, candidate.points(sample.problem.dtype), _declared(candidate))[0]


def _declared(candidate: Candidate) -> Accumulation:
    """The accumulation of the shipped kernels, which always declare one."""
    assert candidate.accumulation is not None
    return candidate.accumulation


def _interpreted(
    integer: Sequence[Sample], empty: Sample, dtype: torch.dtype, seed: int
) -> tuple[list[Layer], list[Layer]]:
    """Layers that look into the interpreter."""
    cpu = torch.device("cpu")
    sizes = Case("sizes", 48, 96, 352, 90, 2, 0, dtype, routing="ten_active", use_fused_dX=True, use_fused_gather=True)
    cases = [
        replace(sizes, bias=True),
        replace(sizes, name="sizes, gates", gate_slots=2),
        replace(sizes, name="sizes, LoRA", K=32, N=32, tokens=260, rank=32),
        replace(sizes, name="sizes, gradients of LoRA", tokens=45, rank=16),
    ]
    stack = encode_mxfp4(torch.ones(100, 64, 64))
    trials = [_trial(case.name, case.build(seed=seed), index_guard, cpu) for case in cases]
    decode = Trial("a stack", lambda candidate: decode_index_guard(candidate, stack))
    memory = [_trial(sample.case.name, sample, memory_guard, cpu) for sample in integer]
    memory.append(_trial("wild positions", integer[0], _watched(wild_positions_guard), cpu))
    memory.append(_trial("wild offsets", empty, _watched(wild_offsets_guard), cpu))
    return [Layer("memory", tuple(memory))], [Layer("indices", (decode, *trials), slow=True)]


def _watched(guard: Guard) -> Guard:
    """The guard, and besides an IndexError for every load and store outside a tensor."""

    def judge(candidate: Candidate, sample: Sample) -> list[Finding]:
        with checked_memory():
            return guard(candidate, sample)

    return judge


def _kernels() -> ModuleType:
    """The kernels as they are imported now, mutated or not."""
    import mxref.kernels

    return mxref.kernels


def _decodes(device: torch.device) -> list[Trial]:
    """Every code, byte and place through the candidate's own decode; and sizes that are multiples of no tile."""
    odd = drawn_weights(2, 33, 4128)
    just_over = drawn_weights(2, 4097, MX_BLOCK_SIZE)  # 32 · 4097: one chunk more than 16 full ones
    return [
        Trial("every element", lambda candidate: _decode(candidate, all_elements().to(device), _DTYPES)),
        Trial("odd sizes", lambda candidate: _decode(candidate, odd.to(device), (torch.bfloat16,))),
        Trial("just over", lambda candidate: _decode(candidate, just_over.to(device), (torch.bfloat16,))),
    ]


def _decode(candidate: Candidate, weights: MXWeights, dtypes: Sequence[torch.dtype]) -> list[Finding]:
    """The candidate's own decode in each dtype, bit for bit, into memory with margins."""
    findings = []
    for dtype in dtypes:
        expected, name = decode_mxfp4(weights, dtype), str(dtype).removeprefix("torch.")
        assert candidate.decode is not None
        with Margins() as margins:
            got = candidate.decode(weights, dtype)
        same = (got == expected) & (torch.signbit(got) == torch.signbit(expected)) | (got.isnan() & expected.isnan())
        wrong, damage = int((~same).sum()), margins.damage()
        status, reason = (Status.FAIL if wrong or damage else Status.PASS), f"{wrong} of {same.numel()} weights differ"
        findings.append(Finding("decode", name, "W", status, damage or reason, same.numel(), wrong))
    return findings
