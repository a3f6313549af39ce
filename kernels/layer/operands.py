"""From the caller's tensors to what the kernels read: validation, dtypes, contiguity, and views by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from mxref.kernels.device.configs import Config, config_for
from mxref.kernels.device.grouped_matmul import grouped_matmul
from mxref.kernels.device.launch import architecture, compute_dtype
from mxref.kernels.device.schedule import Routing
from mxref.problem import Problem
from mxref.weights import MXLayout, MXWeights

__all__ = [
    "adapter_of",
    "check_problem",
    "columns_by_expert",
    "frozen_weights",
    "operand",
    "project",
    "routing_of",
    "rows_by_expert",
]

MAX_RANK = 128
"""The largest LoRA rank: one tile holds all of it."""


def check_problem(problem: Problem, validate: bool = False, config: Config | None = None) -> Config:
    """Validate one call and give its tiling.

    Args:
        problem: the call's operands.
        validate: also check the index tensors' values on a GPU, which synchronises; on CPU they always are.
        config: a pinned tiling.

    Raises:
        TypeError: an operand has a wrong type, or a dtype that the kernels do not take.
        ValueError: an operand does not fit the others, the rank is too large, or `config` does not fit the chip.
        RuntimeError: no kernel can run on the operands' device.
    """
    problem.validate(check_values=validate or problem.device.type == "cpu")
    if problem.dtype == torch.float64:
        raise TypeError("inputs is torch.float64; the kernels take bf16, fp16 or fp32: use the golden mxref for fp64")
    if problem.rank > MAX_RANK:
        raise ValueError(f"lora_A has rank {problem.rank}; the kernels take ranks 1 to {MAX_RANK}")
    if isinstance(problem.expert_weights, MXWeights):
        problem.expert_weights.require_layout(MXLayout.FWD, "the kernel")
    arch = architecture(problem.device)
    if config is None:
        return config_for(arch, problem.P, problem.E, problem.dtype)
    if not isinstance(config, Config):
        raise TypeError(f"config is {type(config).__name__}; expected a mxref.kernels.Config")
    config.check_fits(arch, compute_dtype(problem.dtype))
    return config


def operand(x: Tensor) -> Tensor:
    """A tensor as a kernel takes it: contiguous, and in fp32 under the interpreter."""
    return x.contiguous().to(compute_dtype(x.dtype))


def routing_of(positions: Tensor, offsets: Tensor) -> Routing:
    """The kernels' view of a routing, contiguous."""
    return Routing(positions.contiguous(), offsets.contiguous())


def frozen_weights(weight: Tensor, scales: Tensor | None) -> Tensor | MXWeights:
    """Packed weights from codes [E, N, K/2] and scales [E, N, K/32] in the layout FWD; dense ones have no scales."""
    return weight if scales is None else MXWeights(weight, scales, 2 * weight.shape[2], weight.shape[1])


def adapter_of(problem: Problem) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """lora_A and lora_B as kernel operands, rounded to the activation dtype."""
    if problem.lora_A is None or problem.lora_B is None:
        return None, None
    return operand(problem.lora_A.to(problem.dtype)), operand(problem.lora_B.to(problem.dtype))


def rows_by_expert(A: Tensor, experts: int) -> Tensor:
    """[E·r, K] seen as [E, r, K]."""
    return A.view(experts, -1, A.shape[1])


def columns_by_expert(B: Tensor, experts: int) -> Tensor:
    """[N, E·r] seen as [E, N, r]."""
    return B.view(B.shape[0], experts, -1).permute(1, 0, 2)


def project(rows: Tensor, down: Tensor, routing: Routing, config: Config, fan_in: int | None) -> Tensor:
    """R(rows·down_e), Z or V: [P, r] in expert order; down is [E, C, r], `fan_in` as in `grouped_matmul`."""
    rank = down.shape[2]
    return grouped_matmul(rows, down, routing, config.projection(rank), rows.new_empty(routing.P, rank), fan_in)
