"""`HFScatterMoEGatedMLP`: the forward of a whole Hugging Face MoE block, as users of ScatterMoE kernel layers know it.

    router (with its LoRA, if any) -> routed experts (packed or dense, with their LoRA) [+ shared expert]

Adapters that PEFT wrapped around the experts' parameters are found and passed to the kernels; those on the router
and on the shared expert act through their modules' own forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mxref.kernels.models.experts import LoRA, PackedExperts

__all__ = ["HFScatterMoEGatedMLP", "expert_major", "sigmoid_topk", "softmax_topk", "unwrap_adapters"]

_SHARED = ("shared_expert", "shared_experts", "shared_mlp")


class HFScatterMoEGatedMLP(nn.Module):
    """A kernel layer for MoE blocks with `gate` and `experts`: OLMoE, Qwen2/3-MoE, Mixtral, DeepSeek, GLM, MiniMax.

    `forward` is static and takes the block as `self`, the form in which Hugging Face's `kernels` replaces a forward.
    """

    @staticmethod
    def forward(self: Any, layer_input: Tensor) -> Tensor:
        """[batch, length, H] -> [batch, length, H].

        Args:
            self: the block. `gate` gives logits, or transformers' (logits, gates, experts); `experts` is a module
                that `pack_experts` made or `experts_modules` accepts; `shared_expert(s)`, `shared_mlp` and
                `shared_expert_gate` are optional.
            layer_input: [batch, length, H].

        Raises:
            TypeError: the block is of another kind.
        """
        if not hasattr(self, "gate") or not hasattr(self, "experts"):
            raise TypeError(
                f"{type(self).__name__} has no gate and experts; for gpt-oss and others use pack_experts or "
                "model.set_experts_implementation('mxref')"
            )
        x = layer_input.reshape(-1, layer_input.shape[-1])
        gates, experts = _route(self, x)
        out = _run_experts(self.experts, x, experts, gates)
        shared = next((module for name in _SHARED if (module := getattr(self, name, None)) is not None), None)
        if shared is not None:
            extra = shared(x)
            if getattr(self, "shared_expert_gate", None) is not None:
                extra = torch.sigmoid(self.shared_expert_gate(x)) * extra
            out = out + extra
        return out.reshape(layer_input.shape)


def softmax_topk(logits: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Gates and experts [M, k]: the k largest of softmax(logits) in fp32, summing to 1 if `normalise`.

    Raises:
        ValueError: `logits` is not [M, E], or `top_k` is not in 1..E.
    """
    _check_choice(logits, top_k)
    gates, experts = torch.topk(F.softmax(logits, dim=-1, dtype=torch.float32), top_k, dim=-1)
    return gates / gates.sum(dim=-1, keepdim=True) if normalise else gates, experts


def sigmoid_topk(
    logits: Tensor,
    top_k: int,
    bias: Tensor,
    normalise: bool = True,
    routed_scaling: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Gates and experts [M, k] from independent scores; the bias chooses the experts and leaves their gates alone.

    Args:
        logits: [M, E].
        top_k: experts a token.
        bias: [E], added to the scores for the choice only.
        normalise: gates sum to `routed_scaling`.
        routed_scaling: factor of the gates.
        groups: the experts fall in so many groups; a group counts with its two best.
        top_groups: groups that a token may choose from.

    Raises:
        ValueError: a shape or a number does not fit the others.
    """
    _check_choice(logits, top_k)
    E = logits.shape[1]
    if tuple(bias.shape) != (E,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; logits of shape {tuple(logits.shape)} need {(E,)}")
    if groups < 1 or E % groups or not 1 <= top_groups <= groups:
        raise ValueError(f"groups is {groups} and top_groups {top_groups}; expected a divisor of {E}, and 1 to as many")
    if top_k > top_groups * (E // groups):
        raise ValueError(f"top_k is {top_k}; {top_groups} of {groups} groups hold {top_groups * (E // groups)} experts")
    scores = logits.float().sigmoid()
    choice = scores.detach() + bias.float()
    if groups > 1:
        by_group = choice.unflatten(-1, (groups, -1))
        best = by_group.topk(2, dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
        allowed = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        choice = by_group.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
    experts = choice.topk(top_k, dim=-1).indices
    gates = scores.gather(-1, experts)
    if normalise:
        gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)
    return gates * routed_scaling, experts


def _check_choice(logits: Tensor, top_k: int) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected [M, E]")
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k is {top_k}; expected 1 to {logits.shape[1]}, the number of experts")


def unwrap_adapters(experts: nn.Module) -> tuple[Any, dict[str, LoRA]]:
    """Through PEFT's nested ParamWrappers to the experts module, with the active adapters by parameter name.

    Several active adapters act as their sum, see `LoRA.joined`.

    Raises:
        ValueError: an adapter is merged, or the active adapters' scalings cannot be joined.
    """
    found: dict[str, LoRA] = {}
    module: Any = experts
    while hasattr(module, "base_layer") and hasattr(module, "parameter_name"):
        if module.merged:
            raise ValueError(f"an adapter is merged into {module.parameter_name}; call unmerge_adapter first")
        active = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
        adapters = [
            LoRA(
                module.lora_A[name].weight,
                expert_major(module.lora_B[name].weight, module.num_experts),
                float(module.scaling[name]),
            )
            for name in active
        ]
        if adapters:
            found[module.parameter_name] = _joined(adapters, module, active)
        module = module.base_layer
    return module, found


def _joined(adapters: list[LoRA], module: Any, names: list[str]) -> LoRA:
    if len(adapters) == 1:
        return adapters[0]
    try:
        return LoRA.joined(adapters, module.num_experts)
    except ValueError as error:
        raise ValueError(f"{module.parameter_name} with {', '.join(names)}: {error}") from None


def expert_major(B: Tensor, num_experts: int) -> Tensor:
    """PEFT's rank-major B [N, r·E] with its columns by expert, [N, E·r]; differentiable.

    Raises:
        ValueError: `B` is no matrix whose columns are a multiple of `num_experts`.
    """
    if B.ndim != 2 or B.shape[1] % num_experts:
        raise ValueError(f"B has shape {tuple(B.shape)}; expected [N, r·E] with E = {num_experts}")
    return B.reshape(B.shape[0], -1, num_experts).mT.reshape(B.shape)


def _route(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and experts [M, k], by the block's own router if it chooses experts itself."""
    routed = block.gate(x)
    if isinstance(routed, tuple):
        _, gates, experts = routed
        return gates, experts
    gate = block.gate

    def setting(name: str, default: Any = None) -> Any:
        value = getattr(block, name, None)
        return getattr(gate, name, default) if value is None else value

    top_k = setting("top_k")
    if top_k is None:
        raise TypeError(f"{type(block).__name__} has no top_k; expected it on the block or on its gate")
    bias = setting("e_score_correction_bias")
    if bias is None:
        return softmax_topk(routed, top_k, setting("norm_topk_prob", True))
    return sigmoid_topk(
        routed,
        top_k,
        bias,
        setting("norm_topk_prob", True),
        setting("routed_scaling_factor", 1.0),
        setting("n_group", 1),
        setting("topk_group", 1),
    )


def _run_experts(experts: nn.Module, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    base, adapters = unwrap_adapters(experts)
    if isinstance(base, PackedExperts):
        out: Tensor = base(x, chosen, gates, adapters if base is not experts else None)
        return out
    from mxref.kernels.models.transformers import experts_forward

    return experts_forward(base, x, chosen, gates, adapters)
