"""Packed experts of small integers, whose every sum is exact in any order, and a batch for each rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.stacks import PROJECTIONS
from mxref.weights import MXWeights

HIDDEN, INTERMEDIATE, RANK, TOP_K, TOKENS = 64, 32, 2, 2, 5


def exact_activation(gate_up: Tensor) -> Tensor:
    """[P, 2I] -> [P, I], without a rounding: differentiable, not linear."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate.relu() - up


def integer_experts(num_experts: int, rank: int = RANK) -> PackedExperts:
    """Packed experts with biases and adapters of their own; the same on every call."""
    generator = torch.Generator().manual_seed(num_experts)

    def weights(K: int, N: int) -> MXWeights:
        packed = torch.randint(256, (num_experts, N, K // 2), generator=generator, dtype=torch.uint8)
        scales = torch.randint(126, 129, (num_experts, N, K // 32), generator=generator, dtype=torch.uint8)
        return MXWeights(packed, scales, K, N)

    shapes = {"gate_up_proj": 2 * INTERMEDIATE, "down_proj": HIDDEN}
    biases = {name: torch.randint(-4, 5, (num_experts, N), generator=generator).float() for name, N in shapes.items()}
    experts = PackedExperts(weights(HIDDEN, 2 * INTERMEDIATE), weights(INTERMEDIATE, HIDDEN), exact_activation, biases)
    if rank:
        experts.add_lora(rank, alpha=rank / 2)
    for name, parameter in experts.named_parameters():
        if "_lora_" in name:
            parameter.data = torch.randint(-1, 2, parameter.shape, generator=generator).float()
    return experts


@dataclass(frozen=True)
class Batch:
    """Tokens x [M, H], experts [M, k], gates [M, k], and dL/dout."""

    x: Tensor
    ids: Tensor
    gates: Tensor
    weight: Tensor

    @classmethod
    def of(cls, rank: int, num_experts: int, routing: str = "any", tokens: int = TOKENS) -> Batch:
        """One rank's own tokens.

        Args:
            rank: draws other tokens for each.
            num_experts: E.
            routing: "any", also to sentinels; "one", all slots to expert 0; "last", none but to the last expert.
            tokens: M.
        """
        generator = torch.Generator().manual_seed(100 + rank)
        shape = (tokens, TOP_K)
        ids = torch.randint(-1, num_experts + 1, shape, generator=generator)
        ids = {"any": ids, "one": torch.zeros_like(ids), "last": torch.full_like(ids, num_experts - 1)}[routing]
        x = torch.randint(-2, 3, (tokens, HIDDEN), generator=generator) * torch.randint(
            2, (tokens, HIDDEN), generator=generator
        )
        gates = torch.randint(1, 3, shape, generator=generator)
        weight = torch.randint(-1, 2, (tokens, HIDDEN), generator=generator)
        return cls(x.float().requires_grad_(), ids, gates.float().requires_grad_(), weight.float())

    def to(self, device: torch.device) -> Batch:
        """The same on a device, with gradients of its own."""
        x, gates = (tensor.detach().to(device).requires_grad_() for tensor in (self.x, self.gates))
        return Batch(x, self.ids.to(device), gates, self.weight.to(device))

    @classmethod
    def joined(cls, batches: list[Batch]) -> Batch:
        """The whole batch of several ranks, for one process."""
        x, ids, gates, weight = (
            torch.cat([getattr(batch, name).detach() for batch in batches]) for name in ("x", "ids", "gates", "weight")
        )
        return cls(x.requires_grad_(), ids, gates.requires_grad_(), weight)

    def loss(self, experts: nn.Module) -> Tensor:
        """Σ weight · out, so that the batch's loss is the sum of its parts' losses."""
        out: Tensor = experts(self.x, self.ids, self.gates)
        return (out * self.weight).sum()


def one_process(experts: PackedExperts, batch: Batch) -> dict[str, Any]:
    """Output, loss and every gradient of one process on a whole batch; adapters' as stacks with the experts leading."""
    out = experts(batch.x, batch.ids, batch.gates)
    (out * batch.weight).sum().backward()
    found: dict[str, Any] = {"out": out.detach(), "x": batch.x.grad, "gates": batch.gates.grad}
    for name in PROJECTIONS:
        A, B = getattr(experts, f"{name}_lora_A").grad, getattr(experts, f"{name}_lora_B").grad
        E = experts.num_experts
        found[f"{name}_lora_A"] = A.unflatten(0, (E, -1))
        found[f"{name}_lora_B"] = B.unflatten(1, (E, -1)).transpose(0, 1)
    return found
