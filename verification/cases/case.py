"""From a case to numbers.

A `Case` says what to draw, a `Sample` is one draw: a validated problem and the gradient of its output. The same
case and seed give the same numbers on every device: everything is drawn on the CPU and then moved.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mxref.formats import E8M0_BIAS, MX_BLOCK_SIZE
from mxref.problem import Problem
from mxref.routing import flatten_sort_count
from mxref.weights import MXWeights

__all__ = ["Case", "Gauge", "Sample", "draw_gauge", "draw_routing", "sample_for_weights", "scale_bytes"]

Routing = Literal["uniform", "empty_experts", "one_expert", "sentinels", "ten_active"]
Data = Literal["plain", "balanced", "lora", "bias", "positive", "cancelling", "wide", "boundary", "integer"]


@dataclass(frozen=True)
class Case:
    """What to draw. Sizes as in `Problem`; every combination that its flags allow is meaningful.

    Attributes:
        name: unique within a suite; it also seeds the draw.
        experts, K, N: the weight stack, W_e is [K, N].
        tokens, top_k: the router's choice, [tokens, top_k]; P = tokens · top_k routed rows.
        rank: LoRA rank, 0 for no LoRA.
        dtype: activation dtype.
        parameter_dtype: dtype of lora_A, lora_B, biases and gates, whose values fill it; None for the activation dtype.
        routing: uniform over experts; leaving a first, a middle and the last expert empty; everything to one expert;
            a quarter of the rows sentinels; or at most ten experts active.
        data: `plain`, ordinary magnitudes, LoRA's term a tenth of the base's; `balanced`, both terms alike; `lora`,
            `bias`, that term far above all others; `positive`, every number positive; `cancelling`, all sums over K
            and N nearly zero (K a multiple of 64, N even); `wide`, scale bytes over 2^±60; `boundary`, scale bytes at
            both ends of the range that decodes finitely; `integer`, fixtures that are exact in any order of summation
            (see `integer`).
        scaling: LoRA's s.
        bias: whether there are expert biases.
        gate_slots: g, or 0 for no gates.
        grouped_in: inputs come in expert order, one row a routed row.
        fan_out: k, rows that each input row feeds; None for top_k (1 with `grouped_in`).
        grouped_out, use_fused_dX, use_fused_gather: passed to the call.
    """

    name: str
    experts: int = 4
    K: int = 64
    N: int = 64
    tokens: int = 16
    top_k: int = 2
    rank: int = 4
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype | None = None
    routing: Routing = "uniform"
    data: Data = "plain"
    scaling: float = 2.0
    bias: bool = False
    gate_slots: int = 0
    grouped_in: bool = False
    fan_out: int | None = None
    grouped_out: bool = False
    use_fused_dX: bool = False
    use_fused_gather: bool = False

    @property
    def rows(self) -> int:
        """P, the routed rows."""
        return self.tokens * self.top_k

    @property
    def k(self) -> int:
        """The call's k: routed rows that each input row feeds."""
        if self.fan_out is not None:
            return self.fan_out
        return 1 if self.grouped_in else self.top_k

    @property
    def input_rows(self) -> int:
        """Rows of x."""
        return self.rows // self.k

    @property
    def output_shape(self) -> tuple[int, int]:
        """Shape of what the call returns."""
        return (self.rows // self.gate_slots if self.gate_slots else self.rows), self.N

    def build(self, device: torch.device | str = "cpu", seed: int = 0) -> Sample:
        """Draw one sample.

        Raises:
            ValueError: integer data for which no draw is exact at every rounding point (the sizes are too large).
        """
        if self.data == "integer":
            from mxref.verification.cases.integer import integer_sample

            return integer_sample(self, device, seed)
        draw = torch.Generator().manual_seed(self.draw_seed(seed))
        weights, gauge = _draw_weights(self, draw)
        return _sample(self, weights, gauge, device, draw)

    def draw_seed(self, seed: int) -> int:
        """Seed of this case's own stream."""
        return (zlib.crc32(self.name.encode()) << 16) ^ seed

    def flags(self) -> dict[str, bool]:
        """The keywords that choose kernels and are not part of `Problem`."""
        return {"use_fused_dX": self.use_fused_dX, "use_fused_gather": self.use_fused_gather}


@dataclass(frozen=True, eq=False)
class Sample:
    """One draw of a case. `grad_out` is the gradient of the call's output, in the activation dtype."""

    case: Case
    problem: Problem
    grad_out: Tensor

    def mapped(self, place: Callable[[str, Tensor], Tensor]) -> Sample:
        """The sample with `place(name, tensor)` for every tensor: each operand, `packed` and `scales`, `grad_out`."""
        replaced: dict[str, Any] = {}
        for name, operand in self.problem.arguments().items():
            if isinstance(operand, MXWeights):
                packed, scales = place("packed", operand.packed), place("scales", operand.scales)
                replaced[name] = replace(operand, packed=packed, scales=scales)
            elif isinstance(operand, Tensor):
                replaced[name] = place(name, operand)
        return Sample(self.case, replace(self.problem, **replaced), place("grad_out", self.grad_out))

    def to(self, device: torch.device | str) -> Sample:
        """The same numbers on another device; what is there already is not copied."""
        return self.mapped(lambda _, tensor: tensor.to(device))


@dataclass(frozen=True)
class Gauge:
    """Powers of two that spread the scale bytes and leave every product's magnitude alone.

    With W[k, n]·2^(t[n] + u[k]), x·2^-u, A·2^u, B and bias·2^t and dOut·2^-t, every product in x·W, x·Aᵀ, Z·Bᵀ,
    dY·B, dY·Wᵀ and V·A keeps the ratio to its sum that it had without a gauge.

    Attributes:
        t: the powers 2^t, fp64 [N].
        u: the powers 2^u, fp64 [K].
    """

    t: Tensor
    u: Tensor

    @classmethod
    def none(cls, K: int, N: int) -> Gauge:
        """The gauge that changes nothing."""
        return cls(torch.ones(N, dtype=torch.float64), torch.ones(K, dtype=torch.float64))

    @classmethod
    def from_exponents(cls, t: Tensor, u: Tensor) -> Gauge:
        """From integer exponents a column [N] and a K-block [K/32]."""
        return cls(torch.exp2(t.double()), torch.exp2(u.double()).repeat_interleave(MX_BLOCK_SIZE))


def sample_for_weights(
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
    draw = torch.Generator().manual_seed(case.draw_seed(seed))
    return _sample(case, weights, Gauge.none(weights.K, weights.N), weights.device, draw)


def draw_routing(case: Case, draw: torch.Generator) -> Tensor:
    """The router's choice, int64 [tokens, top_k]: distinct experts a token, unless one expert takes everything.

    Raises:
        ValueError: the routing leaves fewer experts than top_k.
    """
    E, shape = case.experts, (case.tokens, case.top_k)
    if case.routing == "one_expert":
        return torch.full(shape, E // 2)
    allowed = torch.arange(E)
    if case.routing == "empty_experts":
        allowed = allowed[(allowed != 0) & (allowed != E // 2) & (allowed != E - 1)]
    elif case.routing == "ten_active":
        allowed = torch.randperm(E, generator=draw)[:10]
    scores = torch.rand(case.tokens, allowed.numel(), generator=draw)
    choice = allowed[scores.argsort(1)[:, : case.top_k]]
    if choice.shape != shape:
        raise ValueError(f"top_k is {case.top_k}; {case.name} leaves {allowed.numel()} experts to choose from")
    if case.routing == "sentinels":
        foreign = torch.randint(0, 3, shape, generator=draw)
        away = torch.rand(shape, generator=draw) < 0.25
        choice = torch.where(away, torch.tensor([-1, E, E + 7])[foreign], choice)
    return choice


def draw_gauge(case: Case, draw: torch.Generator, spread: int) -> Gauge:
    """Exponents uniform in ±spread, one a column and one a K-block, shared by all experts."""
    t = torch.randint(-spread, spread + 1, (case.N,), generator=draw)
    u = torch.randint(-spread, spread + 1, (case.K // MX_BLOCK_SIZE,), generator=draw)
    return Gauge.from_exponents(t, u)


def scale_bytes(gauge: Gauge) -> Tensor:
    """The gauge's E8M0 bytes: int64 [N, K/32], 127 + t + u."""
    t, u = torch.log2(gauge.t).long(), torch.log2(gauge.u[::MX_BLOCK_SIZE]).long()
    return E8M0_BIAS + t[:, None] + u[None, :]


def _draw_weights(case: Case, draw: torch.Generator) -> tuple[MXWeights, Gauge]:
    """Uniform random codes; scale bytes as `data` says."""
    E, K, N = case.experts, case.K, case.N
    packed = torch.randint(0, 256, (E, N, K // 2), generator=draw, dtype=torch.uint8)
    shape = (E, N, K // MX_BLOCK_SIZE)
    half = case.dtype == torch.float16
    if case.data == "boundary":
        # Bytes 0..252 decode finitely in bf16, 104..140 exactly in fp16: both ends, and the middle.
        t, u = ([-12, 0, 7], [-11, 0, 6]) if half else ([-64, 0, 63], [-63, 0, 62])
        gauge = Gauge.from_exponents(_cycle(t, N), _cycle(u, K // MX_BLOCK_SIZE))
        scales = scale_bytes(gauge).expand(shape)
    elif case.data == "wide":
        gauge = draw_gauge(case, draw, 3 if half else 54)
        jitter = torch.randint(-10, -2, shape, generator=draw)
        scales = scale_bytes(gauge) + jitter
    else:
        gauge = Gauge.none(K, N)
        scales = torch.randint(E8M0_BIAS - 9, E8M0_BIAS - 4, shape, generator=draw)
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


def _sample(case: Case, weights: MXWeights, gauge: Gauge, device: torch.device | str, draw: torch.Generator) -> Sample:
    E, K, N, r = case.experts, case.K, case.N, case.rank

    own = case.parameter_dtype
    grid = torch.bfloat16 if case.dtype == torch.float32 else case.dtype

    def normal(rows: int, columns: int, factor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(rows, columns, generator=draw) * factor.float()
        x = x.abs() if case.data == "positive" else x
        return x.to(dtype or grid).to(dtype or case.dtype).to(device)

    loose = 2.0**-4 if case.data == "boundary" else 1.0  # codes up to 6 without the usual 2^-6 scale
    sizes = {"plain": 0.02, "balanced": 0.2, "lora": 16.0}
    lora_A = lora_B = bias = gates = None
    if r:
        lora_A = normal(E * r, K, gauge.u / K**0.5, own)
        lora_B = normal(N, E * r, gauge.t[:, None] * sizes.get(case.data, 0.1) * (K / r) ** 0.5 / 8, own)
    if case.bias:
        bias = normal(E, N, gauge.t * (128.0 if case.data == "bias" else 0.5), own)
    if case.gate_slots:
        shape = (case.rows // case.gate_slots, case.gate_slots)
        gates = torch.softmax(torch.randn(shape, generator=draw), 1).to(own or grid).to(own or case.dtype).to(device)
    experts, positions, offsets = flatten_sort_count(draw_routing(case, draw), E)
    x, grad_out = normal(case.input_rows, K, loose / gauge.u), normal(*case.output_shape, loose / gauge.t)
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
    problem.validate(check_values=True)
    return Sample(case, problem, grad_out)
