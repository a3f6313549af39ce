"""A checkpoint to a transformers model on packed experts, one tensor at a time.

    from mxref.kernels.models.loading import load_packed_model, save_packed_model
    model = load_packed_model("./gpt-oss-20b", rank=16, device="cuda")

Experts go from the files into packed parameters, a projection at a time and never decoded; other tensors into their
places, matrices in FP8 or MXFP4 as bf16. Peak memory is the finished model and one projection.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from mxref.checkpoints import Checkpoint, open_checkpoint
from mxref.checkpoints.files import read_json, resolve
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.packing import ADAPTERS_KEY, experts_modules, pack_experts
from mxref.kernels.models.saving import Origin, save_packed_model
from mxref.kernels.models.stacks import PROJECTIONS
from mxref.kernels.models.stored_names import Renaming

__all__ = ["empty_model", "load_packed_model", "read_config", "save_packed_model"]


def load_packed_model(
    directory: str | Path,
    rank: int = 16,
    alpha: float | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    lora_dtype: torch.dtype | str = torch.float32,
) -> Any:
    """The frozen causal language model of a checkpoint, its experts packed and with adapters.

    Args:
        directory: config.json beside one safetensors file or shards with their index, of any convention of
            `mxref.checkpoints`, or the id of a model in the local Hugging Face cache. Own adapters that
            `save_pretrained` wrote are read too.
        rank: of the experts' adapters; 0 for none (as when PEFT adds its own).
        alpha: scaling is alpha / rank; by default alpha = rank, or that of stored adapters.
        device: where the model goes.
        dtype: of unpacked tensors, but for those that the model keeps in fp32; as stored by default.
        lora_dtype: of the adapters.

    Raises:
        FileNotFoundError: `directory` or its config.json does not exist.
        TypeError, ValueError: as `open_checkpoint` and `pack_experts`; also if a tensor is missing, left over or of
            another shape, stored adapters have another rank or alpha, or a dtype is none.
    """
    dtype, lora_dtype = _dtype("dtype", dtype), _dtype("lora_dtype", lora_dtype) or torch.float32
    config, directory = read_config(directory), resolve(directory)
    checkpoint = open_checkpoint(directory)  # says what is wrong with the files before a model is built
    alpha = _check_adapters(checkpoint, config, rank, alpha)
    model = empty_model(config, dtype)
    renaming = Renaming(model)
    checkpoint = checkpoint.renamed(_names_in(model, renaming, checkpoint))
    pack_experts(model, checkpoint, rank, alpha, lora_dtype=lora_dtype, device=device)
    stored = _fill(model, renaming, checkpoint, torch.device(device), dtype)
    model.stored_as = Origin.of(checkpoint, stored)
    if (directory / "generation_config.json").is_file():
        read_json(directory / "generation_config.json")  # a clear error if it is no JSON
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.to(device).eval()  # what is left to move are the computed buffers


def read_config(directory: str | Path) -> Any:
    """The configuration of a checkpoint, which may be the id of a model in the local Hugging Face cache.

    Its `name_or_path` is that id, so that what PEFT writes into an adapter's configuration is portable.

    Raises:
        FileNotFoundError: `directory` or its config.json does not exist.
        ValueError: it is no JSON object, or transformers does not know such a model.
    """
    found = resolve(directory)
    if not (found / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {found}; expected the directory of a transformers checkpoint")
    said = read_json(found / "config.json").get("quantization_config") or {}
    if not isinstance(said, dict):
        raise ValueError(f"quantization_config in {found}/config.json is {said!r}; expected a JSON object")
    config = AutoConfig.from_pretrained(found)
    if not Path(directory).expanduser().exists():
        config.name_or_path = str(directory)
    return config


def empty_model(config: Any, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """The frozen causal language model of a configuration on the meta device, buffers on the CPU.

    Args:
        config: of transformers.
        dtype: of its parameters; by default the configuration's, or else bf16.
        options: of transformers' `from_config`.
    """
    with torch.device("cpu"), init_empty_weights(include_buffers=False):  # buffers are computed, or stored
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.bfloat16, **options)
    return model.requires_grad_(False)


def _dtype(name: str, given: Any) -> torch.dtype | None:
    """A dtype, also by its name."""
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if found is None and given in (None, "auto"):
        return None
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name} is {given!r}; expected a dtype such as torch.bfloat16, or its name")
    if not found.is_floating_point or found.itemsize < 2:
        raise TypeError(f"{name} is {found}; expected bf16, fp16 or fp32")
    return found


def _check_adapters(checkpoint: Checkpoint, config: Any, rank: int, alpha: float | None) -> float | None:
    """The adapters' alpha; of stored adapters, the configuration's."""
    stored = [name for name in checkpoint.others if _is_adapter(name)]
    if not stored:
        return alpha
    said = getattr(config, ADAPTERS_KEY, None)
    said = said if isinstance(said, dict) else {}
    if said.get("rank") != rank:
        raise ValueError(
            f"{checkpoint.files.root} holds {stored[0]}, an adapter of rank {said.get('rank', 'unknown')}; rank is "
            f"{rank}: load it with its own"
        )
    if alpha not in (None, said.get("alpha")):
        raise ValueError(f"{checkpoint.files.root} holds adapters of alpha {said.get('alpha')}; alpha is {alpha}")
    return float(said["alpha"])


def _names_in(model: Any, renaming: Renaming, checkpoint: Checkpoint) -> dict[str, str]:
    """The model's names of the checkpoint's projections; those of no module of it, such as mtp.*, stay."""
    own = {f"{module}.{projection}" for module in experts_modules(model) for projection in PROJECTIONS}
    names = {}
    for name, projection in checkpoint.projections.items():
        names[name] = name if name in own else renaming.name(projection.pairs[0].weight)
        if names[name] not in own and not _ignored(model, projection.pairs[0].weight):
            raise ValueError(f"{checkpoint.files.root} holds {name}, which {type(model).__name__} has no place for")
    return names


def _fill(
    model: Any, renaming: Renaming, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None
) -> dict[str, str]:
    """Put every stored unpacked tensor in its place; names in the checkpoint by the model's.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    root, tied = checkpoint.files.root, set(getattr(model, "all_tied_weights_keys", {}))
    needed = _needed(model, renaming, checkpoint)
    readers = {
        name: partial(matrix.read, checkpoint.files)
        for name, matrix in checkpoint.others.items()
        if renaming.name(name) in needed
    }
    if extra := [name for name in checkpoint.others if name not in readers and not _ignored(model, name)]:
        raise ValueError(f"{root} holds {extra[0]}, one of {len(extra)} tensors that the model has no place for")
    stored_as: dict[str, str] = {}
    missing = set(needed)
    for target, name, value in renaming.tensors(readers):
        _put(model, target, value, device, _kept_in_fp32(model, target, dtype))
        missing.discard(target)
        if name is not None:
            stored_as[target] = name
    if absent := sorted(missing - tied):
        raise ValueError(f"{root} lacks {absent[0]}, one of {len(absent)} tensors that the model needs")
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if tied - set(getattr(model, "all_tied_weights_keys", {})):  # stored apart and different: kept apart
        model.config.tie_word_embeddings = False
    return stored_as


def _needed(model: Any, renaming: Renaming, checkpoint: Checkpoint) -> set[str]:
    """Names that must be stored: all but packed weights and their biases; adapters if the checkpoint has some."""
    experts = {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}
    needed = {name for name in renaming.own if name.rpartition(".")[0] not in experts}
    if any(map(_is_adapter, checkpoint.others)):
        own = (f"{name}.{key}" for name, module in experts.items() for key, _ in module.named_parameters(recurse=False))
        needed.update(filter(_is_adapter, own))
    return needed


def _is_adapter(name: str) -> bool:
    return name.endswith(("_lora_A", "_lora_B"))


def _ignored(model: Any, name: str) -> bool:
    """Whether the model's class ignores a stored tensor, such as the layers mtp.*."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    return any(re.search(pattern, name) for pattern in patterns)


def _kept_in_fp32(model: Any, name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """A tensor's dtype where `dtype` is asked for."""
    kept = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    if dtype == torch.float16:
        kept |= {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    small = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if small and any(re.search(rf"(^|\.){part}(\.|$)", name) for part in kept) else dtype


def _put(model: nn.Module, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    place = getattr(module, attribute)
    if place.shape != tensor.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} in the checkpoint; the model needs {tuple(place.shape)}"
        )
    value = tensor.to(device, dtype if tensor.is_floating_point() else None)
    if isinstance(place, nn.Parameter):
        value = nn.Parameter(value, requires_grad=place.requires_grad)
    setattr(module, attribute, value)
