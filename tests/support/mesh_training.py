"""What one rank does in the tests of experts in parallel under FSDP2, on a mesh of two dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from moe_models import loss_of, tiny_gpt_oss
from parallel_models import Batch, integer_experts
from sharded_training import Layer
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from world import rank_device

from mxref.kernels.models.adapter_files import save_adapters
from mxref.kernels.models.packing import pack_experts
from mxref.kernels.models.saving import save_packed_model
from mxref.kernels.parallel.checkpoints import load_training, save_training
from mxref.kernels.parallel.sharding import clip_grad_norm_, shard_model, whole_model

MAX_NORM = 64.0


class Model(nn.Module):
    """One layer below a root that has a trained parameter of its own, a factor of what comes in."""

    def __init__(self, num_experts: int, recompute: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(integer_experts(num_experts), recompute)])
        self.factor = nn.Parameter(torch.tensor([2.0, 1.0, 1.0, 2.0]).repeat(16))

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        out: Tensor = self.layers[0](x * self.factor, ids, gates)
        return out


def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh(rank_device().type, shape, mesh_dim_names={2: ("fsdp", "ep"), 1: ("ep",)}[len(shape)])


def model_of(num_experts: int, mesh: DeviceMesh, exchange: str = "all-to-all", recompute: bool = False) -> Any:
    model = Model(num_experts, recompute)
    return shard_model(model, mesh, model.layers, exchange, reshard_after_forward=True)


def gathered(model: Any) -> dict[str, Tensor]:
    """On rank 0 the model's whole state, in the layout of one process."""
    with whole_model(model) as here:
        return {name: value.clone() for name, value in model.state_dict().items()} if here else {}


def steps(num_experts: int, shape: tuple[int, ...], recompute: bool) -> dict[str, dict[str, Any]]:
    """One step by each exchange."""
    return {exchange: step(num_experts, shape, exchange, recompute) for exchange in ("all-to-all", "sum")}


def step(num_experts: int, shape: tuple[int, ...], exchange: str, recompute: bool) -> dict[str, Any]:
    """One step of SGD: this rank's loss and gradient of x, and on rank 0 the state after it."""
    rank, model = distributed.get_rank(), model_of(num_experts, mesh_of(shape), exchange, recompute)
    group = rank if exchange == "all-to-all" else rank // shape[-1]  # ranks of one sum have the same tokens
    batch = Batch.of(group, num_experts).to(rank_device())
    loss = batch.loss(model)
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    found = {"x": batch.x.grad, "loss": loss.detach(), "state": gathered(model)}
    norm = clip_grad_norm_(model.parameters(), MAX_NORM)
    return found | {"norm": norm, "clipped": clip_grad_norm_(model.parameters(), MAX_NORM)}


def train(
    directory: str, num_experts: int, shape: tuple[int, ...], resume: bool, scales: list[float]
) -> dict[str, Tensor]:
    """Steps of AdamW by multiples of one exact gradient; before them state from `directory`, or after them to it."""
    return gathered(trained_on(mesh_of(shape), directory, num_experts, resume, scales))


def side_by_side(directory: str, num_experts: int, saved: list[float], resumed: list[float]) -> dict[str, Tensor]:
    """Two groups of a world of four, each with a model, multiples and a directory of its own; the first one loads once
    more often. Every rank's own model, whole."""
    number = distributed.get_rank() % 2
    groups = [distributed.new_group([first, first + 2]) for first in (0, 1)]
    mesh = DeviceMesh.from_group(groups[number], rank_device().type, mesh_dim_names=("ep",))
    own, scales = f"{directory}/{number}", [[(1 + number) * scale for scale in each] for each in (saved, resumed)]
    trained_on(mesh, own, num_experts, False, scales[0])
    for _ in range(2 - number):
        model = trained_on(mesh, own, num_experts, True, scales[1])
    return {name: p.full_tensor() for name, p in model.named_parameters() if p.requires_grad}


def trained_on(mesh: DeviceMesh, directory: str, num_experts: int, resume: bool, scales: list[float]) -> Any:
    """The model after these steps."""
    model, group = model_of(num_experts, mesh), mesh.get_group() if mesh.ndim == 1 else None
    Batch.of(0, num_experts).to(rank_device()).loss(model).backward()  # the same tokens on every rank
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in trained]
    optimiser = torch.optim.AdamW(trained, lr=0.125)
    if resume:
        for parameter in model.parameters():
            parameter.data.zero_()  # nothing may be left of what is not loaded
        load_training(directory, model, optimiser, group)
    for scale in scales:
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient * scale
        optimiser.step()
    if not resume:
        save_training(directory, model, optimiser, group)
    return model


def save(directory: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """A packed gpt-oss of three experts and its adapters under PEFT's names, from however many ranks, after a step;
    that step's loss and gradients, those of the adapters as stacks."""
    mesh = init_device_mesh(rank_device().type, shape, mesh_dim_names=("fsdp", "ep")[-len(shape) :])
    model = packed_gpt_oss()
    shard_model(model, mesh, model.model.layers)
    loss = loss_of(model, distributed.get_rank())
    loss.backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        loss_of(model, 0)  # leaves the root gathered
    with whole_model(model) as here:
        if here:
            save_packed_model(model, Path(directory))
            save_adapters(model, Path(directory) / "adapters")
    return {"loss": loss.detach(), "gradients": gradients}


def packed_gpt_oss() -> Any:
    """Its router trains beside the adapters."""
    model: Any = pack_experts(tiny_gpt_oss(), rank=2)
    model.model.layers[0].mlp.router.requires_grad_(True)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model
