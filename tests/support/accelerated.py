"""What one rank does in the tests of accelerate's FSDP2 plugin and of transformers' Trainer under it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from moe_models import tiny_gpt_oss
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from mxref.kernels.models.packing import pack_experts
from mxref.kernels.parallel.sharding import whole_model

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(by_peft: bool) -> Any:
    """A tiny gpt-oss on packed experts of three; adapters with products of their own, from PEFT or the experts'."""
    model: Any = pack_experts(tiny_gpt_oss(), rank=0 if by_peft else 2)
    if by_peft:
        config = peft.LoraConfig(r=2, target_modules=["o_proj"], target_parameters=TARGETS, init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model.train()


def loss_of(model: Any, rank: int) -> Tensor:
    ids = torch.randint(32, (1, 6), generator=torch.Generator().manual_seed(rank))
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def step(by_peft: bool, efficient: bool) -> dict[str, Any]:
    """One step of SGD under the plugin: the loss, the gradients, and on rank 0 the model after it."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=efficient,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GptOssDecoderLayer"],
    )
    accelerator = Accelerator(cpu=True)
    # accelerate 1.15 takes the plugin for GPUs alone (AcceleratorState.__init__ leaves it out for MULTI_CPU), though
    # nothing in its preparation of a model needs one
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model, rank = adapted(by_peft), distributed.get_rank()
    if efficient and rank:
        for parameter in model.parameters():
            parameter.data.zero_()  # only the first process has read the weights
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.125)
    model, optimiser = accelerator.prepare(model, optimiser)
    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert [p.to_local().shape[0] for p in packed] == [2 - rank] * 4
    loss = loss_of(model, rank)
    accelerator.backward(loss)
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    optimiser.step()
    with whole_model(model) as here:
        state = {name: value.clone() for name, value in model.state_dict().items()} if here else {}
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return {"loss": loss.detach(), "gradients": gradients, "state": state}
