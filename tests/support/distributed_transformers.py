"""What one rank does in the tests of transformers' own switch for several GPUs."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import tiny_model
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers import DistributedConfig
from world import rank_device

from mxref.kernels.models.packing import pack_experts
from mxref.kernels.parallel.transformers import distribute_model


def packed(family: str) -> Any:
    """A tiny model of four packed experts a layer, with adapters of rank 2 whose products are not zero."""
    model = pack_experts(tiny_model(family), rank=2)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def loss_of(model: Any, batch: int) -> Tensor:
    ids = torch.randint(48, (1, 7), generator=torch.Generator().manual_seed(batch)).to(model.device)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def step(family: str, sizes: dict[str, int], batches: int) -> dict[str, Any]:
    """The loss on this rank's batch, and every adapter's gradient, whole."""
    model, config = packed(family).to(rank_device()), DistributedConfig(**sizes)
    if config.ep_size > 1:
        model = distribute_model(model, config)
    else:  # nothing of experts is asked for: as transformers does it alone
        config, _, mesh = type(model).prepare_distribute_model(config)
        model = type(model).maybe_distribute_model(model, config, mesh)
    share = distributed.get_world_size() // batches
    loss = loss_of(model, distributed.get_rank() // share)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    stored = [p for p in model.parameters() if p.dtype == torch.uint8]
    held = {(p.to_local() if isinstance(p, DTensor) else p).shape[0] for p in stored}
    return {"loss": loss.detach(), "gradients": whole, "held": held}


def load_dense(directory: str) -> None:
    """Pack what transformers has divided while it loaded dense weights."""
    from transformers import AutoModelForCausalLM

    size = distributed.get_world_size()
    config = DistributedConfig(fsdp_size=size, ep_size=size)
    pack_experts(AutoModelForCausalLM.from_pretrained(directory, distributed_config=config))


def wrong_size(family: str) -> None:
    size = distributed.get_world_size()
    distribute_model(packed(family), DistributedConfig(fsdp_size=size, ep_size=size))
