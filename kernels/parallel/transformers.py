"""transformers' own switch for several GPUs, `DistributedConfig`, on models with packed experts.

    from transformers import DistributedConfig
    from mxref.kernels.parallel.transformers import distribute_model
    model = load_packed_model("./gpt-oss-20b", rank=16)
    model = distribute_model(model, DistributedConfig(fsdp_size=8, ep_size=8))

transformers applies the switch while it loads dense weights; a packed model is divided afterwards by the same code,
under a plan that knows packed tensors. Needs transformers 5.21 or later.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard
from transformers.distributed.expert_parallel import MoEParamShard
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import replace_layer_number_by_wildcard

from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.packing import plans_without
from mxref.kernels.parallel.older_torch import bytes_shardable

__all__ = ["distribute_model", "packed_plan"]

_DISPATCH = "ep_dispatch_experts"
_STYLES = {"lora_A": "mxref_lora_A", "lora_B": "mxref_lora_B"}
"""Styles of the adapters' layouts A [E·r, K] and B [N, E·r]; packed tensors and biases lead with the experts."""

ALL_PARALLEL_STYLES.register(_STYLES["lora_A"], MoEParamShard(Shard(0)))
ALL_PARALLEL_STYLES.register(_STYLES["lora_B"], MoEParamShard(Shard(1)))


def packed_plan(model: Any) -> dict[str, str]:
    """The expert-parallel plan of a model's packed experts: tokens travel by all-to-all."""
    plan = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            stem = replace_layer_number_by_wildcard(name)
            plan[stem] = _DISPATCH
            for key, _ in module.named_parameters(recurse=False):
                plan[f"{stem}.{key}"] = _STYLES.get(key[-6:], "grouped_gemm")
    return plan


def distribute_model(model: Any, config: Any) -> Any:
    """Apply transformers' `DistributedConfig` to a model with packed experts; returns the same model.

    Args:
        model: packed, the same on every rank; adapters, if any, its own.
        config: its `ep_size` divides the number of experts.

    Raises:
        ValueError: the model has no packed experts, PEFT's adapters are on them, `ep_size` does not divide their
            number, or transformers refuses the configuration.
    """
    experts = {name: m for name, m in model.named_modules() if isinstance(m, PackedExperts)}
    if not experts:
        raise ValueError(f"{type(model).__name__} has no PackedExperts; give distributed_config to from_pretrained")
    for name, module in experts.items():
        if "base_layer" in name.split("."):
            raise ValueError(
                f"{name} carries PEFT's adapters, which transformers' expert parallelism does not pass on; use "
                "mxref.kernels.parallel.sharding.shard_model, or adapters of the experts' own (rank=…)"
            )
        if module.num_experts % config.ep_size:
            raise ValueError(
                f"{name} has {module.num_experts} experts, which ep_size = {config.ep_size} does not divide; "
                "mxref.kernels.parallel.sharding.shard_model divides them unevenly"
            )
    for module in experts.values():
        module.arrange(None)  # parts are kept as a checkpoint's
    model._tp_plan, ep_plan = plans_without(model, experts)
    model._ep_plan = ep_plan | packed_plan(model)
    config, _, mesh = type(model).prepare_distribute_model(config)
    with bytes_shardable():
        model = type(model).maybe_distribute_model(model, config, mesh)
    if config.ep_size > 1 and config.efsdp_size == 1:
        for module in experts.values():
            _divide_once(module)
    return model


def _divide_once(module: Any) -> None:
    """Undo an error in experts' gradients, also dense ones. On a mesh of one rank torch 2.13's FSDP2 divides twice if
    it sums before it divides (`foreach_reduce`), as transformers 5.22 has it do."""
    if isinstance(module, FSDPModule):
        module.set_force_sum_reduction_for_comms(False)
