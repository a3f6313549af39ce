"""A whole model on a mesh: packed experts divided or sharded, everything else sharded over all ranks, by FSDP2."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.parallel.agreement import failing_together
from mxref.kernels.parallel.experts import ShardedExperts, shard_experts
from mxref.kernels.parallel.older_torch import bytes_shardable

__all__ = ["SAVING", "clip_grad_norm_", "shard_model", "whole_model"]

SAVING = 3600.0
"""Seconds that ranks give the one that writes a whole model, which may be hundreds of GB on a network's disk."""


def shard_model(
    model: nn.Module, mesh: DeviceMesh, layers: Iterable[nn.Module], exchange: str = "all-to-all", **options: Any
) -> Any:
    """Shard a model over a mesh, in place; returns the same model, an `FSDPModule`.

    The ranks of a dimension "ep" divide the experts, and "fsdp" shards every slice further. Everything else is sharded
    over all ranks. All gradients are means over all ranks.

    Args:
        model: with packed experts, the same on every rank (`check_ranks_agree` tells).
        mesh: of dimensions "fsdp" and "ep", either or both.
        layers: what FSDP2 gathers at a time, besides their experts: `model.model.layers`.
        exchange: see `shard_experts`.
        options: of `fully_shard`, such as `mp_policy`, `reshard_after_forward`, `offload_policy`.

    Raises:
        ValueError: as `shard_experts`; also if the mesh has other dimensions, or "fsdp" divides no dimension of an
            expert's tensor. Nothing has changed then, but the experts may be divided.
    """
    names = mesh.mesh_dim_names or ()
    if not names or set(names) - {"fsdp", "ep"}:
        raise ValueError(f"mesh has dimensions {names or 'without names'}; expected 'fsdp' and 'ep', either or both")
    everything = mesh if mesh.ndim == 1 else mesh._flatten("fsdp_ep")
    if "ep" in names:
        shard_experts(model, mesh["ep"], exchange)
    sharded = [module for module in model.modules() if isinstance(module, ShardedExperts)]
    for module in model.modules():
        if isinstance(module, PackedExperts):
            module.arrange(None)
    placements = {m: _placements(m, mesh["fsdp"].size()) for m in sharded} if "fsdp" in names else {}
    with bytes_shardable():
        for module, placement in placements.items():
            fully_shard(module, mesh=mesh["fsdp"], shard_placement_fn=placement.get, **options)
        divided = {parameter for module in sharded for parameter in module.parameters()}
        for part in (*layers, model):
            fully_shard(part, mesh=everything, ignored_params=divided, **options)
    return model


def _placements(experts: ShardedExperts, ranks: int) -> dict[nn.Parameter, Shard]:
    """The dimension, behind the experts', along which each tensor is cut into even parts."""
    found = {}
    for name, parameter in experts.named_parameters(recurse=False):
        dimension = next((d for d in range(1, parameter.ndim) if parameter.shape[d] % ranks == 0), None)
        if dimension is None:
            raise ValueError(
                f"{name} has shape {list(parameter.shape)}, of which {ranks} ranks of 'fsdp' divide nothing behind the "
                "experts; choose a number of ranks that does"
            )
        found[parameter] = Shard(dimension)
    return found


def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for parameters on several meshes, as `shard_model` leaves them.

    Returns:
        the norm of all gradients before clipping: fp32, the same on every rank.
    """
    meshes: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            meshes[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in meshes.values()]
    norm = get_total_norm([n.full_tensor() if isinstance(n, DTensor) else n for n in norms])
    for group in meshes.values():
        clip_grads_with_norm_(group, max_norm, norm)
    return norm


@contextmanager
def whole_model(model: nn.Module, wait: float = SAVING) -> Iterator[bool]:
    """For its duration rank 0's model is whole and on the CPU, for saving it.

        with whole_model(model) as here:
            if here:
                save_packed_model(model, "out")     # or save_adapters, or PEFT's save_pretrained

    Collective over the world. Other ranks gather one tensor at a time.

    Args:
        model: of `shard_model`.
        wait: seconds that the other ranks give rank 0.

    Raises:
        RuntimeError: on the other ranks, if rank 0 fails; rank 0 raises the error itself.
        TimeoutError: on the other ranks, if rank 0 takes longer.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    here = distributed.get_rank() == 0
    with ExitStack() as undo:
        for name, module in list(model.named_modules()):
            if isinstance(module, ShardedExperts):
                packed = module.gathered()
                if here:
                    undo.callback(model.set_submodule, name, module)
                    model.set_submodule(name, packed)
                continue
            sharded = {key: p for key, p in module._parameters.items() if isinstance(p, DTensor)}
            whole = {key: nn.Parameter(_whole(p), requires_grad=p.requires_grad) for key, p in sharded.items()}
            if here:
                undo.callback(module._parameters.update, sharded)
                module._parameters.update(whole)
        with failing_together(wait):
            yield here


def _whole(tensor: DTensor) -> Tensor:
    with torch.no_grad():
        return tensor.full_tensor().cpu()
