"""What one rank does in the tests of bad input: rank 1 is the one that is wrong."""

from __future__ import annotations

from pathlib import Path

import mesh_training
import torch
from parallel_models import integer_experts
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from world import rank_device

from mxref.kernels.parallel import agreement
from mxref.kernels.parallel.experts import shard_experts
from mxref.kernels.parallel.sharding import whole_model


def disagreements(whats: list[str]) -> list[str]:
    """What comparing says about models that differ in one thing each; empty where it finds nothing."""
    said = []
    for what in whats:
        try:
            said.append(disagree(what) or "")
        except ValueError as error:
            said.append(str(error))
    return said


def disagree(what: str) -> None:
    """Compare models that differ in one thing."""
    model, wrong = mesh_training.Model(4), distributed.get_rank() == 1
    experts = model.layers[0].experts
    if what == "weight" and wrong:
        experts.down_proj_blocks.data[2] = experts.down_proj_blocks.data[2].flip(0)  # the same bytes elsewhere
    if what == "adapter" and wrong:
        experts.gate_up_proj_lora_A.data[0, 0] += 1
    if what == "zero" and wrong:
        experts.gate_up_proj_lora_A.data[experts.gate_up_proj_lora_A == 0] = -0.0
    if what == "name" and wrong:
        model.extra = torch.nn.Parameter(torch.zeros(1))
    if what == "trained" and wrong:
        model.factor.requires_grad_(False)
    version = agreement._version
    if what == "version" and wrong:
        agreement._version = lambda name: "0.0.1" if name == "triton" else version(name)
    torch.manual_seed(5 + wrong if what == "seed" else 5)
    try:
        agreement.check_ranks_agree(model, seed=True)
    finally:
        agreement._version = version


def stay_away() -> str:
    """Rank 1 does something else; what the other one is told."""
    if distributed.get_rank() == 1:
        return ""
    try:
        agreement.check_ranks_agree(mesh_training.Model(4), wait=3)
    except TimeoutError as error:
        return str(error)
    return "nothing"


def too_many_ranks() -> None:
    model = mesh_training.Model(2)
    shard_experts(model, init_device_mesh(rank_device().type, (distributed.get_world_size(),)))


def unsharded_dimensions() -> None:
    mesh = init_device_mesh(rank_device().type, (2, 1), mesh_dim_names=("fsdp", "ep"))
    shard_experts(mesh_training.Model(4), mesh)


def resume(directory: str, num_experts: int, sees_all: bool) -> None:
    """Load a checkpoint; with `sees_all` rank 1 alone misses a file of it, as on disks of machines apart."""
    if not sees_all and distributed.get_rank() == 1:
        lone = Path(directory) / "seen by rank 1"
        lone.mkdir()
        for file in Path(directory).iterdir():
            if file.is_file() and file.name != "__1_0.distcp":
                (lone / file.name).symlink_to(file)
        directory = str(lone)
    mesh_training.train(directory, num_experts, (distributed.get_world_size(),), True, [])


def full_disk() -> None:
    """What rank 0 does with the whole model fails."""
    model = torch.nn.ModuleDict({"experts": integer_experts(4)})
    shard_experts(model, init_device_mesh(rank_device().type, (distributed.get_world_size(),)))
    with whole_model(model) as here:
        if here:
            raise OSError("No space left on device")


def alone() -> str:
    """Rank 0 fails, and rank 1 is not there to hear of it."""
    if distributed.get_rank() == 0:
        try:
            with agreement.failing_together(wait=0.5):
                raise OSError("No space left on device")
        except Exception as error:
            return repr(error)
    return "nothing"


def slow_disk() -> str:
    """Rank 0 takes longer with the whole model than the others wait: until they have said so."""
    model = torch.nn.ModuleDict({"experts": integer_experts(4)})
    shard_experts(model, init_device_mesh(rank_device().type, (distributed.get_world_size(),)))
    store = distributed.distributed_c10d._get_default_store()
    try:
        with whole_model(model, wait=0.5) as here:
            if here:
                store.wait(["waited in vain"])
    except TimeoutError as error:
        store.set("waited in vain", "")
        return str(error)
    return "nothing"
