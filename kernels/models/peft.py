"""PEFT adapters whose base is `PackedExperts`.

    from mxref.kernels.models.peft import get_peft_model
    model = get_peft_model(pack_experts(model, rank=0), LoraConfig(
        target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))

The result is an ordinary `PeftModel`: `save_pretrained`, `add_adapter`, `load_adapter`, `set_adapter`,
`disable_adapter` and the rest are PEFT's, and an adapter's names and layouts are those of the same model with dense
weights (A [r·E, in] expert-major, B [out, r·E] rank-major). So an adapter trained here continues in plain PEFT on a
dequantised model, and the reverse; `load_peft_model` reads it back. Rank and alpha are each adapter's own; active at
once, adapters add up if their scalings differ by powers of two (see `LoRA.joined`). Merging is refused: packed weights
cannot take a low-rank sum; `mxref.kernels.models.merging.merge_adapters` quantises it again, on request, and reports
the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import peft
import torch
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora import model as lora_model
from torch import Tensor, nn

from mxref.kernels.models.experts import PROJECTIONS, PackedExperts, check_adapter
from mxref.kernels.models.moe_block import unwrap_adapters

__all__ = ["LoraModel", "ParamWrapper", "get_peft_model", "load_peft_model"]


_NO_MERGE = (
    "an adapter cannot be merged into packed MXFP4 weights: the sum is no longer MXFP4. Keep it beside them, or load "
    "it with plain PEFT on a dequantised model and merge there; or quantise the sum again, and see what that loses, "
    "with mxref.kernels.models.merging.merge_adapters(model)"
)


def get_peft_model(model: nn.Module, config: peft.LoraConfig, **options: Any) -> peft.PeftModel:
    """`peft.get_peft_model` for a model with packed experts.

    Args:
        model: a model that `pack_experts(…, rank=0)` made.
        config: plain LoRA; `target_parameters` names the experts' projections as on the dense model.
        options: keyword arguments of `peft.get_peft_model`.

    Raises:
        TypeError: `config` is of another method than LoRA.
        ValueError: the model has no packed experts, they own adapters already, `target_parameters` reaches none of
            them or holds a name that nothing has, or the configuration asks for what packed weights cannot give.
    """
    _check_targets(model, config)
    with _visible_to_peft(model):
        return _aware(peft.get_peft_model(model, _registered(config), **options))


def load_peft_model(model: nn.Module, directory: str | Path, **options: Any) -> peft.PeftModel:
    """`peft.PeftModel.from_pretrained` for a model with packed experts; the adapter may come from a dense model.

    Args:
        model: a model that `pack_experts(…, rank=0)` made.
        directory: what `save_pretrained` wrote.
        options: keyword arguments of `PeftModel.from_pretrained`, such as `is_trainable=True` to continue.

    Raises:
        ValueError: as `get_peft_model`.
    """
    config = peft.LoraConfig.from_pretrained(str(directory))
    config.inference_mode = not options.get("is_trainable", False)
    _check_targets(model, config)
    with _visible_to_peft(model):
        return _aware(peft.PeftModel.from_pretrained(model, str(directory), config=_registered(config), **options))


class LoraModel(lora_model.LoraModel):
    """PEFT's tuner, which adds further adapters to packed experts and refuses to merge before it starts."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **options: Any) -> None:
        """One more adapter, under the conditions of the first one.

        Raises:
            ValueError: as `get_peft_model`.
        """
        config = self.peft_config[adapter_name]
        _check_targets(model, config)
        _registered(config)
        with _visible_to_peft(model):
            super().inject_adapter(model, adapter_name, *args, **options)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if any(isinstance(module, ParamWrapper) for module in self.model.modules()):
            raise ValueError(_NO_MERGE)


class ParamWrapper(lora_layer.ParamWrapper):
    """PEFT's wrapper around one projection of `PackedExperts`: its adapter goes to the kernels, beside the weights.

    PEFT recognises its wrappers by the name of their class, so this one keeps it.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str | None, config: Any, **options: Any
    ) -> None:
        if parameter_name not in PROJECTIONS:
            raise ValueError(
                f"an adapter is asked for {parameter_name or 'the whole module'} of PackedExperts; expected "
                f"target_parameters that end in one of {', '.join(PROJECTIONS)}"
            )
        super().__init__(base_layer, adapter_name, parameter_name=parameter_name, config=config, **options)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: Any, config: Any, **options: Any) -> None:
        """One more adapter, if the kernels can have it."""
        check_adapter(r, lora_alpha)
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights is {config.init_lora_weights!r}, which reads or changes the base weights; with "
                "packed weights use True, False or 'gaussian'"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **options)

    def get_param(self) -> Tensor:
        """A stand-in of the projection's dense shape [E, in, out], without memory."""
        base: Any = self.get_base_layer()
        return torch.empty(base.shape(self.parameter_name), device="meta")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' forward with the active adapters of this wrapper and of those nested in it."""
        self._check_forward_args(x, *args, **kwargs)
        base, adapters = unwrap_adapters(self)
        out: Tensor = base(x, *args, adapters=adapters, **kwargs)
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refused."""
        raise ValueError(_NO_MERGE)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device of the packed buffers, in the dtype that PEFT made."""
        home = self.get_base_layer().get_buffer(f"{self.parameter_name}_scales").device
        for part in (self.lora_A, self.lora_B):
            if adapter_name in part and not part[adapter_name].weight.is_meta:
                part[adapter_name].to(home)


def _aware(adapted: peft.PeftModel) -> peft.PeftModel:
    """The same model with a tuner that knows packed experts; PEFT chooses the class itself, by the adapter's type."""
    adapted.base_model.__class__ = LoraModel
    return adapted


def _registered(config: peft.LoraConfig) -> peft.LoraConfig:
    config._register_custom_module({PackedExperts: ParamWrapper})
    return config


def _packed(model: nn.Module) -> dict[str, PackedExperts]:
    """Packed experts by the name that they had before PEFT wrapped them."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, PackedExperts))
    return {name.replace(".base_layer", ""): module for name, module in found}


def _check_targets(model: nn.Module, config: Any) -> None:
    if not isinstance(config, peft.LoraConfig):
        raise TypeError(f"config is {type(config).__name__}; packed experts take peft.LoraConfig")
    packed = _packed(model)
    if not packed:
        raise ValueError("model has no PackedExperts; call pack_experts(model, rank=0) first")
    if owner := next((name for name, module in packed.items() if module.rank), None):
        raise ValueError(
            f"{owner} owns adapters already (rank {packed[owner].rank}); pack with rank=0 for PEFT to add its own"
        )
    names = [f"{name}.{projection}" for name in packed for projection in PROJECTIONS]
    targets = config.target_parameters or []
    if not any(_reaches(target, names) for target in targets):
        raise ValueError(
            f"target_parameters is {config.target_parameters}, which reaches no packed experts; expected names such "
            f"as {names[:2]}"
        )
    names += [name.replace(".base_layer", "") for name, _ in model.named_parameters()]
    if lost := [target for target in targets if not _reaches(target, names)]:
        raise ValueError(f"target_parameters holds {lost}, which no parameter of the model is called")


def _reaches(target: str, names: list[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


@contextmanager
def _visible_to_peft(model: nn.Module) -> Iterator[None]:
    """PEFT looks for parameters by name: for the time of an injection the packed projections stand there as such."""
    packed = list(_packed(model).values())
    for module in packed:
        for name in PROJECTIONS:
            stand_in = nn.Parameter(torch.empty(module.shape(name), device="meta"), requires_grad=False)
            module.register_parameter(name, stand_in)
    try:
        yield
    finally:
        for module in packed:
            for name in PROJECTIONS:
                delattr(module, name)
