"""This project's own steps: `mxref.kernels.parallel` on packed experts, experts in parallel, fully sharded, or both.

A packed experts module has two projections. The first one here is the identity, exact in MXFP4, and the activation
keeps it, so that what is judged is the second one with everything around it: exchange, gathers, sums, updates, files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from mxref.kernels.models.adapters import LoRA
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.parallel.checkpoints import save_training
from mxref.kernels.parallel.sharding import shard_model
from mxref.verification.distributed.protocol import Batch, Model, Saved, Step, Trained
from mxref.weights import MXWeights, encode_mxfp4

__all__ = ["ExpertsInParallel", "FullySharded", "OnTwoDimensions"]

_COVERS = "experts>=ranks" + (", rounded in fp32" if os.environ.get("TRITON_INTERPRET") == "1" else "")


class _Block(nn.Module):
    """Packed experts behind a router, if there is one."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        E, N, K = model.packed.shape[0], model.packed.shape[1], 2 * model.packed.shape[2]
        device, r = model.packed.device, model.lora_A.shape[0] // E
        pair = torch.cat([torch.eye(K), torch.zeros(K, K)]).expand(E, -1, -1).contiguous()
        identity, down = encode_mxfp4(pair.to(device)), MXWeights(model.packed.clone(), model.scales.clone(), K, N)
        biases = {} if model.biases is None else {"down_proj": model.biases.clone()}
        self.experts = PackedExperts(identity, down, _first_half, biases)
        nothing = LoRA(model.lora_A.new_zeros(E * r, K), model.lora_B.new_zeros(2 * K, E * r), model.scaling)
        own = LoRA(model.lora_A.clone(), model.lora_B.clone(), model.scaling)
        self.experts.adopt_lora(r, model.scaling * r, {"gate_up_proj": nothing, "down_proj": own})
        self.router = None if model.router is None else nn.Parameter(model.router.clone())

    def forward(self, x: Tensor, experts: Tensor, gates: Tensor | None) -> Tensor:
        """[M, K] -> [M, N]."""
        if self.router is not None:
            gates = torch.softmax((self.router[experts] * x[:, None]).sum(-1), -1)
        y: Tensor = self.experts(x, experts, gates)
        return y


def _first_half(hidden: Tensor) -> Tensor:
    return hidden.chunk(2, -1)[0]


class FullySharded:
    """FSDP2 shards bytes and adapters over all ranks."""

    mxref_loss = "sum"
    mxref_reduction = "float32"
    mxref_covers = _COVERS
    dimension = "fsdp"

    def __call__(self, model: Model, batches: Sequence[Batch], group: ProcessGroup, folder: Path) -> Trained:
        """See `distributed.protocol`."""
        ranks = dist.get_world_size(group)
        block: Any = shard_model(_Block(model), self.mesh(group, model.packed.device.type), layers=())
        trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
        optimiser = torch.optim.SGD(trained, lr=model.learning_rate)
        steps = tuple(_step(block, optimiser, batch, group, ranks) for batch in batches)
        save_training(folder, block, optimiser, group)
        lora_A, lora_B = _adapters(block.experts, [p.detach() for p in _own(block.experts)])
        packed, scales = _whole(block.experts.down_proj_blocks).flatten(-2), _whole(block.experts.down_proj_scales)
        router = None if block.router is None else _whole(block.router.detach())
        return Trained(steps, lora_A, lora_B, packed, scales, router)

    def mesh(self, group: ProcessGroup, device_type: str) -> DeviceMesh:
        """The ranks, in one dimension or two."""
        return DeviceMesh.from_group(group, device_type, mesh_dim_names=(self.dimension,))

    @staticmethod
    def mxref_load(folder: Path) -> Saved:
        """What the distributed checkpoint holds."""
        with TemporaryDirectory() as place:
            dcp_to_torch_save(folder, Path(place) / "whole.pt")
            state = torch.load(Path(place) / "whole.pt")["model"]
        held = {name.removeprefix("experts.down_proj_"): tensor for name, tensor in state.items()}
        A, B = _laid_out(held["lora_A"], held["lora_B"])
        return Saved(A, B, held["blocks"].flatten(-2), held["scales"], held.get("router"))


class ExpertsInParallel(FullySharded):
    """Experts are divided among the ranks, and tokens travel by all-to-all."""

    dimension = "ep"


class OnTwoDimensions(FullySharded):
    """Experts are divided among pairs of ranks, whose parts FSDP2 shards over the pairs."""

    mxref_covers = f"{_COVERS}, one group"  # torch makes a mesh's groups by all ranks of the world together

    def mesh(self, group: ProcessGroup, device_type: str) -> DeviceMesh:
        """The whole world."""
        ranks = dist.get_world_size(group)
        pair = 1 if ranks % 2 else 2
        return init_device_mesh(device_type, (ranks // pair, pair), mesh_dim_names=("fsdp", "ep"))


def _step(block: Any, optimiser: torch.optim.Optimizer, batch: Batch, group: ProcessGroup, ranks: int) -> Step:
    """Gradients come as means over ranks; their sums are `ranks` times that."""
    optimiser.zero_grad()
    x, gates = batch.x.clone().requires_grad_(), None if batch.gates is None else batch.gates.clone().requires_grad_()
    Y = block(x, batch.experts, gates)
    loss = (Y.float() * batch.targets.float()).sum()
    loss.backward()
    for parameter in block.parameters():
        if parameter.grad is not None:
            parameter.grad *= ranks
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)
    assert x.grad is not None
    dA, dB = _adapters(block.experts, [p.grad for p in _own(block.experts)])
    drouter = None if block.router is None else _whole(block.router.grad)
    dgates = None if gates is None else gates.grad
    step = Step(total, Y, x.grad, dA, dB, dgates, drouter)
    optimiser.step()
    return step


def _own(experts: Any) -> tuple[Any, Any]:
    return experts.down_proj_lora_A, experts.down_proj_lora_B


def _adapters(experts: Any, pair: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """A and B, or their gradients, whole and in the layout of the model; zero where no gradient came."""
    held = [_whole(torch.zeros_like(p) if x is None else x) for x, p in zip(pair, _own(experts), strict=True)]
    return _laid_out(held[0], held[1])


def _laid_out(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A [E·r, K] and B [N, E·r]; divided experts keep [E, r, K] and [E, N, r]."""
    return (A, B) if A.ndim == 2 else (A.flatten(0, 1), B.transpose(0, 1).flatten(1))


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
