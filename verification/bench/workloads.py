"""What is timed: shapes of real layers, their operands, and the limit that no implementation can beat.

The limit of one projection's product is the larger of two times, that of its arithmetic at the machine's matmul rate
and that of its bytes at the machine's copy rate; dX costs the same as the forward product. Decoding has bytes alone:

    max( 2·P·K·N / matmul,  (active·K·N·17/32 + M·K·2 + P·N·2) / copy )         active·K·N·(17/32 + 2) / copy

The base products by themselves are timed on rows that are gathered already: P·K·2 in place of M·K·2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from mxref.formats import E8M0_BIAS, MX_BLOCK_SIZE
from mxref.problem import Problem
from mxref.routing import flatten_sort_count
from mxref.weights import MXWeights, decode_mxfp4

PACKED_BYTES = 17 / 32
"""Bytes of one MXFP4 weight: four bits, and an eighth byte of scale a block of 32."""

DECODING_BYTES = PACKED_BYTES + 2
"""Bytes that decoding one weight to bf16 moves."""


@dataclass(frozen=True)
class Shape:
    """One projection of a layer and its traffic.

    Attributes:
        name: unique.
        experts, K, N: the weight stack, W_e is [K, N].
        tokens, top_k: M and k; P = M·k routed rows.
        routing: `uniform`, k distinct experts a token at random; `balanced`, every expert the same number of rows;
            `ten_active`, at random among ten experts.
        rank: LoRA rank.
    """

    name: str
    experts: int
    K: int
    N: int
    tokens: int
    top_k: int
    routing: Literal["uniform", "balanced", "ten_active"] = "uniform"
    rank: int = 16

    @property
    def rows(self) -> int:
        """P, the routed rows."""
        return self.tokens * self.top_k

    def route(self, generator: torch.Generator) -> Tensor:
        """The router's choice, int64 [tokens, top_k] on the generator's device, distinct experts a token."""
        device, E, k = generator.device, self.experts, self.top_k
        if self.routing == "balanced":
            order = torch.randperm(self.tokens, generator=generator, device=device)
            chosen = (order[:, None] * k + torch.arange(k, device=device)) % E
            return torch.randperm(E, generator=generator, device=device)[chosen]
        allowed = torch.randperm(E, generator=generator, device=device)
        if self.routing == "ten_active":
            allowed = allowed[:10]
        scores = torch.rand(self.tokens, allowed.numel(), generator=generator, device=device)
        return allowed[scores.argsort(1)[:, :k]]


DENSE = Shape("dense", 128, 2048, 1024, 4096, 8)
QUICK = (
    DENSE,
    Shape("sparse, 10 active", 256, 2048, 1024, 4096, 8, "ten_active"),
    Shape("thin", 256, 2048, 1024, 256, 8),
)
CASES = (
    *QUICK,
    Shape("balanced, 32 rows", 256, 2048, 1024, 1024, 8, "balanced"),
    Shape("balanced, 128 rows", 256, 2048, 1024, 4096, 8, "balanced"),
    Shape("balanced, 512 rows", 256, 2048, 1024, 16384, 8, "balanced"),
    Shape("gpt-oss gate_up", 32, 2880, 5760, 8192, 4),
    Shape("gpt-oss down", 32, 2880, 2880, 8192, 4),
)
LARGE = (
    Shape("DeepSeek-V4-like gate_up", 256, 7168, 4096, 4096, 8),
    Shape("DeepSeek-V4-like down", 256, 2048, 7168, 4096, 8),
)
"""4 GB of packed weights, 15 GB of bf16 ones: for GPUs with room."""


Part = Literal["layer", "base", "decode"]
"""What is computed: the layer with adapters; the base products alone, on rows that are in expert order before and
after; the active experts' weights, decoded."""


@dataclass(frozen=True)
class Measure:
    """Which part of a training step is timed.

    Attributes:
        name: unique.
        part: what is computed.
        forward, backward: the passes; the backward by autograd, from a random gradient of the output.
    """

    name: str
    part: Part
    forward: bool = True
    backward: bool = False

    @property
    def products(self) -> int:
        """Products with the base weights."""
        return 0 if self.part == "decode" else self.forward + self.backward


MEASURES = (
    Measure("step", "layer", backward=True),
    Measure("forward", "layer"),
    Measure("base", "base", backward=True),
    Measure("base forward", "base"),
    Measure("base dX", "base", forward=False, backward=True),
    Measure("decode", "decode"),
)


@dataclass(frozen=True, eq=False)
class Workload:
    """One shape's operands on one device.

    Attributes:
        shape: what was drawn.
        problem: a whole layer's call, with adapters and packed weights.
        grad_out: [P, N], random, the gradient of the output in whichever order that has its rows.
        active: experts that own rows.
    """

    shape: Shape
    problem: Problem
    grad_out: Tensor
    active: int

    @classmethod
    def draw(cls, shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Workload:
        """Random codes, scales of ordinary weights, normal activations and adapters, all drawn on the device."""
        generator = torch.Generator(device).manual_seed(seed)
        E, K, N, r = shape.experts, shape.K, shape.N, shape.rank

        def normal(rows: int, columns: int, size: float) -> Tensor:
            x = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.bfloat16)
            return (size * x).to(dtype)

        def octets(low: int, high: int, *sizes: int) -> Tensor:
            return torch.randint(low, high, sizes, generator=generator, device=device, dtype=torch.uint8)

        packed = octets(0, 256, E, N, K // 2)
        scales = octets(E8M0_BIAS - 9, E8M0_BIAS - 4, E, N, K // MX_BLOCK_SIZE)
        routed = flatten_sort_count(shape.route(generator), E)
        problem = Problem(
            normal(shape.tokens, K, 1.0),
            MXWeights(packed, scales, K, N),
            shape.top_k,
            *routed,
            lora_A=normal(E * r, K, K**-0.5),
            lora_B=normal(N, E * r, 0.1),
            scaling=2.0,
        )
        problem.validate(check_values=True)
        return cls(shape, problem, normal(shape.rows, N, 1.0), int(torch.unique(routed[0]).numel()))

    @cached_property
    def dense(self) -> Tensor:
        """The same weights decoded once, contiguous [E, K, N]."""
        weights = self.problem.expert_weights
        assert isinstance(weights, MXWeights)
        shape, dtype = (weights.E, weights.K, weights.N), self.problem.dtype
        out = torch.empty(shape, dtype=dtype, device=weights.device)
        for e in range(weights.E):  # one at a time: decoding unpacks each code to a byte
            one = replace(weights, packed=weights.packed[e : e + 1], scales=weights.scales[e : e + 1], num_experts=1)
            out[e] = decode_mxfp4(one, dtype)[0].T
        return out

    def operands(self, measure: Measure) -> dict[str, Any]:
        """Keyword arguments of the call. What takes part in the gradient is a leaf when `measure` goes backward."""
        problem = self.problem
        if measure.part != "layer":
            rows = problem.inputs[problem.row_sources()]
            problem = replace(problem, inputs=rows, k=1, lora_A=None, lora_B=None, grouped_in=True, grouped_out=True)
        operands = problem.arguments()
        for name in _LEAVES:
            if measure.backward and operands[name] is not None:
                operands[name] = operands[name].detach().requires_grad_()
        return operands

    def leaves_of(self, operands: dict[str, Any]) -> Sequence[Tensor]:
        """The leaves among the operands."""
        return [operands[name] for name in _LEAVES if operands[name] is not None]

    def flops(self, measure: Measure) -> float:
        """Useful floating-point operations: base products, and LoRA's products as they are defined, once a row."""
        s = self.shape
        base = 2.0 * s.rows * s.K * s.N * measure.products
        if measure.part != "layer":
            return base
        return base + 2.0 * s.rows * s.rank * (s.K + s.N) * (3 if measure.backward else 1)

    def bytes(self, measure: Measure, bytes_per_weight: float = PACKED_BYTES) -> float:
        """The fewest bytes that are moved: each active weight, each input and each output once, in bf16."""
        s = self.shape
        weights = self.active * s.K * s.N
        if measure.part == "decode":
            return weights * DECODING_BYTES
        inputs = s.tokens if measure.part == "layer" else s.rows
        return measure.products * (weights * bytes_per_weight + inputs * s.K * 2 + s.rows * s.N * 2)

    def least(self, measure: Measure) -> tuple[float, float]:
        """FLOPs and bytes of the base products, or of decoding, with weights in MXFP4: what the limit is made of."""
        s = self.shape
        return 2.0 * s.rows * s.K * s.N * measure.products, self.bytes(measure)


_LEAVES = ("inputs", "lora_A", "lora_B")
