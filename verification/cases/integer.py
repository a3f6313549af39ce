"""Integer fixtures: samples whose every intermediate is exact, so that any order of summation gives the same bits.

x and dOut have up to four nonzeros ±1 a row, dealt round-robin over the columns, but one row of x has none; A has at
most two nonzeros ±1 a column and B at most two a row; codes are dense in W, almost always all 16; biases are −4..4, or
smaller where a token has many gates, of which the first are 1 or 2; s is a power of two. All sums are then small
multiples of 1/4. A gauge (see `gauge`) spreads the scale bytes over 2^±125 without touching any of this.
"""

from __future__ import annotations

from itertools import product
from math import frexp

import torch
from torch import Tensor

from mxref.formats import E8M0_BIAS, MX_BLOCK_SIZE
from mxref.problem import Problem
from mxref.scattermoe import Rounded, RoundingPoints, backward, forward
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.gauge import spread_out
from mxref.verification.cases.routing import draw_routing
from mxref.verification.cases.special import repeated
from mxref.weights import MXWeights

_DENSITIES = ((4, 1), (4, 1), (4, 1), (2, 1), (2, 1), (1, 1), (1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (1, 64))
"""Nonzeros a row of x and dOut, and how many rows there are to one that has any: sums over many rows stay exact when
few have. Each is tried a few times."""

_ATTEMPTS = 4
_HOPELESS = 2  # values that are not exact, beyond which a draw of as many nonzeros will hardly be
_LIMITS = (32, 8, 0xFF), (8, 1, 0xFF), (8, 1, 0xBB)
"""Biases that one token's gates add up, at most: up to 2 × 32 in bf16's 8 bits, and halves beside it; how many of its
gates may be 2, since sums of more are exact where the others are 1; and which bits a pair of codes has, 0xBB for
magnitudes to 1.5. The next three where every draw by those before failed: many gates, quarters beside them, an expert
many times in a token."""
_FAR = 16
_ROWS_LEFT = 8  # rows with nonzeros, at least, where some have none


def keeps_sums_exact(scaling: float) -> bool:
    """Whether s is 0 or a power of two, and not so far from 1 that 16 bits do not hold its terms beside others."""
    mantissa, exponent = frexp(scaling)
    return abs(mantissa) in (0.0, 0.5) and abs(exponent) < _FAR


def draw_integer(case: Case, seed: int) -> Sample:
    """Draw, on the CPU, until every rounding point of the reference leaves its value alone.

    fp32 activations are held to the bf16 grid too, so that one fixture is exact wherever it runs.

    Raises:
        ValueError: every draw failed; the case is too large for the activation dtype.
    """
    strictest = torch.bfloat16 if case.dtype == torch.float32 else case.dtype
    draw = torch.Generator().manual_seed(case.draw_seed(seed))
    densities = [(nonzeros, every) for nonzeros, every in _DENSITIES if every == 1 or case.rows >= _ROWS_LEFT * every]
    for limits, density in product(_LIMITS, densities):
        for _ in range(_ATTEMPTS):
            sample = _draw(case, draw, density, limits)
            inexact = _inexact(sample.problem, sample.grad_out, RoundingPoints.contract(strictest))
            if not inexact:
                return sample
            if inexact > _HOPELESS:
                break
    raise ValueError(
        f"{case.name}: no draw is exact in {strictest}; use fewer tokens, a smaller rank, more columns, or a scaling "
        "that is a power of two"
    )


def is_exact_everywhere(problem: Problem, grad_out: Tensor, points: RoundingPoints) -> bool:
    """Whether R(v) = v at every rounding point of the reference's two passes."""
    return not _inexact(problem, grad_out, points)


def _inexact(problem: Problem, grad_out: Tensor, points: RoundingPoints) -> int:
    """For how many values it is not."""
    found = rounding_points(problem, grad_out, points).values()
    return sum(int((point.exact != point.value).sum()) for point in found)


def rounding_points(problem: Problem, grad_out: Tensor, points: RoundingPoints) -> dict[str, Rounded]:
    """Every rounding point of the reference's two passes, by its name there."""
    problem = problem.decoded()
    fwd = forward(problem, points)
    bwd = backward(problem, fwd, grad_out, points)
    return {name: point for name, point in (vars(fwd) | vars(bwd)).items() if isinstance(point, Rounded)}


def _draw(case: Case, draw: torch.Generator, density: tuple[int, int], limits: tuple[int, int, int]) -> Sample:
    gated, twos, bits = limits
    E, K, N, r, own = case.experts, case.K, case.N, case.rank, case.dtypes
    lora_A = lora_B = bias = gates = None
    if r:
        A = at_most(2, E, r, K, draw).flatten(0, 1)  # [E·r, K]
        B = at_most(2, E, r, N, draw).permute(2, 0, 1).flatten(1)  # [N, E·r]
        lora_A, lora_B = A.to(own["lora_A"]), B.to(own["lora_B"])
    if case.bias:
        most = max(1, min(4, gated // max(case.gate_slots, 1)))
        bias = torch.randint(-most, most + 1, (E, N), generator=draw).to(own["expert_biases"])
    if case.gate_slots:
        gates = torch.randint(1, 3, (case.rows // case.gate_slots, case.gate_slots), generator=draw).to(own["gates"])
        gates[:, twos:] = 1
    x = dealt(case.input_rows, K, *density, draw)
    problem = problem_of_integers(case, draw, x, random_codes(case, draw, bits), lora_A, lora_B, bias, gates)
    sample = Sample(case, problem, dealt(*case.output_shape, *density, draw).to(case.dtype))
    return repeated(spread_out(sample, draw, *((2, 1) if case.narrow else (60, 5))))


def random_codes(case: Case, draw: torch.Generator, bits: int = 0xFF) -> MXWeights:
    """All 16 codes, dense, or of these the pairs without other bits; every scale byte 2^0."""
    E, K, N = case.experts, case.K, case.N
    packed = torch.randint(0, 256, (E, N, K // 2), generator=draw, dtype=torch.uint8) & bits
    return MXWeights(packed, torch.full((E, N, K // MX_BLOCK_SIZE), E8M0_BIAS, dtype=torch.uint8), K, N)


def problem_of_integers(
    case: Case,
    draw: torch.Generator,
    x: Tensor,
    weights: MXWeights,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    gates: Tensor | None,
) -> Problem:
    """The case's problem over drawn operands, with a drawn routing, its second row of x zero."""
    x[1:2] = 0.0  # as a padding token's row, which gets a bias all the same
    problem = Problem(
        x.to(case.dtype),
        weights,
        case.k,
        *draw_routing(case, draw),
        lora_A,
        lora_B,
        case.scaling,
        bias,
        gates,
        case.grouped_in,
        case.grouped_out,
    )
    problem.validate(check_values=True)
    return problem


def dealt(rows: int, columns: int, nonzeros: int, every: int, draw: torch.Generator) -> Tensor:
    """Nonzeros ±1 in every so many rows, the columns dealt like cards, each its fair share: fp64 [rows, columns]."""
    deck = [torch.randperm(columns, generator=draw) for _ in range(-(-rows * nonzeros // columns))]
    x = torch.zeros(rows, columns, dtype=torch.float64)
    if deck:
        cards = torch.cat(deck)[: rows * nonzeros].view(rows, nonzeros)
        x.scatter_(1, cards, _signs(rows, nonzeros, draw))
        x[torch.arange(rows) % every != 0] = 0.0
    return x


def at_most(count: int, experts: int, rank: int, columns: int, draw: torch.Generator) -> Tensor:
    """At most `count` nonzeros ±1 in each column of each expert: fp64 [E, r, columns]."""
    x = torch.zeros(experts, rank, columns, dtype=torch.float64)
    for _ in range(count):
        where = torch.randint(0, rank, (experts, 1, columns), generator=draw)
        x.scatter_(1, where, _signs(experts, columns, draw)[:, None, :])
    return x


def _signs(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (rows, columns), generator=draw).double() * 2 - 1
