"""What one rank does in the tests of FSDP2: steps on packed experts, and their state through a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from parallel_models import Batch, integer_experts
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as recomputed
from world import rank_device

from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.parallel.older_torch import bytes_shardable

EXPERTS = 5
"""More than any world has ranks, and divided by none."""
MAX_NORM = 64.0


class Layer(nn.Module):
    """Packed experts below a root, as in a model; recomputed in the backward pass if asked for."""

    def __init__(self, experts: PackedExperts, recompute: bool = False) -> None:
        super().__init__()
        self.experts, self.recompute = experts, recompute

    def forward(self, *arguments: Tensor) -> Tensor:
        out: Tensor = (
            recomputed(self.experts, *arguments, use_reentrant=False) if self.recompute else self.experts(*arguments)
        )
        return out


def layer(mp_policy: MixedPrecisionPolicy | None = None, recompute: bool = False) -> Any:
    """A layer whose experts are one group of FSDP2, gathered for every use and let go in between."""
    model = Layer(integer_experts(EXPERTS), recompute)
    mesh = init_device_mesh(rank_device().type, (distributed.get_world_size(),))
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": mp_policy or MixedPrecisionPolicy()}
    with bytes_shardable():
        fully_shard(model.experts, reshard_after_forward=True, **options)
        return fully_shard(model, **options)


def whole(model: nn.Module, of_gradients: bool = False) -> dict[str, Tensor]:
    """Parameters, or the gradients of those that have one, whole."""
    tensors = {name: p.grad if of_gradients else p.detach() for name, p in model.experts.named_parameters()}
    return {name: tensor.full_tensor().clone() for name, tensor in tensors.items() if tensor is not None}


def steps(options: list[dict[str, bool]]) -> list[dict[str, Any]]:
    """One step under each of these options."""
    return [step(**one) for one in options]


def step(mixed: bool = False, accumulate: bool = False, recompute: bool = False) -> dict[str, Any]:
    """One step of SGD on this rank's tokens, of two batches if accumulated: what it leaves."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else None
    model, rank = layer(policy, recompute), distributed.get_rank()
    if accumulate:
        model.set_requires_gradient_sync(False)
        Batch.of(rank + 10, EXPERTS).to(rank_device()).loss(model).backward()
        model.set_requires_gradient_sync(True)
    loss = Batch.of(rank, EXPERTS).to(rank_device()).loss(model)
    assert isinstance(model.experts.gate_up_proj_blocks, DTensor), "the experts stayed gathered after the forward pass"
    loss.backward()
    gradients = whole(model, of_gradients=True)
    norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    clipped = whole(model, of_gradients=True)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    held = {name: p.to_local().shape[0] for name, p in model.experts.named_parameters() if p.dtype == torch.uint8}
    return {
        "gradients": gradients, "norm": norm.full_tensor(), "clipped": clipped, "held": held, "state": whole(model)
    }  # fmt: skip


def alone(options: list[dict[str, bool]], ranks: int) -> list[list[dict[str, Tensor]]]:
    """For each of these options, what one process adds up of each rank's batches."""
    found = []
    for one in options:
        dtype = torch.bfloat16 if "mixed" in one else torch.float32
        seeds = [[rank + 10, rank] if "accumulate" in one else [rank] for rank in range(ranks)]
        found.append([gradients(own, dtype) for own in seeds])
    return found


def gradients(seeds: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    """What one process adds up over these batches, its floating-point parameters in `dtype`."""
    experts = integer_experts(EXPERTS)
    experts.arrange(None)  # as sharded bytes lie
    experts.to(rank_device(), dtype)
    for seed in seeds:
        batch = Batch.of(seed, EXPERTS).to(rank_device())
        if dtype != torch.float32:
            batch = Batch(batch.x.detach().to(dtype), batch.ids, batch.gates.detach().to(dtype), batch.weight)
        batch.loss(experts).backward()
    return {name: p.grad.float() for name, p in experts.named_parameters() if p.grad is not None}


def gathered_at_a_time(layers: int) -> list[int]:
    """How many of these layers' experts are gathered whenever one of them computes, forward and backward."""
    model = nn.Sequential(*(Layer(integer_experts(EXPERTS)) for _ in range(layers)))
    mesh, counts = init_device_mesh(rank_device().type, (distributed.get_world_size(),)), list[int]()
    with bytes_shardable():
        for part in model:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh)

    def count(*_: Any) -> None:
        counts.append(sum(not isinstance(part.experts.gate_up_proj_blocks, DTensor) for part in model))

    for part in model:
        part.experts.register_forward_hook(count)
        part.experts.register_full_backward_pre_hook(count)
    batch = Batch.of(0, EXPERTS).to(rank_device())
    x = batch.x
    for part in model:
        x = part(x, batch.ids, batch.gates)
    x.sum().backward()
    return counts


def train(directory: str, resume: bool, steps: list[int]) -> dict[str, Tensor]:
    """Steps of AdamW on the same tokens on every rank, before them the state from `directory`, or after them to it."""
    model = layer()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.125)
    if resume:
        for parameter in model.parameters():
            parameter.data.zero_()  # nothing may be left of what is not loaded
        state = dict(zip(("model", "optimiser"), get_state_dict(model, optimiser), strict=True))
        checkpoint.load(state, checkpoint_id=directory)
        set_state_dict(model, optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])
    for seed in steps:
        optimiser.zero_grad()
        Batch.of(seed, EXPERTS).to(rank_device()).loss(model).backward()
        optimiser.step()
    if not resume:
        state = dict(zip(("model", "optimiser"), get_state_dict(model, optimiser), strict=True))
        checkpoint.save(state, checkpoint_id=directory)
    return whole(model)
