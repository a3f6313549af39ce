"""From a transformers model to packed experts: which modules are covered, and their replacement."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor

from mxref.checkpoints import Checkpoint, gpt_oss, open_checkpoint, read_expert_biases, read_expert_weights
from mxref.formats import MX_BLOCK_SIZE, SCALE_MODES
from mxref.kernels.models.activation import form_of
from mxref.kernels.models.adapters import check_adapter
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.routed import Activation
from mxref.kernels.models.stacks import PROJECTIONS
from mxref.kernels.models.torchao import is_mxfp4_param
from mxref.weights import MXWeights, encode_mxfp4

ADAPTERS_KEY = "mxref_adapters"
"""Where a model's configuration keeps rank and alpha of adapters that its packed experts own, for loading them."""


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """The experts modules of a transformers model by name, each checked to be one that the kernels cover.

    Covered: a stack of weights `gate_up_proj` and `down_proj` with the model's own `_apply_gate` between them, in
    either orientation, gate and up halves or interleaved, with or without biases. Shared experts stay as they are.

    Raises:
        TypeError: `model` is no module, or an experts module is of another kind.
        ValueError: the model has no experts module, or its experts are packed already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a transformers model")
    if packed := next((name for name, m in model.named_modules() if isinstance(m, PackedExperts)), None):
        raise ValueError(f"{packed} is packed already")
    if sharded := next((name for name, p in model.named_parameters() if isinstance(p, DTensor)), None):
        raise TypeError(
            f"{sharded} is sharded over ranks already; pack the experts first, then shard the model: see "
            "mxref.kernels.parallel.sharding, or mxref.kernels.parallel.transformers for its DistributedConfig"
        )
    found = {
        name: m
        for name, m in model.named_modules()
        if _is_stack(getattr(m, "down_proj", None)) and "shared" not in name.rpartition(".")[2]
    }
    for name, module in found.items():
        if "base_layer" in name.split("."):
            raise TypeError(f"{name} is wrapped by PEFT already; pack or choose the experts first, then add adapters")
        if reason := not_covered(module):
            raise TypeError(f"{name} ({type(module).__name__}) is not covered: {reason}")
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no experts module that stores its experts as stacked gate_up_proj and "
            "down_proj; a list of separate expert modules is not covered"
        )
    return found


def pack_experts(
    model: nn.Module,
    checkpoint: str | Path | Checkpoint | None = None,
    rank: int = 16,
    alpha: float | None = None,
    *,
    lora_dtype: torch.dtype = torch.float32,
    scale_mode: str = "floor",
    device: torch.device | str | None = None,
) -> nn.Module:
    """Replace every experts module of a transformers model by `PackedExperts`; returns the same model.

    Everything is checked before the first module is replaced. Dense weights are quantised expert by expert and freed
    layer by layer; with a checkpoint they may lie on the meta device.

    With `rank` above 0 everything but the adapters is frozen, as PEFT does; unfreeze afterwards what is to train too.
    With `rank=0` only the experts are frozen, and PEFT freezes the rest.

    Args:
        model: a transformers MoE model.
        checkpoint: of any convention of `mxref.checkpoints`, opened or its path, with the model's projections; its
            bytes are kept. By default torchao MXTensor parameters keep their bytes and dense weights are quantised.
        rank: of the adapters; 0 for none (as when PEFT adds its own).
        alpha: scaling is alpha / rank; alpha = rank by default.
        lora_dtype: of the adapters.
        scale_mode: of the quantisation, see `encode_mxfp4`.
        device: of packed weights and adapters; by default the dense weights', or the CPU if that is the meta device.

    Raises:
        TypeError, ValueError: as `experts_modules` and `check_adapter`; also for an unknown `scale_mode`, and a
            checkpoint that does not fit the model.
        FileNotFoundError: `checkpoint` does not exist.
    """
    modules = experts_modules(model)
    if rank != 0:
        check_adapter(rank, alpha, lora_dtype)
    if scale_mode not in SCALE_MODES:
        raise ValueError(f"scale_mode is {scale_mode!r}; expected one of {', '.join(SCALE_MODES)}")
    opened = None if checkpoint is None else open_checkpoint(checkpoint)
    if opened is not None:
        _check_checkpoint(modules, opened)
    else:
        for name, module in modules.items():
            _check_encodable(name, module)
    if rank:
        model.requires_grad_(False)
    for name, module in modules.items():
        source = {f"{name}.{p}": p for p in PROJECTIONS}
        home = _home(module) if device is None else torch.device(device)
        if opened is not None:
            packed = {source[key]: weights.to(home) for key, weights in read_expert_weights(opened, source)}
        else:
            packed = {p: _encode(module, p, scale_mode, home) for p in PROJECTIONS}
        experts = put_packed(model, name, packed, _biases(module, name, opened, home))
        if rank:
            experts.add_lora(rank, alpha, lora_dtype)
    _forget_plans(model, modules)
    _prepare_saving(model, rank, alpha)
    return model


def plans_without(model: Any, modules: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """transformers' plans for tensor and expert parallelism without these modules.

    The plans name dense weights. Under them packed experts would stay whole on every rank, and tensor parallelism would
    sum the ranks' whole gradients. Without them experts are replicated, and transformers refuses expert parallelism.
    """
    stems = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in modules}
    plans = (
        {name: style for name, style in (plan or {}).items() if not any(_within(name, stem) for stem in stems)}
        for plan in (model.tp_plan, getattr(model, "ep_plan", None))
    )
    tensors, experts = plans
    return tensors, experts


def _forget_plans(model: Any, modules: Iterable[str]) -> None:
    if hasattr(model, "tp_plan"):
        model._tp_plan, model._ep_plan = plans_without(model, modules)


def _within(name: str, stem: str) -> bool:
    return name == stem or name.startswith(f"{stem}.")


def put_packed(
    model: nn.Module, name: str, packed: Mapping[str, MXWeights], biases: Mapping[str, Tensor]
) -> PackedExperts:
    """Replace one experts module by packed weights and biases, both by projection."""
    module: Any = model.get_submodule(name)
    dtype = module.down_proj.dtype
    for parameter in [key for key, _ in module.named_parameters(recurse=False)]:
        delattr(module, parameter)  # the module lives on behind its activation, without weights
    experts = PackedExperts(packed["gate_up_proj"], packed["down_proj"], Activation(module, form_of(module)), biases)
    experts.train(module.training)
    experts.arrange(dtype)
    model.set_submodule(name, experts)
    return experts


def _prepare_saving(model: Any, rank: int, alpha: float | None) -> None:
    """Let `save_pretrained` write packed tensors under their own names, and the adapters' rank and alpha."""
    model._weight_conversions = []  # transformers 5.17's rules would split packed stacks
    config = getattr(model, "config", None)
    if config is None:
        return
    if rank:
        setattr(config, ADAPTERS_KEY, {"rank": rank, "alpha": float(rank if alpha is None else alpha)})
    if config.model_type == "gpt_oss":  # what transformers needs to read the stacks
        config.quantization_config = dict(gpt_oss.CONVENTION.quantization or {})


def not_covered(module: nn.Module) -> str:
    """Why the kernels do not cover an experts module; empty if they do."""
    if not getattr(module, "has_gate", True) or not _is_stack(getattr(module, "gate_up_proj", None)):
        return "it has no stacked gate_up_proj; experts without a gate or with separate gate and up are not covered"
    if not callable(getattr(module, "_apply_gate", None)):
        return "it has no _apply_gate, so its activation is unknown"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalises each expert's output before the gates"
    known = {*PROJECTIONS, *(f"{name}_bias" for name in PROJECTIONS)}
    if unknown := [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name not in known]:
        return f"it holds {unknown[0]}, which the kernels do not know"
    for name in PROJECTIONS:
        weight = getattr(module, name)
        if not is_mxfp4_param(weight) and (not weight.is_floating_point() or weight.element_size() < 2):
            return f"{name} is {weight.dtype}; expected bf16, fp16, fp32 or a torchao MXTensor of FP4"
    return ""


def _is_stack(parameter: Any) -> bool:
    return isinstance(parameter, Tensor) and parameter.ndim == 3


def matrix_shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    """(E, K, N) of a dense or MXTensor projection."""
    E, first, second = getattr(module, name).shape
    return (E, first, second) if getattr(module, "is_transposed", False) else (E, second, first)


def _check_checkpoint(modules: Mapping[str, nn.Module], checkpoint: Checkpoint) -> None:
    held = {entry.name: (entry.E, entry.K, entry.N) for entry in checkpoint.expert_tensors}
    for name, module in modules.items():
        if reason := checkpoint.cannot_fill(module):
            raise ValueError(f"{name} cannot take its weights from {checkpoint.files.root}: {reason}")
        for projection in PROJECTIONS:
            key, expected = f"{name}.{projection}", matrix_shape(module, projection)
            if held.get(key) != expected:
                found = f"has [E, K, N] = {held[key]}" if key in held else "is missing"
                raise ValueError(f"{key} {found} in {checkpoint.files.root}; the model needs {expected}")


def _check_encodable(name: str, module: nn.Module) -> None:
    for projection in PROJECTIONS:
        weight, (_, K, _) = getattr(module, projection), matrix_shape(module, projection)
        if weight.is_meta or isinstance(weight, FakeTensor):
            raise ValueError(f"{name}.{projection} has no data (meta device); give the checkpoint to read it from")
        if K % MX_BLOCK_SIZE:
            raise ValueError(f"{name}.{projection} has K = {K}; MXFP4 needs a multiple of {MX_BLOCK_SIZE}")
        if is_mxfp4_param(weight) and getattr(module, "is_transposed", False):
            raise ValueError(
                f"{name}.{projection} is an MXTensor in a module that stores [E, K, N], so its blocks run along N; "
                "the kernels need blocks along K"
            )


def _encode(module: nn.Module, name: str, scale_mode: str, home: torch.device) -> MXWeights:
    """A projection on the device `home`, quantised there expert by expert; MXTensors keep their bytes."""
    weight = getattr(module, name).detach()
    if is_mxfp4_param(weight):
        return MXWeights.from_torchao(weight).to(home)
    E, K, N = matrix_shape(module, name)
    packed = torch.empty(E, N, K // 2, dtype=torch.uint8, device=home)
    scales = torch.empty(E, N, K // MX_BLOCK_SIZE, dtype=torch.uint8, device=home)
    for e in range(E):
        matrix = (weight[e].mT if getattr(module, "is_transposed", False) else weight[e]).to(home).contiguous()
        one = encode_mxfp4(matrix, scale_mode)
        packed[e], scales[e] = one.packed[0], one.scales[0]
    return MXWeights(packed, scales, K, N, orig_dtype=one.orig_dtype)


def _biases(module: nn.Module, name: str, checkpoint: Checkpoint | None, device: torch.device) -> dict[str, Tensor]:
    """The module's biases; those on the meta device from the checkpoint."""
    own = {p: bias.detach() for p in PROJECTIONS if (bias := getattr(module, f"{p}_bias", None)) is not None}
    meta = {f"{name}.{p}": p for p, bias in own.items() if bias.is_meta}
    stored = read_expert_biases(checkpoint, meta) if meta and checkpoint is not None else ()
    read = {meta[key]: bias.to(device, own[meta[key]].dtype, copy=True) for key, bias in stored}
    return {p: read[p] if p in read else bias.to(device) for p, bias in own.items()}


def _home(module: Any) -> torch.device:
    device: torch.device = module.down_proj.device
    return torch.device("cpu") if device.type == "meta" else device
