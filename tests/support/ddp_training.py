"""What one process of a data-parallel run does, on its share of a batch; and what one does alone, on all shares."""

from __future__ import annotations

from typing import Any

import torch
from moe_models import EXPERTS, HIDDEN, TOP_K, packed_experts
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from world import rank_device

from mxref.kernels.parallel.older_torch import bytes_shardable

STEPS, TOKENS = 3, 6


def share(process: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """One process's tokens of one step; each process's tokens all go to experts of its own in the first step."""
    generator = torch.Generator().manual_seed(10 * step + process)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    half = EXPERTS // 2
    index = torch.randint(half, (TOKENS, TOP_K), generator=generator) + half * process
    if step:
        index = torch.randint(EXPERTS, (TOKENS, TOP_K), generator=generator)
    return x, index, torch.rand(TOKENS, TOP_K, generator=generator)


def loss_of(model: nn.Module, process: int, step: int) -> Tensor:
    device = next(model.parameters()).device
    out: Tensor = model(*(tensor.to(device) for tensor in share(process, step)))
    return out.square().mean()


def alone(processes: int) -> dict[str, Any]:
    """As `train`, by one process, which takes the mean of the gradients of all shares."""
    model = packed_experts().to(rank_device())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser, gradients = torch.optim.SGD(trained.values(), lr=0.05), list[dict[str, Tensor]]()
    for step in range(STEPS):
        losses = [loss_of(model, process, step) for process in range(processes)]
        own = [torch.autograd.grad(loss, list(trained.values())) for loss in losses]
        gradients.append({name: sum(parts) / processes for name, *parts in zip(trained, *own, strict=True)})
        for name, parameter in trained.items():
            parameter.grad = gradients[step][name]
        optimiser.step()
    return {"gradients": gradients, "state": {name: tensor.clone() for name, tensor in model.state_dict().items()}}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def train(sharded: bool) -> dict[str, Any]:
    """One process of the run: gradients of every step, then the state, whole."""
    process, processes, model = distributed.get_rank(), distributed.get_world_size(), packed_experts().to(rank_device())
    parallel: Any
    if sharded:
        model.arrange(None)
        with bytes_shardable():
            parallel = fully_shard(
                model, mesh=init_device_mesh(rank_device().type, (processes,)), reshard_after_forward=True
            )
        assert model.down_proj_blocks.to_local().shape[0] == EXPERTS // processes
    else:
        parallel = DistributedDataParallel(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    gradients: list[dict[str, Tensor]] = []
    for step in range(STEPS):
        optimiser.zero_grad()
        loss_of(parallel, process, step).backward()
        gradients.append({n: _whole(p.grad) for n, p in model.named_parameters() if p.grad is not None})
        optimiser.step()
    return {"gradients": gradients, "state": {name: _whole(tensor) for name, tensor in model.state_dict().items()}}
