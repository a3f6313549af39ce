"""PEFT adapters whose base is `PackedExperts`.

Importing this module, which packed experts do by themselves, makes PEFT's LoRA know them whichever call adds it:
`peft.get_peft_model`, also with `mixed=True`, a trainer's `peft_config`, `PeftModel.from_pretrained`, a model's own
`add_adapter` and `load_adapter`. `LoraModel` and `MixedModel` take the place of PEFT's tuners and treat every other
model as PEFT does.

    from mxref.kernels.models.peft import get_peft_model
    model = get_peft_model(pack_experts(model, rank=0), LoraConfig(
        target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))

The result is an ordinary `PeftModel` with the adapter names and layouts of the dense model (A [r·E, in] expert-major, B
[out, r·E] rank-major): an adapter trained here continues in plain PEFT on a dequantised model, and the reverse. Several
active adapters add up (see `LoRA.joined`). What fails in PEFT on dense parameters (lora_dropout, DoRA, lora_bias,
X-LoRA, …) fails here. Merging is refused; `mxref.kernels.models.merging.merge_adapters` quantises the sum on request.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import peft
import torch
from peft import mixed_model, tuners
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora import model as lora_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import save_and_load
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from mxref.kernels.models.adapters import check_adapter, unwrap_adapters
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.stacks import PROJECTIONS, packed_bytes_left_out

_NO_MERGE = (
    "an adapter cannot be merged into packed MXFP4 weights: the sum is no longer MXFP4. Keep it beside them, or load "
    "it with plain PEFT on a dequantised model and merge there; or quantise the sum again, and see what that loses, "
    "with mxref.kernels.models.merging.merge_adapters(model)"
)

_EXPERT_MODULES = {"experts", "gate_proj", "up_proj", "w1", "w2", "w3", *PROJECTIONS}
"""What a list of target_modules calls experts, in the belief that their projections are modules."""


def get_peft_model(model: nn.Module, config: peft.LoraConfig, **options: Any) -> peft.PeftModel:
    """`peft.get_peft_model`, required to put adapters on packed experts.

    Args:
        model: a model that `pack_experts(…, rank=0)` made.
        config: plain LoRA; `target_parameters` as on the dense model.
        options: keyword arguments of `peft.get_peft_model`.

    Raises:
        TypeError: `config` is of another method than LoRA.
        ValueError: the model has no packed experts, they own adapters already, `target_parameters` reaches none of them
            or holds an unknown name, or the configuration asks for what packed weights cannot give.
    """
    _check_reaches_experts(model, config)
    adapted: peft.PeftModel = peft.get_peft_model(model, config, **options)
    return adapted


def load_peft_model(model: nn.Module, directory: str | Path, **options: Any) -> peft.PeftModel:
    """`peft.PeftModel.from_pretrained`, for an adapter of packed experts or of a dense model's.

    Args:
        model: a model that `pack_experts(…, rank=0)` made.
        directory: what `save_pretrained` wrote.
        options: of `PeftModel.from_pretrained`, such as `is_trainable=True`.

    Raises:
        TypeError, ValueError: as `get_peft_model`.
    """
    _check_reaches_experts(model, peft.PeftConfig.from_pretrained(str(directory)))
    adapted: peft.PeftModel = peft.PeftModel.from_pretrained(model, str(directory), **options)
    return adapted


class _KnowsPackedExperts(BaseTuner):
    """Gives LoRA to packed experts."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **options: Any) -> None:
        """As PEFT does.

        Raises:
            ValueError: as `get_peft_model`, before anything is wrapped; an adapter may leave the experts alone.
        """
        with _visible_to_peft(model):
            super().inject_adapter(model, adapter_name, *args, **options)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """PEFT's last step before it wraps anything; old names are up to date."""
        super()._prepare_model(peft_config, model)
        if isinstance(peft_config, peft.LoraConfig):
            _check_config(model, peft_config)


class LoraModel(_KnowsPackedExperts, lora_model.LoraModel):
    """PEFT's tuner, which also knows packed experts and refuses to merge them before it starts."""

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **options: Any) -> nn.Module:
        return _wrapped(lora_model.LoraModel, lora_config, adapter_name, target, **options)

    def _check_merge_allowed(self) -> None:
        as_peft_does: Any = super()._check_merge_allowed
        as_peft_does()
        if any(isinstance(module, ParamWrapper) for module in self.model.modules()):
            raise ValueError(_NO_MERGE)


class MixedModel(_KnowsPackedExperts, tuners.MixedModel):
    """PEFT's tuner of several methods, LoRA also on packed experts."""

    @staticmethod
    def _create_new_module(config: Any, adapter_name: str, target: nn.Module, **options: Any) -> nn.Module:
        return _wrapped(tuners.MixedModel, config, adapter_name, target, **options)


class ParamWrapper(lora_layer.ParamWrapper):
    """PEFT's wrapper around one projection of `PackedExperts`: its adapter goes to the kernels.

    PEFT recognises its wrappers by their class's name.
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

    def get_param(self) -> Tensor:
        """A stand-in of the dense shape [E, in, out], one number wide, on the packed weights' device."""
        base: Any = self.get_base_layer()
        device = getattr(base, f"{self.parameter_name}_scales").device
        return torch.zeros((), device=device).expand(base.shape(self.parameter_name))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' forward with the active adapters of this wrapper and of those nested in it."""
        check: Any = self._check_forward_args
        check(x, *args, **kwargs)
        base, adapters = unwrap_adapters(self)
        out: Tensor = base(x, *args, adapters=adapters, **kwargs)
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refused."""
        raise ValueError(_NO_MERGE)


def _wrapped(tuner: Any, config: Any, adapter_name: str, target: nn.Module, **options: Any) -> nn.Module:
    """A tuner's wrapper; around packed experts, ours."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, PackedExperts) and isinstance(config, peft.LoraConfig):
        return ParamWrapper(target, adapter_name, config=config, **options)
    module: nn.Module = tuner._create_new_module(config, adapter_name, target, **options)
    return module


def _packed(model: nn.Module) -> dict[str, PackedExperts]:
    """Packed experts by their names without PEFT's wrappers."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, PackedExperts))
    return {name.replace(".base_layer", ""): module for name, module in found}


def _projection_names(model: nn.Module) -> list[str]:
    return [f"{name}.{projection}" for name in _packed(model) for projection in PROJECTIONS]


def _check_reaches_experts(model: nn.Module, config: Any) -> None:
    if not isinstance(config, peft.LoraConfig):
        raise TypeError(f"config is {type(config).__name__}; packed experts take peft.LoraConfig")
    names = _projection_names(model)
    if not names:
        raise ValueError("model has no PackedExperts; call pack_experts(model, rank=0) first")
    if not any(_reaches(target, names) for target in config.target_parameters or []):
        raise ValueError(
            f"target_parameters is {config.target_parameters}, which reaches no packed experts; expected names such "
            f"as {names[:2]}"
        )


def _check_config(model: nn.Module, config: Any) -> None:
    """Whether packed experts can have what a configuration asks for; a model without them can."""
    packed = _packed(model)
    if not packed:
        return
    if owner := next((name for name, module in packed.items() if module.rank), None):
        raise ValueError(
            f"{owner} owns adapters already (rank {packed[owner].rank}), which PEFT would freeze; pack with rank=0 for "
            "PEFT to add its own"
        )
    projections = _projection_names(model)
    targets = list(config.target_parameters or [])
    parameters = [name.replace(".base_layer", "") for name, _ in model.named_parameters()]
    _check_all_found("target_parameters", targets, parameters)
    reached = [name for name in projections if any(_reaches(target, [name]) for target in targets)]
    if not reached and isinstance(config.target_modules, (list, set)):
        asked = [target for target in config.target_modules if target.rpartition(".")[2] in _EXPERT_MODULES]
        modules = [name.replace(".base_layer", "") for name, _ in model.named_modules()]
        _check_all_found("target_modules", asked, modules, f"; packed experts need target_parameters={projections[:2]}")
    for name in reached:
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
        try:
            check_adapter(rank, alpha)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    if reached and config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"init_lora_weights is {config.init_lora_weights!r}, which reads or changes the base weights; with "
            "packed weights use True, False or 'gaussian'"
        )


def _check_all_found(argument: str, targets: Iterable[str], names: list[str], hint: str = "") -> None:
    """Whether each target names something; otherwise the nearest names are told."""
    for target in targets:
        if _reaches(target, names):
            continue
        parts = target.count(".") + 1
        known = (name for name in names if not name.endswith(("_blocks", "_scales")))  # packed bytes are no target
        suffixes = dict.fromkeys(".".join(name.split(".")[-parts:]) for name in known)
        near = difflib.get_close_matches(target, suffixes, n=3)
        told = f"; the nearest names are {near}" if near else ""
        raise ValueError(f"{argument} holds {target!r}, which nothing in the model is called{told}{hint}")


def _reaches(target: str, names: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


@contextmanager
def _visible_to_peft(model: nn.Module) -> Iterator[None]:
    """PEFT looks for parameters by name: the packed projections are there as such during an injection."""
    for module in _packed(model).values():
        for name in PROJECTIONS:
            stand_in = nn.Parameter(torch.empty(module.shape(name), device="meta"), requires_grad=False)
            module.register_parameter(name, stand_in)
    try:
        yield
    finally:
        for module in _packed(model).values():
            for name in PROJECTIONS:
                module._parameters.pop(name, None)


@wraps(save_and_load.get_peft_model_state_dict)
def get_peft_model_state_dict(*args: Any, **options: Any) -> Any:
    """As PEFT does, but packed bytes are not copied for a state of which only adapters are kept."""
    with packed_bytes_left_out():
        return get_peft_model_state_dict.__wrapped__(*args, **options)


for _importer in (peft, peft.utils, peft.peft_model, save_and_load):
    _importer.get_peft_model_state_dict = get_peft_model_state_dict  # type: ignore[attr-defined]
peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA] = LoraModel
mixed_model.MixedModel = MixedModel  # type: ignore[attr-defined]
