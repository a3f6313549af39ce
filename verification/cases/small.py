"""What mutants are judged on: the gate's cases in kind, but smaller.

Two blocks of columns with a tail, two steps of the contraction with a tail, sentinels, empty experts, every flag. All
are drawn on the CPU, once.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mxref.formats import MX_BLOCK_SIZE, pack_codes
from mxref.problem import Problem
from mxref.routing import flatten_sort_count
from mxref.verification.cases.elements import finite_bytes
from mxref.verification.cases.suites import FULL_OF_COLUMNS, Case, Sample, usual_dtype, with_dense_weights
from mxref.weights import MXWeights

__all__ = ["drawn_weights", "fixtures", "integer_samples", "one_hot", "smallest"]


def fixtures(device: torch.device, seed: int = 0) -> list[Sample]:
    """Ordinary data for `device`, on the CPU: what an equivalent mutant must compute to the last bit."""
    return [case.build(seed=seed) for case in _interval_cases(usual_dtype(device.type))]


def integer_samples(dtype: torch.dtype, gpu: bool, seed: int) -> list[Sample]:
    """Sums that are exact in any order: every option in the interpreter; on a GPU some, and what its tilings need."""
    cases = [*_integer_cases(dtype)[:5], *_gpu_cases(dtype)] if gpu else _integer_cases(dtype)
    samples = [case.build(seed=seed) for case in cases]
    return [*samples, with_dense_weights(samples[1]), _large_gates(samples[1])]


def smallest(dtype: torch.dtype) -> Case:
    """The integer fixture that all others vary: two experts, one block, a tail of rank."""
    return Case("small", 2, 32, 32, 4, 2, 3, dtype, data="integer", scaling=0.5, bias=True)


def _integer_cases(dtype: torch.dtype) -> list[Case]:
    base = smallest(dtype)
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
        smallest(dtype), name="many rows", tokens=520, rank=0, bias=False, use_fused_dX=True, use_fused_gather=True
    )


def _gpu_cases(dtype: torch.dtype) -> list[Case]:
    """What a GPU's tilings need: tiles of every height; rows in expert order, with sentinels behind them; more steps
    than a ring of copies holds, whole numbers of them and parts; columns that 16 does not divide, and more columns than
    a GPU runs programs, so that rows of sentinels are written last."""
    base = smallest(dtype)
    routed = replace(base, name="long", experts=3, K=1056, N=1056, tokens=60, gate_slots=2, routing="sentinels")
    ordered = replace(base, experts=3, K=544, N=544, top_k=1, rank=20, grouped_in=True, grouped_out=True)
    return [
        _many_rows(dtype),
        *(
            replace(ordered, name=f"in order, {tokens} rows", tokens=tokens, routing="sentinels")
            for tokens in (300, 600)
        ),
        replace(routed, use_fused_dX=True),
        replace(routed, name="long and even", K=1024, N=1024, tokens=9, gate_slots=0, use_fused_gather=True),
        replace(base, name="parts of turns", K=160, N=416, grouped_in=True, grouped_out=True),
        *(replace(base, name=f"{N} columns", N=N, use_fused_dX=True) for N in (15, 34, 129)),
        replace(base, name="a GPU full of columns", N=FULL_OF_COLUMNS, rank=0, routing="sentinels"),
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


def _large_gates(sample: Sample) -> Sample:
    """The same with gates beyond the range of fp16; powers of two leave every sum exact."""
    gates = sample.problem.gates
    assert gates is not None
    case = replace(sample.case, name=f"{sample.case.name}, large")
    return replace(sample, case=case, problem=replace(sample.problem, gates=gates * 2.0**20))


def one_hot(dtype: torch.dtype) -> Sample:
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


def drawn_weights(E: int, N: int, K: int) -> MXWeights:
    """A stack of random codes and ordinary scales."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (E, N, K // 2), generator=draw, dtype=torch.uint8)
    scales = torch.randint(100, 150, (E, N, K // MX_BLOCK_SIZE), generator=draw, dtype=torch.uint8)
    return MXWeights(codes, scales, K, N)
