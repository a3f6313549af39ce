"""What one rank does in the tests of expert parallelism."""

from __future__ import annotations

from typing import Any

import torch
from parallel_models import Batch, integer_experts
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from world import rank_device

from mxref.kernels.parallel.experts import ShardedExperts


def steps(exchange: str, cases: list[tuple[int, list[str], list[int]]]) -> list[dict[str, Any]]:
    """One step of each case."""
    return [step(exchange, *case) for case in cases]


def step(exchange: str, num_experts: int, routings: list[str], tokens: list[int]) -> dict[str, Any]:
    """One step's output and gradients: this rank's own of x and gates, whole ones of the adapters."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    packed = integer_experts(num_experts).to(rank_device())
    experts = ShardedExperts(packed, init_device_mesh(rank_device().type, (size,)), exchange)
    batches = [Batch.of(i, num_experts, routings[i], tokens[i]) for i in range(len(tokens))]
    batch = (batches[rank] if exchange == "all-to-all" else Batch.joined(batches)).to(rank_device())
    out = experts(batch.x, batch.ids, batch.gates)
    (out * batch.weight).sum().backward()
    found = {"out": out.detach(), "x": batch.x.grad, "gates": batch.gates.grad}
    for name, parameter in experts.named_parameters():
        if "_lora_" in name:
            found[name] = parameter.grad.full_tensor()
        else:
            assert parameter.to_local().shape[0] == experts.owned.sizes[rank]
            assert parameter.grad is None
    return {name: torch.clone(value) for name, value in found.items()}
