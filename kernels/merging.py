"""Merging adapters into packed weights on request: W + s·B·A is quantised again, and what that loses is reported.

    from mxref.kernels.merging import merge_adapters
    model, losses = merge_adapters(model)

MXFP4 has two or three significant bits, an adapter is small beside its weights: most of it usually falls below the
grid. So nothing merges by itself, and `MergeLoss` says what is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxref.formats import MX_BLOCK_SIZE, SCALE_MODES
from mxref.kernels.experts import PROJECTIONS, LoRA, PackedExperts
from mxref.kernels.layers import unwrap_adapters
from mxref.weights import MXWeights, decode_mxfp4, encode_mxfp4

__all__ = ["MergeLoss", "merge_adapters"]


@dataclass(frozen=True)
class MergeLoss:
    """What quantising W + Δ again did to one projection, Δ = s·B·A, Ŵ the weights after; norms are Frobenius norms.

    Attributes:
        name: of the projection.
        weights: ‖Ŵ − (W + Δ)‖ / ‖W + Δ‖.
        adapter: ‖Ŵ − (W + Δ)‖ / ‖Δ‖; from 1 on the merge did more harm than leaving the adapter out.
        kept: ⟨Ŵ − W, Δ⟩ / ‖Δ‖², the share of the adapter that is in the new weights; 1 is all of it.
    """

    name: str
    weights: float
    adapter: float
    kept: float

    def __str__(self) -> str:
        return (
            f"{self.name}: kept {self.kept:.1%} of the adapter, error {self.adapter:.3g} ‖Δ‖ = {self.weights:.3g} ‖W‖"
        )


def merge_adapters(model: nn.Module, scale_mode: str = "floor") -> tuple[nn.Module, list[MergeLoss]]:
    """Merge the active adapters into the packed weights, in place, by quantising the sums again.

    Args:
        model: a `PeftModel` with packed experts, whose other adapters PEFT merges as always; or a model whose packed
            experts own their adapters.
        scale_mode: of the quantisation, see `encode_mxfp4`; blocks that an adapter leaves alone keep their bytes.

    Returns:
        The model without adapters, and the loss of every projection that had one.

    Raises:
        ValueError: `scale_mode` is unknown, or no packed experts have an active adapter.
    """
    if scale_mode not in SCALE_MODES:
        raise ValueError(f"scale_mode is {scale_mode!r}; expected one of {', '.join(SCALE_MODES)}")
    found = {name: unwrap_adapters(module) for name, module in model.named_modules() if _is_outermost(name, module)}
    found |= {
        name: (module, module.own_adapters())
        for name, module in model.named_modules()
        if isinstance(module, PackedExperts) and module.rank
    }
    if not any(adapters for _, adapters in found.values()):
        raise ValueError("model has no packed experts with an active adapter; there is nothing to merge")
    losses = []
    for name, (experts, adapters) in found.items():
        for projection in (p for p in PROJECTIONS if p in adapters):
            losses.append(_merge(f"{name}.{projection}", experts, projection, adapters[projection], scale_mode))
        if experts.rank:
            experts.remove_lora()
        else:
            model.set_submodule(name, experts)
    merge_and_unload: Any = getattr(model, "merge_and_unload", None)
    return model if merge_and_unload is None else merge_and_unload(), losses


def _is_outermost(name: str, module: nn.Module) -> bool:
    """Whether a module is PEFT's wrapper around packed experts, and in no other such wrapper."""
    if not hasattr(module, "parameter_name") or name.endswith(".base_layer"):
        return False
    return isinstance(unwrap_adapters(module)[0], PackedExperts)


@torch.no_grad()
def _merge(name: str, experts: PackedExperts, projection: str, lora: LoRA, scale_mode: str) -> MergeLoss:
    """One projection, expert by expert, in fp64."""
    stack = experts.packed_weights(projection)
    A, B = (part.detach().double() for part in (lora.A, lora.B))
    A, B = A.unflatten(0, (stack.E, -1)), B.unflatten(1, (stack.E, -1))
    error = total = delta_norm = kept = 0.0
    for e in range(stack.E):
        before = stack.select(torch.tensor([e], device=stack.device))
        W, delta = decode_mxfp4(before, torch.float64), (lora.scaling * B[:, e] @ A[e])[None]
        after = _encode_changed(before, W, delta, scale_mode)
        stack.packed[e], stack.scales[e] = after.packed[0], after.scales[0]
        gained = decode_mxfp4(after, torch.float64) - W
        error += float((gained - delta).square().sum())
        total += float((W + delta).square().sum())
        delta_norm += float(delta.square().sum())
        kept += float((gained * delta).sum())
    if not delta_norm:
        return MergeLoss(name, 0.0, 0.0, 1.0)
    return MergeLoss(name, math.sqrt(error / total), math.sqrt(error / delta_norm), kept / delta_norm)


def _encode_changed(before: MXWeights, W: Tensor, delta: Tensor, scale_mode: str) -> MXWeights:
    """W + Δ in MXFP4; blocks without a change keep their bytes."""
    after = encode_mxfp4(W + delta, scale_mode)
    same = (delta == 0).unflatten(-1, (-1, MX_BLOCK_SIZE)).all(-1)
    packed = torch.where(same.repeat_interleave(MX_BLOCK_SIZE // 2, -1), before.packed, after.packed)
    return MXWeights(packed, torch.where(same, before.scales, after.scales), before.K, before.N)
