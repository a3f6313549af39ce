"""From the caller's tensors to what the kernels read: validation, dtypes, contiguity, and the adapter's views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxref.kernels.device.configs import Config, config_for
from mxref.kernels.device.grouped_matmul import LowRank, grouped_matmul
from mxref.kernels.device.launch import architecture, compute_dtype
from mxref.kernels.device.schedule import Routing
from mxref.problem import Problem
from mxref.weights import MXLayout, MXWeights

__all__ = ["Adapter", "check_problem", "operand", "routing_of"]

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


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter beside a product rows·W_e: it adds s · (rows·down_e)·up_e.

    Attributes:
        down: [E, C, r], a view: Aᵀ beside the forward's product, B beside dX's.
        up: [E, r, J], a view: Bᵀ beside the forward's product, A beside dX's.
        scaling: s.
    """

    down: Tensor
    up: Tensor
    scaling: float

    @classmethod
    def of(
        cls, lora_A: Tensor | None, lora_B: Tensor | None, s: float, experts: int, dtype: torch.dtype
    ) -> Adapter | None:
        """The forward's adapter from lora_A [E·r, K] and lora_B [N, E·r], rounded to the activation dtype."""
        if lora_A is None or lora_B is None:
            return None
        A = operand(lora_A.to(dtype)).view(experts, -1, lora_A.shape[1])
        B = operand(lora_B.to(dtype)).view(lora_B.shape[0], experts, -1)
        return cls(A.mT, B.permute(1, 2, 0), s)

    def transposed(self) -> Adapter:
        """The adapter beside the transposed product."""
        return Adapter(self.up.mT, self.down.mT, self.scaling)

    def project(self, rows: Tensor, routing: Routing, config: Config, fan_in: int | None) -> Tensor:
        """R(rows·down), Z or V: [P, r] in expert order; `fan_in` as in `grouped_matmul`."""
        rank = self.down.shape[2]
        low = rows.new_empty(routing.P, rank)
        return grouped_matmul(rows, self.down, routing, config.projection(rank), low, fan_in)

    def share(self, low: Tensor) -> LowRank:
        """What the product adds, given `project`'s rows."""
        return LowRank(low, self.up, self.scaling)
