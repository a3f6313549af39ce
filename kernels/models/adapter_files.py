"""The packed experts' own adapters (`rank=r`) on disk, as a PEFT adapter.

from mxref.kernels.models.adapter_files import load_adapters, save_adapters
save_adapters(model, "run")         # adapter_config.json beside adapter_model.safetensors
load_adapters(model, "run")         # or peft.PeftModel.from_pretrained(model, "run") on dense or packed weights
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from mxref.kernels.models.adapters import LoRA, rank_major, unwrap_adapters
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.peft import load_peft_model
from mxref.kernels.models.stacks import PROJECTIONS


def save_adapters(model: nn.Module, directory: str | Path) -> None:
    """Write the adapters that packed experts own, in PEFT's names and layouts.

    Args:
        model: its packed experts own adapters of one rank and alpha, as `pack_experts` gives them.
        directory: made if need be.

    Raises:
        ValueError: there are no such adapters, or their ranks or alphas differ.
    """
    owners = {name: m for name, m in model.named_modules() if isinstance(m, PackedExperts) and m.rank}
    settings = sorted({(module.rank, module.alpha) for module in owners.values()})
    if len(settings) != 1:
        raise ValueError(
            f"the packed experts own adapters of these (rank, alpha): {settings or 'none'}; expected one for all"
        )
    state = {}
    for name, module in owners.items():
        for projection, lora in module.own_adapters().items():
            inner = "base_layer." if projection == PROJECTIONS[0] else ""  # PEFT wraps the first one first
            stem = f"base_model.model.{name}.{inner}"
            state[f"{stem}lora_A.weight"] = lora.A.detach().contiguous()
            state[f"{stem}lora_B.weight"] = rank_major(lora.B.detach(), module.num_experts).contiguous()
    [(rank, alpha)] = settings
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]  # PEFT computes with either
        target_modules=[],
        target_parameters=[f"{name}.{projection}" for name in owners for projection in PROJECTIONS],
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
        inference_mode=True,
    )
    config.save_pretrained(str(directory))
    save_file(state, Path(directory) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def load_adapters(model: nn.Module, directory: str | Path) -> None:
    """Give the packed experts a PEFT adapter as their own, replacing what they own; the rest is frozen.

    Args:
        model: its experts are packed, and PEFT is not on it.
        directory: what `save_adapters` or PEFT's `save_pretrained` wrote, for the experts alone and both projections.

    Raises:
        TypeError, ValueError: as `load_peft_model`; also if the adapter is for other modules too, or gives a layer's
            projections different ranks or scalings. The model then owns what it owned.
    """
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    owned = [(module, module.rank, module.alpha, module.own_adapters()) for module in experts]
    for module in experts:
        module.remove_lora()
    try:
        found = _read(model, directory)
    except Exception:
        for module, rank, alpha, adapters in owned:
            if rank:
                module.adopt_lora(rank, alpha, adapters)
        raise
    for module, adapters in found.items():
        rank = adapters[PROJECTIONS[0]].A.shape[0] // module.num_experts
        module.adopt_lora(rank, adapters[PROJECTIONS[0]].scaling * rank, adapters)


def _read(model: nn.Module, directory: str | Path) -> dict[PackedExperts, dict[str, LoRA]]:
    """The packed experts' adapters; the model is left without them."""
    adapted: Any = load_peft_model(model, directory)
    try:
        found: dict[PackedExperts, dict[str, LoRA]] = {}
        for name, module in adapted.base_model.model.named_modules():
            if not isinstance(module, LoraLayer) or name.endswith(".base_layer"):
                continue
            base, adapters = unwrap_adapters(module)  # type: ignore[arg-type]  # every LoraLayer is a module
            if not isinstance(base, PackedExperts):
                raise ValueError(f"{directory} adapts {name} too; load it with load_peft_model")
            if len({(lora.A.shape[0], lora.scaling) for lora in adapters.values()}) != 1 or len(adapters) != 2:
                raise ValueError(f"{directory} gives the projections of {name} different adapters; use load_peft_model")
            found[base] = {p: LoRA(lora.A.detach(), lora.B.detach(), lora.scaling) for p, lora in adapters.items()}
    finally:
        adapted.unload()
    return found
