"""Packed experts divided among ranks: `shard_experts(model, mesh["ep"])`, then FSDP2 or DDP for everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from mxref.kernels.models.adapters import LoRA
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.routed import Projection, routed_experts
from mxref.kernels.models.stacks import PROJECTIONS
from mxref.kernels.parallel.exchange import Owned, all_to_all_experts, summed_experts
from mxref.weights import MXLayout, MXWeights

__all__ = ["EXCHANGES", "ShardedExperts", "shard_experts"]

EXCHANGES: dict[str, Callable[..., Tensor]] = {"all-to-all": all_to_all_experts, "sum": summed_experts}
"""How tokens meet experts, see `mxref.kernels.parallel.exchange`."""


class ShardedExperts(PackedExperts):
    """`PackedExperts` of which every rank owns a slice: bytes, biases and own adapters are DTensors, experts leading.

    Own adapters are A [E, r, K] and B [E, N, r]. With all-to-all their gradient is the mean of all ranks' gradients, as
    in DDP and FSDP2.

    PEFT's adapters stay ordinary parameters of all experts on every rank. A rank's gradient is that of its own experts:
    with all-to-all DDP or FSDP2 over all ranks makes the mean; with the sum every rank gets the whole gradient.

    Args:
        packed: the same on every rank.
        mesh: one dimension.
        exchange: a key of `EXCHANGES`.

    Raises:
        ValueError: as `Owned`, or `exchange` is unknown.
    """

    def __init__(self, packed: PackedExperts, mesh: DeviceMesh, exchange: str = "all-to-all") -> None:
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange is {exchange!r}; expected one of {', '.join(EXCHANGES)}")
        self.owned, self.exchange = Owned(packed.num_experts, mesh), exchange
        biases = {name: bias for name in PROJECTIONS if (bias := getattr(packed, f"{name}_bias")) is not None}
        gate_up, down = (packed.packed_weights(name).repack(MXLayout.FWD) for name in PROJECTIONS)
        super().__init__(gate_up, down, packed._activation, biases)
        self._rows = None  # parts are kept as a checkpoint's
        for name, parameter in list(self.named_parameters(recurse=False)):
            self.register_parameter(name, self._divided(parameter))
        if packed.rank:
            self.adopt_lora(packed.rank, packed.alpha, packed.own_adapters())
        self.train(packed.training)

    def adopt_lora(self, rank: int, alpha: float, adapters: Mapping[str, LoRA]) -> None:
        """As `PackedExperts.adopt_lora`, of whole adapters this rank's slice."""
        E = self.num_experts
        self.rank, self.alpha = rank, alpha
        for name in PROJECTIONS:
            A, B = adapters[name].A.detach(), adapters[name].B.detach()
            stacks = {"A": A.view(E, rank, -1), "B": B.view(-1, E, rank).transpose(0, 1)}
            for part, value in stacks.items():
                self.register_parameter(f"{name}_lora_{part}", self._divided(nn.Parameter(value)))

    def own_adapters(self) -> dict[str, LoRA]:
        """This rank's slice of the module's own adapters by projection."""
        if not self.rank:
            return {}
        own: dict[str, Any] = {key: p for key, p in self.named_parameters(recurse=False) if "_lora_" in key}
        local = {key: parameter.to_local() for key, parameter in own.items()}
        for value in local.values():
            if value.requires_grad:
                value.register_hook(_in_order)
        if self.exchange == "all-to-all":
            local = {key: self.owned.mean(value) for key, value in local.items()}
        return self._adapters(local)

    def gathered(self) -> PackedExperts:
        """The same experts, whole, on the CPU; collective."""
        whole = {name: p.detach().full_tensor().cpu() for name, p in cast(Any, self.named_parameters(recurse=False))}
        gate_up, down = (MXWeights.from_gpt_oss(whole[f"{n}_blocks"], whole[f"{n}_scales"]) for n in PROJECTIONS)
        biases = {name: whole[f"{name}_bias"] for name in PROJECTIONS if f"{name}_bias" in whole}
        packed = PackedExperts(gate_up, down, self._activation, biases)
        if self.rank:
            packed.adopt_lora(self.rank, self.alpha, self._adapters(whole))
        return packed.train(self.training)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        adapters: Mapping[str, LoRA] | None = None,
    ) -> Tensor:
        """As `PackedExperts.forward`; collective."""
        lora = self.own_adapters() if adapters is None else {name: self._cut(a) for name, a in adapters.items()}
        gate_up, down = (self._projection(name, lora.get(name)) for name in PROJECTIONS)
        own = partial(routed_experts, gate_up=gate_up, down=down, activation=self._activation)
        out = EXCHANGES[self.exchange](own, hidden_states, top_k_index, top_k_weights, self.owned)
        return out.clone()  # on a view FSDP2's hooks would not survive a change in place

    def _projection(self, name: str, lora: LoRA | None) -> Projection:
        blocks, scales = (getattr(self, f"{name}_{part}").to_local().detach() for part in ("blocks", "scales"))
        bias = getattr(self, f"{name}_bias")
        return Projection(blocks.flatten(-2), scales, None if bias is None else bias.to_local(), lora)

    def _adapters(self, stacks: Mapping[str, Tensor]) -> dict[str, LoRA]:
        """Stacks A [E, r, K] and B [E, N, r] as the layer's adapters."""
        pairs = {name: (stacks[f"{name}_lora_A"], stacks[f"{name}_lora_B"]) for name in PROJECTIONS}
        scaling = self.alpha / self.rank
        return {n: LoRA(A.flatten(0, 1), B.transpose(0, 1).flatten(1), scaling) for n, (A, B) in pairs.items()}

    def _cut(self, adapter: LoRA) -> LoRA:
        """This rank's slice of an adapter of all experts."""
        A, B = adapter.A, adapter.B
        if self.exchange == "sum":
            A, B = self.owned.shared(A), self.owned.shared(B)
        A = A.unflatten(0, (self.num_experts, -1))[self.owned.slice]
        B = B.unflatten(1, (self.num_experts, -1))[:, self.owned.slice]
        return LoRA(A.flatten(0, 1), B.flatten(1), adapter.scaling)

    def _divided(self, parameter: nn.Parameter) -> nn.Parameter:
        """This rank's slice in memory of its own."""
        whole = parameter.detach().contiguous()
        local = whole[self.owned.slice].clone()
        sharded = DTensor.from_local(local, self.owned.mesh, [Shard(0)], shape=whole.shape, stride=whole.stride())
        return nn.Parameter(sharded, requires_grad=parameter.requires_grad)


def _in_order(gradient: Tensor) -> Tensor:
    """The same with a contiguous tensor's strides, also of dimensions of size one.

    With uneven slices torch 2.11 gathers gradients whose strides differ from the parameter's; ranks that own one expert
    would do so alone, and hang.
    """
    return gradient.flatten().view(gradient.shape)


def shard_experts(model: nn.Module, mesh: DeviceMesh, exchange: str = "all-to-all") -> nn.Module:
    """Divide a model's packed experts among the ranks of a mesh, in place; returns the same model.

    A `DistributedDataParallel` around the model ignores what is divided; it would copy rank 0's.

    Args:
        model: with packed experts, the same on every rank (`check_ranks_agree` tells); PEFT may be on it.
        mesh: one dimension, such as `init_device_mesh("cuda", (2, 4), mesh_dim_names=("fsdp", "ep"))["ep"]`.
        exchange: "all-to-all" where each rank has its own tokens, "sum" where all have the same.

    Raises:
        ValueError: as `ShardedExperts`; also if the model has no packed experts, or they are sharded already; nothing
            has changed then.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}
    if not packed:
        raise ValueError(f"{type(model).__name__} has no PackedExperts; call pack_experts(model) first")
    for name, module in packed.items():
        if any(isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False)):
            raise ValueError(f"{name} is sharded already; divide the experts before fully_shard, and once")
        Owned(module.num_experts, mesh)
    for name, module in packed.items():
        model.set_submodule(name, ShardedExperts(module, mesh, exchange))
    divided = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, divided)
    return model
