"""From a case to numbers.

The same case and seed give the same numbers on every device: everything is drawn on the CPU and then moved.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxref.formats import E8M0_BIAS, MX_BLOCK_SIZE
from mxref.problem import Problem
from mxref.rounding import min_exponent
from mxref.verification.cases.case import Case, Sample
from mxref.verification.cases.elements import DRAWN
from mxref.verification.cases.gauge import Gauge, draw_gauge, scale_bytes
from mxref.verification.cases.integer import draw_integer
from mxref.verification.cases.rounded import draw_rounded
from mxref.verification.cases.routing import draw_routing
from mxref.verification.cases.special import as_asked, repeated
from mxref.weights import MXWeights

_LARGE = 2.0**13
"""In fp16 x and dOut of this size are finite, and some sums of them are not."""


def draw(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Sample:
    """Draw one sample.

    Raises:
        ValueError: integer data for which no draw is exact at every rounding point (the sizes are too large).
    """
    if case.K % MX_BLOCK_SIZE:
        blocks = -(-case.K // MX_BLOCK_SIZE)
        return _cut(draw(replace(case, K=blocks * MX_BLOCK_SIZE), seed=seed), case).to(device)
    if case.data in DRAWN:
        sample = DRAWN[case.data](case)
    elif case.data == "integer":
        sample = draw_integer(case, seed)
    elif case.data == "rounded":
        sample = draw_rounded(case, seed)
    else:
        generator = torch.Generator().manual_seed(case.draw_seed(seed))
        sample = _draw(case, *_draw_weights(case, generator), "cpu", generator)
    sample = as_asked(sample).to(device)
    sample.problem.validate(check_values=True)
    return sample


def _cut(sample: Sample, case: Case) -> Sample:
    """The sample on dense weights without what lies behind K along the contraction."""
    problem, K = sample.problem, case.K
    weights, A = problem.expert_weights, problem.lora_A
    assert isinstance(weights, Tensor), "packed weights have whole blocks"
    A = None if A is None else A[:, :K]
    problem = replace(problem, inputs=problem.inputs[:, :K], expert_weights=weights[:, :K], lora_A=A)
    return repeated(Sample(case, problem, sample.grad_out))


def draw_for_weights(
    weights: MXWeights,
    name: str,
    *,
    tokens: int = 32,
    top_k: int = 4,
    rank: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    bias: bool = False,
    gate_slots: int = 0,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Sample:
    """A sample around given weights (a checkpoint's, say): random routing, x, LoRA and dOut on the weights' device."""
    case = Case(
        name, weights.E, weights.K, weights.N, tokens, min(top_k, weights.E), rank, dtype,
        bias=bias, gate_slots=gate_slots, grouped_in=grouped_in, grouped_out=grouped_out,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(case.draw_seed(seed))
    return _draw(case, weights, Gauge.none(weights.K, weights.N), weights.device, generator)


def _draw_weights(case: Case, generator: torch.Generator) -> tuple[MXWeights, Gauge]:
    """Uniform random codes; scale bytes as `data` says."""
    E, K, N = case.experts, case.K, case.N
    packed = torch.randint(0, 256, (E, N, K // 2), generator=generator, dtype=torch.uint8)
    shape = (E, N, K // MX_BLOCK_SIZE)
    half = case.narrow
    if case.data == "boundary":
        # Bytes 0..252 decode finitely in bf16, 104..140 exactly in fp16: both ends, and the middle.
        t, u = ([-12, 0, 7], [-11, 0, 6]) if half else ([-64, 0, 63], [-63, 0, 62])
        gauge = Gauge.from_exponents(_cycle(t, N), _cycle(u, K // MX_BLOCK_SIZE))
        scales = scale_bytes(gauge).expand(shape)
    elif case.data == "wide":
        gauge = draw_gauge(case, generator, 3 if half else 54)
        jitter = torch.randint(-10, -2, shape, generator=generator)
        scales = scale_bytes(gauge) + jitter
    else:
        gauge = Gauge.none(K, N)
        scales = torch.randint(E8M0_BIAS - 9, E8M0_BIAS - 4, shape, generator=generator)
    if case.data == "positive":
        packed &= 0x77
    if case.data == "cancelling":
        packed = _repeated(_repeated(packed, 2) ^ _signs(packed, 2), 1) ^ _signs(packed, 1)
        scales = _repeated(_repeated(scales, 2), 1)
    return MXWeights(packed, scales.to(torch.uint8).contiguous(), K, N), gauge


def _repeated(x: Tensor, dim: int) -> Tensor:
    """The first half along `dim` in place of the second too."""
    half = x.narrow(dim, 0, x.shape[dim] // 2)
    return torch.cat((half, half), dim)


def _signs(packed: Tensor, dim: int) -> Tensor:
    """What flips the sign of both codes in each byte of the second half along `dim`."""
    flips = torch.zeros_like(packed)
    flips.narrow(dim, packed.shape[dim] // 2, packed.shape[dim] // 2).fill_(0x88)
    return flips


def _cancelling(x: Tensor, dim: int, sign: int) -> Tensor:
    """The first half along `dim`, times `sign`, in place of the second too, but for every 32nd element."""
    half = x.shape[dim] // 2
    index = torch.arange(half)[torch.arange(half) % 32 != 0].to(x.device)
    return x.index_copy(dim, index + half, sign * x.index_select(dim, index))


def _cycle(values: list[int], length: int) -> Tensor:
    return torch.tensor(values).repeat(-(-length // len(values)))[:length]


def _draw(
    case: Case, weights: MXWeights, gauge: Gauge, device: torch.device | str, generator: torch.Generator
) -> Sample:
    E, K, N, r = case.experts, case.K, case.N, case.rank

    own = case.dtypes
    grid = torch.bfloat16 if case.dtype == torch.float32 and case.data != "off_grid" else case.dtype

    def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
        """On the grid of the activations unless the dtype is its own."""
        return x.to(grid if dtype == case.dtype else dtype).to(dtype).to(device)

    def normal(rows: int, columns: int, factor: Tensor, dtype: torch.dtype) -> Tensor:
        x = torch.randn(rows, columns, generator=generator) * factor.float()
        return rounded(x.abs() if case.data == "positive" else x, dtype)

    loose = 2.0**-4 if case.data == "boundary" else 1.0  # codes up to 6 without the usual 2^-6 scale
    below = 2.0 ** (min_exponent(case.dtype) - 2)
    x_size = {"subnormal": below, "large": _LARGE}.get(case.data, loose)
    dOut_size = {"subnormal": below, "tiny dOut": below, "large": _LARGE}.get(case.data, loose)
    adapters = 1 / _LARGE if case.data == "large" else 1.0
    sizes = {"plain": 0.02, "balanced": 0.2, "lora": 16.0, "large": 0.3}
    lora_A = lora_B = bias = gates = None

    def tiny(name: str, data: str) -> float:
        """Below the normal range of a parameter and of the activations, where the data are so."""
        least = max(min_exponent(dtype) for dtype in (case.dtype, own[name]))
        return 2.0 ** (least - 2) if case.data == data else 1.0

    if r:
        odd = torch.arange(E).repeat_interleave(r) % 2 == 1
        of_A = torch.where(odd, 1.0, tiny("lora_A", "tiny lora"))
        of_B = torch.where(odd, tiny("lora_B", "tiny lora"), 1.0)
        lora_A = normal(E * r, K, of_A[:, None] * (gauge.u * adapters / K**0.5), own["lora_A"])
        size = sizes.get(case.data, 0.1) * adapters * (K / r) ** 0.5 / 8
        lora_B = normal(N, E * r, of_B * (gauge.t[:, None] * size), own["lora_B"])
    if case.bias:
        size = tiny("expert_biases", "subnormal") * (128.0 if case.data == "bias" else 0.5)
        bias = normal(E, N, gauge.t * size, own["expert_biases"])
    if case.gate_slots:
        shape = (case.rows // case.gate_slots, case.gate_slots)
        gates = rounded(torch.softmax(torch.randn(shape, generator=generator), 1), own["gates"])
    experts, positions, offsets = draw_routing(case, generator)
    x = normal(case.input_rows, K, x_size / gauge.u, case.dtype)
    grad_out = normal(*case.output_shape, dOut_size / gauge.t, case.dtype)
    if case.data == "cancelling":
        x, grad_out = _cancelling(x, 1, 1), _cancelling(grad_out, 1, 1)
        lora_A = None if lora_A is None else _cancelling(lora_A, 1, -1)
        lora_B = None if lora_B is None else _cancelling(lora_B, 0, -1)
    problem = Problem(
        x,
        weights.to(device),
        case.k,
        experts.to(device),
        positions.to(device),
        offsets.to(device),
        lora_A,
        lora_B,
        case.scaling,
        bias,
        gates,
        case.grouped_in,
        case.grouped_out,
    )
    return repeated(Sample(case, problem, grad_out))
