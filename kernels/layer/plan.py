"""What a call of the layer is beside its tensors, with its products: found once for all calls alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mxref.kernels.device.configs import Config
from mxref.kernels.device.grouped_matmul import GroupedMatmul
from mxref.kernels.device.grouped_outer import Outer, grouped_outer
from mxref.kernels.device.launch import PreparedLaunch, architecture, compute_dtype
from mxref.kernels.device.stack import PackedMatrix, Stack
from mxref.kernels.layer.operands import (
    check_problem,
    columns_by_expert,
    dense_weights,
    kind_of,
    kind_of_weights,
    projection,
    rows_by_expert,
)
from mxref.problem import Problem
from mxref.weights import MXLayout, MXWeights

__all__ = ["Needs", "Plan"]


class Needs(NamedTuple):
    """Which operands need a gradient."""

    inputs: bool
    lora_A: bool
    lora_B: bool
    expert_biases: bool
    gates: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """What a call is beside its tensors. It holds none: those are autograd's to keep, or to let go.

    Attributes:
        config: the tiling.
        dtype: the activation dtype.
        P: routed rows.
        matrix: the weights as the forward multiplies by them.
        scaling: s.
        fan_in: finds x's row of a routed row.
        in_order: dOut is in expert order.
        use_fused_dX, use_fused_gather: see `parallel_linear_lora`.
        operands: shape of each operand of `Needs` that was given, and its dtype in memory.
    """

    config: Config
    dtype: torch.dtype
    P: int
    matrix: Stack | PackedMatrix
    scaling: float
    fan_in: int | None
    in_order: bool
    use_fused_dX: bool
    use_fused_gather: bool
    operands: dict[str, tuple[torch.Size, torch.dtype]]

    @classmethod
    def of(
        cls,
        operands: tuple[Any, ...],
        use_fused_dX: bool,
        use_fused_gather: bool,
        validate: bool = False,
        config: Config | None = None,
    ) -> Plan:
        """Check a call and plan it; see `parallel_linear_lora` for what it raises.

        Beside index values the checks read no more of an operand than its kind, and neither does the plan: what was
        found for operands of these kinds before holds again.

        Args:
            operands: the fields of a `Problem`, in its order.
            use_fused_dX, use_fused_gather: see `parallel_linear_lora`.
            validate: also check the index tensors' values on a GPU, which synchronises; on CPU they always are.
            config: a pinned tiling.
        """
        x, weights, k, experts, positions, offsets, A, B, scaling, bias, gates, grouped_in, grouped_out = operands
        where = architecture(x.device) if isinstance(x, Tensor) else None
        s = str(scaling) if isinstance(scaling, float) and not scaling else scaling  # as numbers −0 and 0 are equal
        try:  # written out, since each loop and each call would cost more than what it does
            kinds = (
                where, kind_of_weights(weights), kind_of(x), kind_of(experts), kind_of(positions), kind_of(offsets),
                None if A is None else kind_of(A), None if B is None else kind_of(B),
                None if bias is None else kind_of(bias), None if gates is None else kind_of(gates),
                k, type(k), s, type(scaling), config,
                not grouped_in, not grouped_out, not use_fused_dX, not use_fused_gather,
            )  # fmt: skip
            plan = _PLANS.get(kinds)
        except (AttributeError, TypeError):  # an argument that is refused below
            plan = None
        if plan is None or validate or where == "interpreter":
            problem = Problem(*operands)
            tiling = check_problem(problem, validate, config)
        if plan is None:
            weights, fused = problem.expert_weights, tiling.fused
            if isinstance(weights, MXWeights):
                matrix: Stack | PackedMatrix = PackedMatrix.of(weights, problem.dtype)
                fused |= weights.layout == MXLayout.FRAGMENTS  # which products alone decode
            else:
                matrix = Stack.of(dense_weights(weights))
            given = {name: x for name in Needs._fields if (x := getattr(problem, name)) is not None}
            plan = cls(
                tiling,
                problem.dtype,
                problem.P,
                matrix,
                float(problem.scaling),
                None if problem.grouped_in else problem.k,
                problem.grouped_out,
                use_fused_dX or fused,
                use_fused_gather or tiling.fused,
                {name: (x.shape, compute_dtype(x.dtype)) for name, x in given.items()},
            )
            if len(_PLANS) >= 4096:
                _PLANS.clear()
            _PLANS[kinds] = plan
        return plan

    def gradient(self, name: str, like: Tensor) -> Tensor:
        """An uninitialised gradient in its operand's own dtype, where `like` lies."""
        shape, dtype = self.operands[name]
        return like.new_empty(*shape) if dtype == like.dtype else like.new_empty(*shape, dtype=dtype)

    @cached_property
    def A(self) -> Stack:
        """lora_A as [E, r, K]."""
        return rows_by_expert(self.operands["lora_A"][0], self.matrix.shape[0])

    @cached_property
    def B(self) -> Stack:
        """lora_B as [E, N, r]."""
        return columns_by_expert(self.operands["lora_B"][0], self.matrix.shape[0])

    @cached_property
    def z(self) -> GroupedMatmul:
        """Z of x and A."""
        return projection(self.A.transposed, self.config, self.P, self.fan_in)

    @cached_property
    def y(self) -> GroupedMatmul:
        """Y of x and the weights, in expert order if it is to be summed over slots."""
        fan_out = None if self.in_order or "gates" in self.operands else 1
        factor = self.B.transposed if "lora_B" in self.operands else None
        return GroupedMatmul(self.matrix, self.config, self.P, self.fan_in, fan_out, factor, self.scaling)

    @cached_property
    def spread(self) -> bool:
        """Whether dY is made in expert order, for its gates or to be gathered first; otherwise dOut is dY."""
        return "gates" in self.operands or not (self.in_order or self.use_fused_gather)

    @cached_property
    def fan_of_dY(self) -> int | None:
        """Finds dY's row of a routed row."""
        return None if self.spread or self.in_order else 1

    @cached_property
    def v(self) -> GroupedMatmul:
        """V of dY and B."""
        return projection(self.B, self.config, self.P, self.fan_of_dY)

    @cached_property
    def one_slot(self) -> bool:
        """Whether a row of x feeds one routed row, so that D is dX."""
        return self.fan_in in (None, 1)

    @cached_property
    def matrix_of_dX(self) -> Stack | PackedMatrix:
        """The weights as dX multiplies by them; where they are decoded first, what that makes."""
        if isinstance(self.matrix, Stack):
            return self.matrix.transposed
        E, K, N = self.matrix.shape
        if self.use_fused_dX:
            return self.matrix._replace(shape=(E, N, K), transposed=True)
        return Stack((E, N, K), (N * K, K, 1))

    @cached_property
    def d(self) -> GroupedMatmul:
        """D of dY and the weights."""
        return self.d_by(self.matrix_of_dX)

    def d_by(self, matrix: Stack | PackedMatrix) -> GroupedMatmul:
        """D of dY and weights that lie otherwise than planned."""
        fan_out = self.fan_in if self.one_slot else None
        factor = self.A if "lora_A" in self.operands else None
        return GroupedMatmul(matrix, self.config, self.P, self.fan_of_dY, fan_out, factor, self.scaling)

    @cached_property
    def sums(self) -> dict[tuple[bool, bool], PreparedLaunch]:
        """dA of V and x, and dB of Z and dY, by which of them are made."""
        dA, dB = Outer(self.A, self.fan_in), Outer(self.B.transposed, self.fan_of_dY)
        known = self.config, self.P, self.scaling
        return {
            (True, True): grouped_outer(*known, dA, dB),
            (True, False): grouped_outer(*known, dA),
            (False, True): grouped_outer(*known, dB),
        }


_PLANS: dict[tuple[Any, ...], Plan] = {}
"""Plans by the kinds of a call's operands; none holds a tensor."""
