"""What one rank does in the tests of PEFT's adapters on experts that are divided among ranks."""

from __future__ import annotations

from typing import Any

import mesh_training
import peft
import torch
from parallel_models import HIDDEN, Batch, integer_experts
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from world import rank_device

from mxref.kernels.models.peft import get_peft_model
from mxref.kernels.parallel.experts import shard_experts
from mxref.kernels.parallel.sharding import shard_model

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def adapted(num_experts: int) -> Any:
    """The model of `mesh_training`, with PEFT's adapters of small integers in the place of the experts' own."""
    model = mesh_training.Model(num_experts)
    model.layers[0].experts = integer_experts(num_experts, rank=0)
    config = peft.LoraConfig(r=2, lora_alpha=1, target_modules=[], target_parameters=TARGETS)
    found: Any = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(8)
    for name, parameter in found.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randint(-1, 2, parameter.shape, generator=generator).float()
    assert found.base_model.model.factor.shape == (HIDDEN,)
    return found


def steps(num_experts: int, way: str) -> dict[str, dict[str, Tensor]]:
    """One backward pass by each exchange."""
    return {exchange: step(num_experts, way, exchange) for exchange in ("all-to-all", "sum")}


def step(num_experts: int, way: str, exchange: str) -> dict[str, Tensor]:
    """Every gradient, whole, after one backward pass under FSDP2 or DDP beside divided experts."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    model = adapted(num_experts).to(rank_device())
    mesh = init_device_mesh(rank_device().type, (size // 2, 2), mesh_dim_names=("fsdp", "ep"))
    parallel: Any = model
    if way == "FSDP2":
        shard_model(model, mesh, model.base_model.model.layers, exchange)
    else:
        shard_experts(model, mesh["ep"], exchange)
        parallel = DistributedDataParallel(model)
    batch = Batch.of(rank if exchange == "all-to-all" else rank // 2, num_experts).to(rank_device())
    batch.loss(parallel).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in gradients.items()}
