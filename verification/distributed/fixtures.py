"""Numbers for a case: integers whose sums are exact however ranks share them, or ordinary ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.rounding import precision_bits
from mxref.routing import flatten_sort_count
from mxref.scattermoe import RoundingPoints, backward, forward
from mxref.verification.cases.case import Case
from mxref.verification.cases.integer import is_exact_everywhere
from mxref.verification.cases.routing import draw_choice
from mxref.verification.distributed.cases import StepCase
from mxref.verification.distributed.protocol import Batch, Declared, Model
from mxref.weights import MXWeights

__all__ = ["Fixture", "absolute", "draw", "problem_of", "shared", "updated"]

_DENSITIES = ((2, 1), (2, 1), (1, 1), (1, 1), (1, 2), (1, 4))
"""Nonzeros a row of x and of targets, and how many rows there are to one that has any; each is tried a few times."""
_ATTEMPTS = 8
_W_UNIT = 0.5
"""Weights are multiples of this: codes 0.5 to 6 under scale bytes 127 and 128."""


@dataclass(frozen=True, eq=False)
class Fixture:
    """One draw of a case for a step's declaration.

    Attributes:
        case: which.
        model: before the first step.
        batches: of all ranks together.
        scale: the gradient of the loss is this times a batch's targets.
    """

    case: StepCase
    model: Model
    batches: tuple[Batch, ...]
    scale: float


def draw(case: StepCase, seed: int, declared: Declared) -> Fixture:
    """Draw a case, on the CPU.

    Integer cases are drawn until the reference rounds nowhere, and until every sum is exact in any order and any
    partition: in fp32, and sums over ranks in the dtypes that the step declares for them.

    Raises:
        ValueError: no draw is exact.
    """
    generator = torch.Generator().manual_seed(case.seed(seed))
    scale = 1.0 / case.tokens if declared.loss == "mean" else 1.0
    if not case.exact:
        return Fixture(case, *_ordinary(case, generator), scale)
    for nonzeros, every in (density for density in _DENSITIES for _ in range(_ATTEMPTS)):
        fixture = Fixture(case, *_integers(case, generator, nonzeros, every), scale)
        if _is_exact(fixture, declared):
            return fixture
    raise ValueError(
        f"{case.name}: no draw of seed {seed} is exact in {case.dtype} with sums in {declared.reduction.dtype}"
    )


def shared(batch: Batch, shares: Sequence[int]) -> list[Batch]:
    """The batch as the ranks get it: their shares one behind the other."""
    counts = list(shares)
    gates = [None] * len(counts) if batch.gates is None else torch.split(batch.gates, counts)
    parts = (torch.split(x, counts) for x in (batch.x, batch.experts, batch.targets))
    return [Batch(*own) for own in zip(*parts, gates, strict=True)]


def problem_of(model: Model, batch: Batch, gates: Tensor | None = None) -> Problem:
    """The layer's call on a batch; `gates`: instead of the batch's own."""
    K = batch.x.shape[1]
    weights = MXWeights(model.packed, model.scales, K, model.packed.shape[1])
    routing = flatten_sort_count(batch.experts, weights.E)
    chosen = batch.gates if gates is None else gates
    adapters = model.lora_A, model.lora_B, model.scaling
    return Problem(batch.x, weights, batch.experts.shape[1], *routing, *adapters, model.biases, chosen)


def updated(model: Model, dA: Tensor, dB: Tensor) -> Model:
    """The model after plain SGD: the product is exact, so that each number is rounded once, to fp32."""
    A, B = model.lora_A.double() - model.learning_rate * dA, model.lora_B.double() - model.learning_rate * dB
    return replace(model, lora_A=A.float(), lora_B=B.float())


def absolute(problem: Problem) -> Problem:
    """The problem with every number's magnitude: its results are the sums of the terms' magnitudes."""
    weights, A, B = problem.expert_weights, problem.lora_A, problem.lora_B
    assert isinstance(weights, MXWeights)
    assert A is not None
    assert B is not None
    return replace(
        problem,
        inputs=problem.inputs.abs(),
        expert_weights=replace(weights, packed=weights.packed & 0x77),  # without the sign bits of both codes
        lora_A=A.abs(),
        lora_B=B.abs(),
        scaling=abs(problem.scaling),
        expert_biases=None if problem.expert_biases is None else problem.expert_biases.abs(),
        gates=None if problem.gates is None else problem.gates.abs(),
    )


def _is_exact(fixture: Fixture, declared: Declared) -> bool:
    """Whether neither the reference nor any honest sum rounds, in any step."""
    model = fixture.model
    for batch in fixture.batches:
        problem, dOut = problem_of(model, batch), batch.targets * fixture.scale
        points = RoundingPoints.contract(batch.x.dtype)
        if not is_exact_everywhere(problem, dOut, points) or not _sums_are_exact(problem, dOut, declared):
            return False
        bwd = backward(problem, forward(problem, points), dOut, points)
        assert bwd.dA is not None
        assert bwd.dB is not None
        model = updated(model, bwd.dA.value, bwd.dB.value)
    return True


def _sums_are_exact(problem: Problem, dOut: Tensor, declared: Declared) -> bool:
    """Whether Σ|terms| is at most 2^p units of the last place that a term can have: then no partial sum rounds."""
    assert problem.gates is not None
    points = RoundingPoints.exact()
    fwd = forward(absolute(problem), points)
    bwd = backward(absolute(problem), fwd, dOut.abs(), points)
    s, x, g, t = abs(problem.scaling), _unit(problem.inputs), _unit(problem.gates), _unit(dOut)
    A, B, b = _unit(problem.lora_A), _unit(problem.lora_B), _unit(problem.expert_biases)
    z, v = x * A, g * t * B
    y, d = min(x * _W_UNIT, s * z * B, b), min(g * t * _W_UNIT, s * v * A)
    assert fwd.z is not None
    assert bwd.v is not None
    in_fp32 = ((fwd.z, z), (fwd.y, y), (fwd.out, g * y), (bwd.v, v), (bwd.d, d), (bwd.dx, d), (bwd.dgates, y * t))
    over_ranks = ((bwd.dA, s * v * x), (bwd.dB, s * g * t * z))
    outputs = ((fwd.out, g * y), (bwd.dx, d)) if declared.outputs == "summed" else ()
    return all(
        point is None or float(point.exact.max()) <= 2.0 ** precision_bits(dtype) * unit
        for dtype, sums in ((torch.float32, in_fp32), (declared.reduction.dtype, over_ranks), (problem.dtype, outputs))
        for point, unit in sums
    )


def _unit(x: Tensor | None) -> float:
    """The largest power of two that divides every element; 1 where all are zero."""
    if x is None or not bool((x != 0).any()):
        return 1.0
    whole = (x.double().abs() * 2.0**40).long()
    return float((whole[whole != 0] & -whole[whole != 0]).min()) * 2.0**-40


def _integers(case: StepCase, draw: torch.Generator, nonzeros: int, every: int) -> tuple[Model, tuple[Batch, ...]]:
    E, K, N, r, M = case.experts, case.K, case.N, case.rank, case.tokens
    packed = torch.randint(0, 256, (E, N, K // 2), generator=draw, dtype=torch.uint8)
    scales = torch.randint(127, 129, (E, N, K // 32), generator=draw, dtype=torch.uint8)
    if case.every_byte:
        packed[-1] = torch.arange(N * K // 2).view(N, K // 2).to(torch.uint8)  # counts modulo 256
        scales[-1] = 255 - torch.arange(N * K // 32).view(N, K // 32).to(torch.uint8)
    A = _sparse(E * K, r, 1, 1, draw).view(E, K, r).mT.reshape(E * r, K)
    B = _sparse(E * N, r, 1, 1, draw).view(E, N, r).permute(1, 0, 2).reshape(N, E * r)
    bias = torch.randint(-2, 3, (E, N), generator=draw).to(case.dtype) if case.bias else None
    model = Model(packed, scales, A, B, 0.5, 0.5, bias)
    batches = tuple(
        Batch(
            _sparse(M, K, nonzeros, every, draw).to(case.dtype),
            _choice(case, draw),
            _sparse(M, N, nonzeros, every, draw).to(case.dtype),
            torch.randint(1, 3, (M, case.top_k), generator=draw).to(case.dtype),
        )
        for _ in range(case.batches)
    )
    return model, batches


def _ordinary(case: StepCase, draw: torch.Generator) -> tuple[Model, tuple[Batch, ...]]:
    E, K, N, r, M = case.experts, case.K, case.N, case.rank, case.tokens

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    targets = normal(M, N)
    if case.dtype != torch.float32:  # multiples of 2^-6, so that fp16 holds them divided by M too
        targets = (512 * targets).to(case.dtype).round() / 64

    packed = torch.randint(0, 256, (E, N, K // 2), generator=draw, dtype=torch.uint8)
    scales = torch.randint(122, 126, (E, N, K // 32), generator=draw, dtype=torch.uint8)
    bias = normal(E, N).to(case.dtype) if case.bias else None
    router = normal(E, K) / K**0.5 if case.router else None
    model = Model(packed, scales, normal(E * r, K) / 8, normal(N, E * r) / 2, 0.5, 0.5, bias, router)
    gates = None if case.router else torch.rand(M, case.top_k, generator=draw).to(case.dtype)
    return model, (Batch(normal(M, K).to(case.dtype), _choice(case, draw), targets, gates),)


def _choice(case: StepCase, draw: torch.Generator) -> Tensor:
    shape = Case(case.name, case.experts, tokens=case.tokens, top_k=case.top_k, routing=case.routing)
    return draw_choice(shape, draw)


def _sparse(rows: int, columns: int, nonzeros: int, every: int, draw: torch.Generator) -> Tensor:
    """±1 at `nonzeros` places of every so many rows: fp32 [rows, columns]."""
    where = torch.rand(rows, columns, generator=draw).argsort(1)[:, :nonzeros]
    signs = torch.randint(0, 2, where.shape, generator=draw).float() * 2 - 1
    x = torch.zeros(rows, columns).scatter_(1, where, signs)
    x[torch.arange(rows) % every != 0] = 0.0
    return x
