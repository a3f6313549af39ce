"""A gpt-oss checkpoint to a transformers model on packed experts, and back, one tensor at a time.

    from mxref.kernels.models.loading import load_packed_model, save_packed_model
    model = load_packed_model("./gpt-oss-20b", rank=16, device="cuda")

The model is built without memory for its parameters. Experts go from the files into packed buffers, a projection at a
time and never decoded; every other tensor goes from the files into its parameter. So at its highest, memory holds the
finished model and one tensor more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from mxref.checkpoints.deepseek_v4 import is_deepseek_checkpoint
from mxref.checkpoints.gpt_oss import list_expert_tensors, list_other_tensors, read_other_tensors
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.packing import pack_experts

__all__ = ["load_packed_model", "save_packed_model"]

_QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
"""What transformers needs in config.json to read packed experts."""


def load_packed_model(
    directory: str | Path,
    rank: int = 16,
    alpha: float | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype = torch.float32,
) -> Any:
    """The causal language model of a checkpoint, frozen, its experts packed and with adapters.

    Args:
        directory: config.json beside one safetensors file or shards with their index, gpt-oss names.
        rank: of the experts' adapters; 0 for none (as when PEFT adds its own).
        alpha: scaling is alpha / rank; alpha = rank by default.
        device: where the model goes.
        dtype: of the tensors that are not packed; as stored by default.
        lora_dtype: of the adapters.

    Raises:
        FileNotFoundError: `directory` or its config.json does not exist.
        TypeError, ValueError: as `pack_experts`; also if a tensor is missing, left over or of another shape.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {directory}; expected the directory of a transformers checkpoint")
    if is_deepseek_checkpoint(directory):
        raise ValueError(
            f"{directory} has DeepSeek-V4 names, and FP8 tensors beside its experts; load the model with transformers "
            "and pack its experts with pack_experts(model, directory)"
        )
    list_expert_tensors(directory)  # says what is wrong with the files before a model is built
    config = AutoConfig.from_pretrained(directory)
    with init_empty_weights(include_buffers=False):  # buffers are computed, not stored
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.bfloat16)
    pack_experts(model.requires_grad_(False), directory, rank, alpha, lora_dtype=lora_dtype, device=device)
    _check_names(model, set(list_other_tensors(directory)), directory)
    for name, tensor in read_other_tensors(directory):
        _put(model, name, tensor, torch.device(device), dtype)
    model.tie_weights()
    return model.to(device).eval()  # what is left to move are the computed buffers


def save_packed_model(model: Any, directory: str | Path, max_shard_size: int | str = "5GB") -> None:
    """Save a packed model as a checkpoint that transformers and `load_packed_model` read; adapters are left out.

    Bytes are written as they lie in the model, so a checkpoint that was loaded in its own dtype is saved unchanged.
    What is no part of the model (tokenizer, generation settings) stays where it was.

    Args:
        model: a transformers model with packed experts; with PEFT adapters on it, give `model.unload()`, and save those
            with `save_pretrained`.
        directory: made if need be.
        max_shard_size: bytes, or a string such as "5GB".

    Raises:
        ValueError: `model` has no packed experts, or PEFT's adapters are on it.
    """
    if not any(isinstance(module, PackedExperts) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no PackedExperts; save it with its own save_pretrained")
    state = model.state_dict()
    if wrapped := next((name for name in state if ".base_layer." in name), None):
        raise ValueError(f"{wrapped} is wrapped by PEFT; save its adapters with save_pretrained, and model.unload()")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is None:
        config.quantization_config = dict(_QUANTIZATION)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    own = {name: tensor for name, tensor in state.items() if not name.endswith(("_lora_A", "_lora_B"))}
    tied = list(getattr(model, "all_tied_weights_keys", {}))
    save_torch_state_dict(own, directory, max_shard_size=max_shard_size, shared_tensors_to_discard=tied)


def _check_names(model: Any, stored: set[str], directory: Path) -> None:
    expected = {name for name, _ in _empty(model)}
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    if missing := sorted(expected - stored - tied):
        raise ValueError(f"{directory} lacks {missing[0]}, one of {len(missing)} tensors that the model needs")
    if extra := sorted(stored - expected - tied):
        raise ValueError(f"{directory} holds {extra[0]}, one of {len(extra)} tensors that the model has no place for")


def _empty(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in model.named_parameters(remove_duplicate=False) if tensor.is_meta)


def _put(model: nn.Module, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> None:
    """A stored tensor, copied out of the file, as the parameter of its name."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    place = module.get_parameter(attribute)
    if place.shape != tensor.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} in the checkpoint; the model needs {place.shape}")
    value = tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)
    module.register_parameter(attribute, nn.Parameter(value, requires_grad=False))
