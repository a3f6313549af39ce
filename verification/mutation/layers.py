"""The gate's guards on a few small cases: what every mutant is judged by, in seconds.

All samples are drawn on the CPU, once, and each trial moves its own to the device that it judges on. The process that
makes the layers forks one for each mutant, and a process that has touched a GPU cannot hand it to those that it forks.

Each layer is one guard with its own cases, so that a table can say what only that guard sees. The cases are the gate's
in kind, but smaller: two blocks of columns with a tail, two steps of the contraction with a tail, sentinels, empty
experts, every flag.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from mxref.formats import MX_BLOCK_SIZE, pack_codes
from mxref.problem import Problem
from mxref.routing import flatten_sort_count
from mxref.verification.accumulation import Accumulation
from mxref.verification.behaviour import determinism_guard, poison_guard, row_guard, second_backward_guard
from mxref.verification.candidates import Candidate
from mxref.verification.cases import Case, Sample, usual_dtype
from mxref.verification.cliffs import cliff_guard
from mxref.verification.drift import drift_guard
from mxref.verification.exhaustive import all_elements, finite_bytes, nonfinite_samples
from mxref.verification.guards import integer_guard, interval_guard
from mxref.verification.margins import (
    Margins,
    foreign_rows_guard,
    margins_guard,
    wild_offsets_guard,
    wild_positions_guard,
)
from mxref.verification.memory import checked_memory, decode_index_guard, index_guard, memory_guard
from mxref.verification.operators import operators_guard
from mxref.verification.scheduling import schedule_guard
from mxref.verification.verdicts import Finding, Status
from mxref.weights import MXWeights, decode_mxfp4, encode_mxfp4

__all__ = ["Layer", "Trial", "fixtures", "layers"]

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


def layers(device: torch.device, seed: int = 0) -> list[Layer]:
    """Every layer that judges mutants on `device`, in the order in which they run.

    A GPU compiles for every case anew. There only some integer fixtures are asked, with those that its tilings need,
    and intervals first of all: they show what nothing but a GPU rounds.
    """
    dtype, gpu = usual_dtype(device.type), device.type == "cuda"
    cases = _integer_cases(dtype)
    integer = [case.build(seed=seed) for case in ([*cases[:5], *_gpu_cases(dtype)] if gpu else cases)]
    integer += [_dense(integer[1]), _large_gates(integer[1])]
    interval = fixtures(device, seed)
    unwaited = [sample for sample in integer if sample.case.name in ("in order", "long and even")]
    plain, fused = ([sample for sample in interval if sample.case.name == name] for name in ("plain", "fused"))
    operators = replace(_base(dtype), name="operators", experts=3, routing="sentinels").build(seed=seed)
    foreign = replace(integer[1].case, name="foreign rows", top_k=1, gate_slots=1, tokens=18).build(seed=seed)

    def layer(name: str, samples: Sequence[Sample], guard: Guard, slow: bool = False) -> Layer:
        return Layer(name, tuple(_trial(sample.case.name, sample, guard, device) for sample in samples), slow)

    extremes = nonfinite_samples(dtype, "cpu")
    decode = layer("decode", [*(_one_hot(each) for each in _DTYPES), *extremes], integer_guard)
    margins = layer("margins", integer, margins_guard)
    wild = _trial("wild positions", integer[0], wild_positions_guard, device)
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
        replace(margins, trials=(spread, wild, offsets, *margins.trials)),
        *indices,
        layer("rows", plain, row_guard, slow=True),
        layer("second backward", plain, second_backward_guard, slow=True),
        layer(
            "determinism",
            plain + unwaited,
            lambda candidate, sample: determinism_guard(candidate, sample, runs=2),
            slow=True,
        ),
        *([layer("cliffs", integer, cliff_guard, slow=True)] if gpu else []),
    ]


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


def fixtures(device: torch.device, seed: int = 0) -> list[Sample]:
    """Ordinary data for `device`, on the CPU: what an equivalent mutant must compute to the last bit."""
    return [case.build(seed=seed) for case in _interval_cases(usual_dtype(device.type))]


def _base(dtype: torch.dtype) -> Case:
    return Case("small", 2, 32, 32, 4, 2, 3, dtype, data="integer", scaling=0.5, bias=True)


def _integer_cases(dtype: torch.dtype) -> list[Case]:
    base = _base(dtype)
    tails = replace(base, name="tails", experts=3, K=96, N=162, tokens=9, routing="sentinels")
    grouped = replace(tails, name="grouped", grouped_in=True, grouped_out=True, routing="empty_experts")
    return [
        base,
        replace(tails, name="gates", gate_slots=2),
        replace(tails, name="fused", use_fused_dX=True, use_fused_gather=True, scaling=2.0),
        replace(grouped, experts=5, K=64, tokens=18, top_k=1, rank=20),
        replace(base, name="even sizes", K=128, N=256, grouped_in=True, gate_slots=2, routing="sentinels"),
        replace(base, name="wide", K=1056, N=129, tokens=5, top_k=1, use_fused_dX=True, gate_slots=1),
        replace(base, name="one row", N=33, tokens=1, top_k=1, gate_slots=1),
        replace(base, name="no rows", tokens=0, gate_slots=2),
        replace(base, name="17 rows", tokens=17, top_k=1, gate_slots=1),
        replace(base, name="one expert", K=64, tokens=70, top_k=1, rank=4, routing="one_expert"),
        _many_rows(dtype),
    ]


def _many_rows(dtype: torch.dtype) -> Case:
    """Hundreds of rows an expert, routed."""
    return replace(
        _base(dtype), name="many rows", tokens=520, rank=0, bias=False, use_fused_dX=True, use_fused_gather=True
    )


def _gpu_cases(dtype: torch.dtype) -> list[Case]:
    """What a GPU's tilings need: tiles of every height; rows in expert order, with sentinels behind them; more steps
    than a ring of copies holds, and whole numbers of steps; columns that 16 does not divide."""
    base = _base(dtype)
    routed = replace(base, name="long", experts=3, K=1056, N=1056, tokens=60, gate_slots=2, routing="sentinels")
    ordered = replace(base, name="in order", experts=3, K=544, N=544, tokens=600, top_k=1, rank=20)
    return [
        _many_rows(dtype),
        replace(ordered, routing="sentinels", grouped_in=True, grouped_out=True),
        replace(routed, use_fused_dX=True),
        replace(routed, name="long and even", K=1024, N=1024, tokens=9, gate_slots=0, use_fused_gather=True),
        *(replace(base, name=f"{N} columns", N=N, use_fused_dX=True) for N in (15, 34)),
    ]


def _interval_cases(dtype: torch.dtype) -> list[Case]:
    """On a GPU also what only it rounds: parameters that are wider than the activations, and fp32 without TF32."""
    base = Case("plain", 3, 96, 160, 9, 2, 3, dtype, data="balanced", scaling=1 / 3, bias=True, routing="sentinels")
    wider = replace(base, gate_slots=2, use_fused_dX=True)
    everywhere = [
        replace(base, gate_slots=2),
        replace(base, name="fused", use_fused_dX=True, use_fused_gather=True),
        replace(base, name="wide", data="wide", gate_slots=2, use_fused_dX=True),
        replace(base, name="boundary", data="boundary", K=192, N=64, use_fused_dX=True),
    ]
    rounded = [
        replace(wider, name="fp32 parameters", parameter_dtype=torch.float32),
        replace(wider, name="fp32", dtype=torch.float32),
    ]
    return everywhere if dtype == torch.float32 else [*rounded, *everywhere]


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
    stack = encode_mxfp4(torch.ones(50, 64, 128))
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


def _dense(sample: Sample) -> Sample:
    """The same numbers with weights that are decoded already, as a view [E, K, N]."""
    weights = sample.problem.expert_weights
    assert isinstance(weights, MXWeights)
    decoded = decode_mxfp4(weights, sample.problem.dtype).mT
    case = replace(sample.case, name=f"{sample.case.name}, dense")
    return replace(sample, case=case, problem=replace(sample.problem, expert_weights=decoded))


def _large_gates(sample: Sample) -> Sample:
    """The same with gates beyond the range of fp16; powers of two leave every sum exact."""
    gates = sample.problem.gates
    assert gates is not None
    case = replace(sample.case, name=f"{sample.case.name}, large")
    return replace(sample, case=case, problem=replace(sample.problem, gates=gates * 2.0**20))


def _kernels() -> ModuleType:
    """The kernels as they are imported now, mutated or not."""
    import mxref.kernels

    return mxref.kernels


def _decodes(device: torch.device) -> list[Trial]:
    """Every code, byte and place through the candidate's own decode; and sizes that are multiples of no tile."""
    odd = _drawn(2, 33, 4128)
    just_over = _drawn(2, 4097, MX_BLOCK_SIZE)  # 32 · 4097: one program more than 32 full ones
    return [
        Trial("every element", lambda candidate: _decode(candidate, all_elements().to(device), _DTYPES)),
        Trial("odd sizes", lambda candidate: _decode(candidate, odd.to(device), (torch.bfloat16,))),
        Trial("just over", lambda candidate: _decode(candidate, just_over.to(device), (torch.bfloat16,))),
    ]


def _drawn(E: int, N: int, K: int) -> MXWeights:
    """A stack of random codes and ordinary scales."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (E, N, K // 2), generator=draw, dtype=torch.uint8)
    scales = torch.randint(100, 150, (E, N, K // MX_BLOCK_SIZE), generator=draw, dtype=torch.uint8)
    return MXWeights(codes, scales, K, N)


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


def _one_hot(dtype: torch.dtype) -> Sample:
    """One block of each finite scale byte through both products, picked out by one-hot rows of x and dOut."""
    bytes_ = torch.tensor(finite_bytes(dtype), dtype=torch.uint8)
    place = torch.arange(MX_BLOCK_SIZE, dtype=torch.uint8)
    codes = ((place + torch.arange(bytes_.numel(), dtype=torch.uint8)[:, None]) % 16)[None]
    N = bytes_.numel()
    weights = MXWeights(pack_codes(codes), bytes_[None, :, None].clone(), MX_BLOCK_SIZE, N)
    routing = flatten_sort_count(torch.zeros(N, 1, dtype=torch.int64), 1)
    x = torch.eye(MX_BLOCK_SIZE, dtype=dtype).repeat(-(-N // MX_BLOCK_SIZE), 1)[:N]
    problem = Problem(x, weights, 1, *routing)
    name = f"one-hot, {str(dtype).removeprefix('torch.')}"
    case = Case(name, 1, MX_BLOCK_SIZE, N, N, 1, 0, dtype, use_fused_dX=True, use_fused_gather=True)
    return Sample(case, problem, torch.eye(N, dtype=dtype))
