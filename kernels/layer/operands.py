"""From the caller's tensors to what the kernels read: validation, dtypes, contiguity, and views by expert."""

from __future__ import annotations

from collections.abc import Hashable
from operator import attrgetter

import torch
from torch import Tensor

from mxref.fragments import TILE
from mxref.kernels.device.configs import Config, config_for
from mxref.kernels.device.grouped_matmul import GroupedMatmul
from mxref.kernels.device.launch import INTERPRETED, architecture, compute_dtype
from mxref.kernels.device.schedule import Routing
from mxref.kernels.device.stack import Stack
from mxref.problem import Problem
from mxref.weights import MXLayout, MXWeights

__all__ = [
    "adapter_of",
    "check_problem",
    "columns_by_expert",
    "dense_weights",
    "frozen_weights",
    "kind_of",
    "kind_of_weights",
    "operand",
    "projection",
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
    problem.validate(check_values=False)
    arch = architecture(problem.device)
    if validate or arch == "interpreter":
        problem.validate(check_values=True)
    if problem.dtype == torch.float64:
        raise TypeError("inputs is torch.float64; the kernels take bf16, fp16 or fp32: use the golden mxref for fp64")
    if problem.rank > MAX_RANK:
        raise ValueError(f"lora_A has rank {problem.rank}; the kernels take ranks 1 to {MAX_RANK}")
    weights, layout = problem.expert_weights, None
    if isinstance(weights, MXWeights):
        weights.require_known_layout("the kernel")
        layout = weights.layout
        if layout == MXLayout.FRAGMENTS and weights.N % TILE:
            raise ValueError(
                f"expert_weights has N = {weights.N} in the layout FRAGMENTS, of which the kernels read whole tiles of "
                f"{TILE} rows: call repack(MXLayout.FWD)"
            )
    if config is None:
        return config_for(arch, problem.P, problem.E, problem.dtype, layout or MXLayout.FWD)
    if not isinstance(config, Config):
        raise TypeError(f"config is {type(config).__name__}; expected a mxref.kernels.Config")
    if layout is not None and config.layout is not None and config.layout != layout:
        raise ValueError(f"config {config} is for weights in the layout {config.layout.name}; these have {layout.name}")
    config.check_fits(arch, compute_dtype(problem.dtype))
    return config


kind_of = attrgetter("shape", "dtype", "device")
"""What the checks and the kernels read of a tensor beside its values: equal for two that they treat alike."""


def kind_of_weights(weights: Tensor | MXWeights) -> Hashable:
    """The same of weights, and how they lie in memory."""
    if isinstance(weights, MXWeights):
        return kind_of(weights.packed), weights.layout, weights.scales_to_128
    return kind_of(weights), weights.stride(), weights.requires_grad, weights.is_neg()


def operand(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor as a kernel takes it: rounded to `dtype` if given, contiguous, and in fp32 under the interpreter.

    Memory holds its numbers with their signs: a negative that torch puts off (`Tensor.is_neg`) is made here.
    """
    wanted = dtype or x.dtype
    if INTERPRETED or x.dtype != wanted:
        x = x.to(wanted).to(compute_dtype(wanted))
    x = x.contiguous()
    return x.resolve_neg() if x.is_neg() else x


def dense_weights(weights: Tensor) -> Tensor:
    """Dense weights as the kernels read them: strides included, with their signs; upcast only under the interpreter."""
    weights = weights.to(compute_dtype(weights.dtype)) if INTERPRETED else weights
    return weights.resolve_neg() if weights.is_neg() else weights


def routing_of(positions: Tensor, offsets: Tensor, given: Routing | None = None) -> Routing:
    """The kernels' view of a routing, contiguous; the caller's own if one is given.

    Raises:
        TypeError: it is no `Routing`.
        ValueError: it was made of other tensors, or these are not contiguous.
    """
    if given is None:
        return Routing(positions.contiguous(), offsets.contiguous())
    if not isinstance(given, Routing):
        raise TypeError(f"routing is {type(given).__name__}; expected a mxref.kernels.Routing")
    own = (("sorted_scattered_idxs", positions, given.positions), ("expert_offsets", offsets, given.offsets))
    for name, passed, made_of in own:
        if passed.data_ptr() != made_of.data_ptr() or passed.shape != made_of.shape or passed.dtype != made_of.dtype:
            raise ValueError(f"routing was made of another tensor than {name}; make it of the tensors of this call")
        if not passed.is_contiguous():
            raise ValueError(f"{name} is not contiguous, which a routing must be made of: call contiguous() first")
    return given


def frozen_weights(
    weight: Tensor, scales: Tensor | None, layout: MXLayout = MXLayout.FWD, scales_to_128: bool = False
) -> Tensor | MXWeights:
    """Packed weights from codes [E, N, K/2] and scales [E, N, K/32]; dense ones have no scales."""
    if scales is None:
        return weight
    return MXWeights(weight, scales, 2 * weight.shape[2], weight.shape[1], layout, scales_to_128=scales_to_128)


def adapter_of(problem: Problem) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """lora_A and lora_B as kernel operands, rounded to the activation dtype."""
    if problem.lora_A is None or problem.lora_B is None:
        return None, None
    return operand(problem.lora_A, problem.dtype), operand(problem.lora_B, problem.dtype)


def rows_by_expert(shape: torch.Size, experts: int) -> Stack:
    """Contiguous A [E·r, K] seen as [E, r, K]."""
    rows, K = shape
    rank = rows // experts
    return Stack((experts, rank, K), (rank * K, K, 1))


def columns_by_expert(shape: torch.Size, experts: int) -> Stack:
    """Contiguous B [N, E·r] seen as [E, N, r]."""
    N, columns = shape
    rank = columns // experts
    return Stack((experts, N, rank), (rank, columns, 1))


def projection(down: Stack, config: Config, P: int, fan_in: int | None) -> GroupedMatmul:
    """Z or V = R(rows·down_e), [P, r] in expert order; down is [E, C, r], `fan_in` as in `GroupedMatmul`."""
    return GroupedMatmul(down, config.projection(down.shape[2]), P, fan_in)
