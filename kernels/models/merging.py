"""Merging adapters into packed weights on request: W + s·B·A is quantised again, and the loss reported.

    from mxref.kernels.models.merging import merge_adapters
    model, losses = merge_adapters(model)

MXFP4 has two significant bits, and much of an adapter, small beside its weights, falls between the grid's points:
`MergeLoss` says what is left. A block's scale must not follow its largest element: a weight of 6 that grows a little
would double it and move all 32. Each block takes the scale, of those that `encode_mxfp4`'s four modes choose, that
loses least, or keeps its bytes: no block ends further from W + Δ than it was without the adapter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxref.formats import MX_BLOCK_SIZE, SCALE_MODES
from mxref.kernels.models.adapters import LoRA, unwrap_adapters
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.stacks import PROJECTIONS, checkpoint_layout
from mxref.weights import MXWeights, decode_mxfp4, encode_mxfp4


@dataclass(frozen=True)
class MergeLoss:
    """What quantising W + Δ did to one projection, Δ = s·B·A, Ŵ the weights after; Frobenius norms.

    Attributes:
        name: of the projection.
        weights: ‖Ŵ − (W + Δ)‖ / ‖W + Δ‖.
        adapter: ‖Ŵ − (W + Δ)‖ / ‖Δ‖, at most 1: leaving the adapter out.
        kept: ⟨Ŵ − W, Δ⟩ / ‖Δ‖², the share of the adapter in the new weights.
    """

    name: str
    weights: float
    adapter: float
    kept: float

    def __str__(self) -> str:
        errors = f"{self.adapter:.3g} ‖Δ‖ = {self.weights:.3g} ‖W + Δ‖"
        return f"{self.name}: kept {self.kept:.1%} of the adapter, error {errors}"


def merge_adapters(model: nn.Module) -> tuple[nn.Module, list[MergeLoss]]:
    """Merge the active adapters into the packed weights, in place.

    Args:
        model: a `PeftModel`, whose other adapters PEFT merges as always; or one whose packed experts own adapters.

    Returns:
        The model without adapters, and the loss of every projection that had any.

    Raises:
        ValueError: no packed experts have an active adapter.
    """
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
        with checkpoint_layout(experts):
            for projection in (p for p in PROJECTIONS if p in adapters):
                losses.append(_merge(f"{name}.{projection}", experts, projection, adapters[projection]))
        if experts.rank:
            experts.remove_lora()
        else:
            model.set_submodule(name, experts)
    merge_and_unload: Any = getattr(model, "merge_and_unload", None)
    return model if merge_and_unload is None else merge_and_unload(), losses


def _is_outermost(name: str, module: nn.Module) -> bool:
    """Whether a module is the outermost of PEFT's wrappers around packed experts."""
    if not hasattr(module, "parameter_name") or name.endswith(".base_layer"):
        return False
    return isinstance(unwrap_adapters(module)[0], PackedExperts)


@torch.no_grad()
def _merge(name: str, experts: PackedExperts, projection: str, lora: LoRA) -> MergeLoss:
    """One projection, expert by expert, in fp64."""
    stack = experts.packed_weights(projection)
    A, B = (part.detach().double() for part in (lora.A, lora.B))
    A, B = A.reshape(stack.E, -1, A.shape[1]), B.reshape(B.shape[0], stack.E, -1)
    error = total = delta_norm = kept = 0.0
    for e in range(stack.E):
        before = stack.select(torch.tensor([e], device=stack.device))
        W, delta = decode_mxfp4(before, torch.float64), (lora.scaling * B[:, e] @ A[e])[None]
        after = _nearest(before, W, W + delta)
        stack.packed[e], stack.scales[e] = after.packed[0], after.scales[0]
        gained = decode_mxfp4(after, torch.float64) - W
        error += float((gained - delta).square().sum())
        total += float((W + delta).square().sum())
        delta_norm += float(delta.square().sum())
        kept += float((gained * delta).sum())
    if not delta_norm:
        return MergeLoss(name, 0.0, 0.0, 1.0)
    return MergeLoss(name, math.sqrt(error / total), math.sqrt(error / delta_norm), kept / delta_norm)


def _nearest(before: MXWeights, W: Tensor, wanted: Tensor) -> MXWeights:
    """The weights nearest to `wanted`, block by block, among what the scale modes give and `before`."""
    packed, scales, least = before.packed, before.scales, _block_errors(W, wanted)
    for mode in SCALE_MODES:
        after = encode_mxfp4(wanted, mode)
        error = _block_errors(decode_mxfp4(after, torch.float64), wanted)
        better = error < least
        packed = torch.where(better.repeat_interleave(MX_BLOCK_SIZE // 2, -1), after.packed, packed)
        scales, least = torch.where(better, after.scales, scales), torch.where(better, error, least)
    return MXWeights(packed, scales, before.K, before.N)


def _block_errors(got: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance of every block, [E, N, K/32]."""
    return (got - wanted).square().reshape(*got.shape[:-1], -1, MX_BLOCK_SIZE).sum(-1)
