"""The two big products on routed rows, Y and D, with their adapters; both read the one packed buffer."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache

import torch
from torch import Tensor

from mxref.kernels.device.configs import Config
from mxref.kernels.device.grouped_matmul import GroupedMatmul
from mxref.kernels.device.launch import kinds, stream_of
from mxref.kernels.device.stack import PackedMatrix, Stack
from mxref.kernels.layer.operands import (
    adapter_of,
    check_problem,
    columns_by_expert,
    operand,
    projection,
    routing_of,
    rows_by_expert,
)
from mxref.problem import Problem
from mxref.weights import MXWeights

__all__ = ["scatter2scatter_lora_dX_mx", "scatter2scatter_lora_mx"]


def scatter2scatter_lora_mx(
    X: Tensor,
    W_mx: MXWeights,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    k: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    b: Tensor | None = None,
    x_grouped: bool = False,
    y_grouped: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Y = R(s·Z·Bᵀ + X·W + bias) for every routed row, straight from packed weights; not differentiable.

    Args:
        X: [P / k, K], or [P, K] in expert order with `x_grouped` (then k = 1).
        W_mx: the packed stack.
        sorted_expert_idxs: integer [P], ascending, sentinels ≥ E last.
        sorted_scattered_idxs: integer [P], position of each routed row.
        k: rows of the output that each row of X feeds.
        lora_A: [E·r, K].
        lora_B: [N, E·r].
        scaling: s.
        b: biases [E, N].
        x_grouped: X is in expert order.
        y_grouped: leave Y in expert order instead of putting each row at its position.
        out: contiguous [P, N] to fill; sentinel rows become zero in it too.

    Returns:
        [P, N] of X's dtype (fp32 under the interpreter).

    Raises:
        TypeError, ValueError, RuntimeError: see `check_problem`.
    """
    offsets = _offsets(sorted_expert_idxs, W_mx)
    problem = Problem(
        X, W_mx, k, sorted_expert_idxs, sorted_scattered_idxs, offsets, lora_A, lora_B, scaling, b, None, x_grouped
    )
    fan_in, fan_out = None if x_grouped else k, None if y_grouped else 1
    return _product(problem, X, fan_in, fan_out, out, transposed=False)


def scatter2scatter_lora_dX_mx(
    DY: Tensor,
    W_mx: MXWeights,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    k: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dy_grouped: bool = True,
    dx_grouped: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """D = R(s·V·A + DY·Wᵀ) for every routed row, straight from the forward's packed weights; not differentiable.

    Args:
        DY: [P, N] in expert order, or [P / k, N] by position with `dy_grouped=False`.
        W_mx: the packed stack.
        sorted_expert_idxs: integer [P], ascending, sentinels ≥ E last.
        sorted_scattered_idxs: integer [P], position of each routed row.
        k: routed rows that each row of DY feeds; 1 with `dy_grouped`.
        lora_A: [E·r, K].
        lora_B: [N, E·r].
        scaling: s.
        dy_grouped: DY is in expert order.
        dx_grouped: leave D in expert order instead of putting each row at its position.
        out: contiguous [P, K] to fill; sentinel rows become zero in it too.

    Returns:
        [P, K] of DY's dtype (fp32 under the interpreter), one row a routed row: the sum over slots is the caller's.

    Raises:
        TypeError, ValueError, RuntimeError: see `check_problem`; there `inputs` stands for the rows of dX.
    """
    offsets = _offsets(sorted_expert_idxs, W_mx)
    P = sorted_expert_idxs.shape[0]
    if dy_grouped and k != 1:
        raise ValueError(f"k is {k} with dy_grouped; grouped rows are one a routed row, so k must be 1")
    if DY.ndim != 2 or DY.shape[0] * k != P or DY.shape[1] != W_mx.N:
        raise ValueError(f"DY has shape {tuple(DY.shape)}; expected [P / k, N] with P = {P}, k = {k}, N = {W_mx.N}")
    dx_stand_in = DY.new_empty(1, 1).expand(P, W_mx.K)
    problem = Problem(dx_stand_in, W_mx, 1, sorted_expert_idxs, sorted_scattered_idxs, offsets, lora_A, lora_B, scaling)
    fan_in, fan_out = None if dy_grouped else k, None if dx_grouped else 1
    return _product(problem, DY, fan_in, fan_out, out, transposed=True)


def _product(
    problem: Problem, given: Tensor, fan_in: int | None, fan_out: int | None, out: Tensor | None, transposed: bool
) -> Tensor:
    """The rows `given` times the problem's weights, or `transposed` ones, with the adapter's share and the bias."""
    config, weights = check_problem(problem), problem.expert_weights
    assert isinstance(weights, MXWeights)
    matrix = PackedMatrix.of(weights, given.dtype, transposed)
    routing = routing_of(problem.sorted_scattered_idxs, problem.expert_offsets)
    rows, down, up, low = operand(given), None, None, None
    out = _output(out, rows, problem.P, matrix.shape[2])
    A, B = adapter_of(problem)
    if A is not None and B is not None:
        A_e, B_e = rows_by_expert(A.shape, problem.E), columns_by_expert(B.shape, problem.E)
        down, up = (B_e, A_e) if transposed else (A_e.transposed, B_e.transposed)
    bias = None if problem.expert_biases is None else operand(problem.expert_biases)
    alike = kinds(out, rows, A, B, bias, routing.positions, routing.offsets)
    scaling = float(problem.scaling).hex()
    projected, product = _products(matrix, config, problem.P, fan_in, fan_out, down, up, scaling, alike)
    inner, outer = (B, A) if transposed else (A, B)
    stream = stream_of(rows)
    if projected is not None and inner is not None:
        low = projected(stream, rows, inner, None, routing)
    return product(stream, rows, weights.packed, weights.scales, routing, low, outer, bias, out)


@lru_cache(4096)
def _products(
    matrix: PackedMatrix,
    config: Config,
    P: int,
    fan_in: int | None,
    fan_out: int | None,
    down: Stack | None,
    up: Stack | None,
    s: str,
    alike: Hashable,
) -> tuple[GroupedMatmul | None, GroupedMatmul]:
    """An adapter's projection, and the product with its share, for tensors of these kinds.

    `s` as `float.hex` writes it: numbers as keys would take −0 for 0.
    """
    projected = None if down is None else projection(down, config, P, fan_in)
    return projected, GroupedMatmul(matrix, config, P, fan_in, fan_out, up, float.fromhex(s))


def _offsets(sorted_expert_idxs: Tensor, weights: MXWeights) -> Tensor:
    """Inclusive cumulative counts of ids below E, counted on the device."""
    if not isinstance(weights, MXWeights):
        raise TypeError(f"W_mx is {type(weights).__name__}; expected an MXWeights")
    if not isinstance(sorted_expert_idxs, Tensor) or sorted_expert_idxs.ndim != 1:
        raise TypeError("sorted_expert_idxs is not a tensor of one dimension; see flatten_sort_count")
    ids = torch.arange(weights.E, device=sorted_expert_idxs.device, dtype=sorted_expert_idxs.dtype)
    return torch.searchsorted(sorted_expert_idxs.contiguous(), ids, right=True)


def _output(out: Tensor | None, rows: Tensor, P: int, columns: int) -> Tensor:
    if out is None:
        return rows.new_empty(P, columns)
    if out.shape != (P, columns) or out.dtype != rows.dtype or out.device != rows.device or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}; expected contiguous {rows.dtype} "
            f"{(P, columns)} on {rows.device}"
        )
    return out
