"""A case says what is asked, a sample is one draw of it: a validated problem and the gradient of its output."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mxref.problem import Problem
from mxref.verification.arithmetic.tensor_bytes import bytes_of
from mxref.verification.cases.call import Call
from mxref.weights import MXLayout, MXWeights

T = TypeVar("T")
Routing = Literal[
    "uniform", "empty_experts", "one_expert", "ten_active", "duplicates", "sentinels", "all_sentinels",
    "far_sentinels", "about_tiles", "whole_tiles", "equal",
]  # fmt: skip
PositionOrder = Literal["ascending", "descending", "shuffled"]
Data = Literal[
    "plain", "balanced", "lora", "tiny lora", "bias", "positive", "cancelling", "wide", "boundary", "off_grid",
    "subnormal", "tiny dOut", "large", "integer", "rounded", "elements", "one_hot_elements", "elements_by_expert",
    "every_element", "nonfinite",
]  # fmt: skip
Special = Literal[
    "", "nan row", "nan row, zero dOut", "inf row", "nan dOut", "inf dOut", "nan expert", "nan remote",
    "large partners",
]  # fmt: skip
GateValues = Literal["positive", "negative", "some zero", "zero", "one NaN"]
AdapterValues = Literal[
    "ordinary", "zero A", "zero B", "nan A", "nan A, zero B", "nan B", "zero expert", "Z overflows", "V overflows",
    "s·Z overflows",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What to draw. Sizes as in `Problem`.

    Attributes:
        name: unique within a suite; it also seeds the draw.
        experts, K, N: the weight stack, W_e is [K, N].
        tokens, top_k: the router's choice, [tokens, top_k]; P = tokens · top_k routed rows.
        rank: LoRA rank, 0 for no LoRA.
        dtype: activation dtype.
        parameter_dtype: of lora_A, lora_B, biases and gates, whose values fill it; None for the activation dtype.
        adapter_dtype: of lora_A and lora_B, where it is another one.
        own_dtypes: of lora_A, lora_B, biases and gates, in place of both, where they differ.
        routing: uniform over experts; a first, a middle and the last expert empty; one expert for all, the first, a
            middle or the last; at most ten; an expert in several slots of a token; sentinels, as `choose` has it one
            row, a quarter of the rows, with or without an empty first expert, or of the first half of the tokens', most
            rows, or all but one; all rows; sentinels' ids far above E; as many rows an expert as a tile may have, one
            fewer and one more; whole tiles before sentinels; or as many rows for every expert.
        position_order: within an expert; `shuffled` leaves the first and last of every sixteen where they are.
        data: `plain`, LoRA's term a tenth of the base's; `balanced`, both alike; `lora`, `bias`, that term far above
            all others; `tiny lora`, lora_A of every second expert, lora_B of the others below the normal range;
            `positive`, every number; `cancelling`, all sums over K and N nearly zero (K a multiple of 64, N even);
            `wide`, scale bytes over 2^±60; `boundary`, at both ends of the range that decodes finitely; `off_grid`,
            fp32 numbers that no 16-bit format holds; `subnormal`, activations and biases below the normal range; `tiny
            dOut`, dOut alone; `large`, activations whose results in fp16 are infinite, though Z and V are not;
            `integer`, exact in any order of summation, `rounded`, with results that 16 bits round, and codes under
            chosen scale bytes: see the modules of these names, and `elements`.
        scaling: LoRA's s; lora_B makes up for a tiny one, unless something has fp16's range.
        bias: whether there are expert biases.
        nan_bias: one of those is NaN; in an integer fixture the first and the last are infinite.
        gate_slots: g, or 0 for no gates.
        gate_exponent: gates are multiplied by 2^gate_exponent, exactly.
        gate_values: `negative` turns the sign of every second gate, `some zero` sets every third to zero, `zero`
            all, `one NaN` the middle one to NaN, and in an integer fixture the first and last to infinities.
        adapter_values: lora_A is zero, as `choose` has it lora_B with it, or lora_B, as training begins; lora_B and the
            biases of one expert are zero, and lora_A of the next; lora_A or lora_B of the last expert holds NaN, and in
            an integer fixture its first and last number are infinite; there in fp16 Z, or V, of more than one term
            rounds to infinity, or s times Z of one term would, though Y is small.
        special: what is not finite: one row of x or dOut (of infinities two rows, one of either sign), one row of x
            whose rows of dOut are zero, one expert's weights, or what only sentinels' slots read; "large partners" is
            for `elements`.
        grouped_in: inputs come in expert order, one row a routed row.
        fan_out: k, rows that each input row feeds; None for top_k (1 with `grouped_in`).
        grouped_out, use_fused_dX, use_fused_gather: passed to the call.
        dense: decoded weights, a view [E, K, N] of the activation dtype.
        off_grid_weights: such numbers as no MXFP4 weight is.
        layout: of packed weights, in memory; N a multiple of 32 for FRAGMENTS.
        quantised_from: what packed weights say that they were quantised from, which changes nothing.
        scale_bytes: of `nonfinite` data, and of `elements` where they are not every finite one.
        call: how the caller calls.
        covers: (dimension, class) of each dimension of the domain that the case was made for, see `domain`.
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
    adapter_dtype: torch.dtype | None = None
    own_dtypes: tuple[torch.dtype, ...] = ()
    routing: Routing = "uniform"
    position_order: PositionOrder = "ascending"
    data: Data = "plain"
    scaling: float = 2.0
    bias: bool = False
    nan_bias: bool = False
    gate_slots: int = 0
    gate_exponent: int = 0
    gate_values: GateValues = "positive"
    adapter_values: AdapterValues = "ordinary"
    special: Special = ""
    grouped_in: bool = False
    fan_out: int | None = None
    grouped_out: bool = False
    use_fused_dX: bool = False
    use_fused_gather: bool = False
    dense: bool = False
    off_grid_weights: bool = False
    layout: MXLayout = MXLayout.FWD
    quantised_from: torch.dtype = torch.bfloat16
    scale_bytes: tuple[int, ...] = ()
    call: Call = field(default_factory=Call)
    covers: tuple[tuple[str, str], ...] = ()

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

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of each parameter, by its name in `Problem`."""
        others = self.parameter_dtype or self.dtype
        adapters = self.adapter_dtype or others
        dtypes = self.own_dtypes or (adapters, adapters, others, others)
        return dict(zip(("lora_A", "lora_B", "expert_biases", "gates"), dtypes, strict=True))

    @property
    def narrow(self) -> bool:
        """Whether something has fp16's range."""
        return torch.float16 in (self.dtype, *self.dtypes.values())

    @property
    def exact(self) -> bool:
        """Whether every honest result is the same to the last bit, in any order of summation."""
        return self.data in ("integer", "rounded", "elements", "one_hot_elements", "elements_by_expert", "nonfinite")

    def draw_seed(self, seed: int) -> int:
        """Seed of this case's own stream."""
        return (zlib.crc32(self.name.encode()) << 16) ^ seed

    def choose(self, what: str, *among: T) -> T:
        """One of several, by a checksum of the case's name: other cases of the same classes have another one."""
        return among[zlib.crc32(f"{what} of {self.name}".encode()) % len(among)]

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
        return self.changed(place("grad_out", self.grad_out), **replaced)

    def checksum(self) -> tuple[object, ...]:
        """What it asks, with a checksum of each tensor: equal as long as nobody has changed it."""
        found: list[object] = [self.case]

        def note(name: str, x: Tensor) -> Tensor:
            content = bytes_of(x.cpu()).numpy()
            found.append((name, x.shape, x.dtype, zlib.crc32(content.tobytes())))
            return x

        self.mapped(note)
        operands = self.problem.arguments().items()
        return *found, *(item for item in operands if not isinstance(item[1], Tensor | MXWeights))

    def changed(self, grad_out: Tensor | None = None, **operands: Any) -> Sample:
        """The sample with other operands, by their names in `Problem`."""
        problem = replace(self.problem, **operands)
        return Sample(self.case, problem, self.grad_out if grad_out is None else grad_out)

    def called(self, **how: Any) -> Sample:
        """The sample for another way to call, by the names in `Call`."""
        return replace(self, case=replace(self.case, call=replace(self.case.call, **how)))

    def to(self, device: torch.device | str) -> Sample:
        """The same numbers on another device; what is there already is not copied."""
        return self.mapped(lambda _, tensor: tensor.to(device))
