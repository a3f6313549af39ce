"""A packed model to a checkpoint under a convention's names, packed bytes unchanged."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from mxref.checkpoints import CONVENTIONS, Checkpoint, Convention, gpt_oss
from mxref.checkpoints.files import INDEX_NAME, resolve
from mxref.kernels.models.experts import PackedExperts
from mxref.kernels.models.packing import ADAPTERS_KEY
from mxref.kernels.models.stacks import PROJECTIONS, checkpoint_layout
from mxref.kernels.models.stored_names import stored_expert_names, stored_tensors

_BESIDE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken",
           "*.model", "chat_template*", "*processor_config.json")  # fmt: skip
"""Files of a checkpoint that travel with it: what a tokenizer or processor needs."""


@dataclass(frozen=True)
class Origin:
    """Where a model's tensors were stored.

    Attributes:
        convention: by name.
        tensors: names in the checkpoint by the model's, of tensors that were stored whole.
        experts: the names of expert 0's matrices, or of the stack, by projection.
    """

    convention: str = ""
    tensors: dict[str, str] = field(default_factory=dict)
    experts: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, tensors: dict[str, str]) -> Origin:
        """Of a model loaded from a checkpoint whose projections have the model's names."""
        experts = {
            name: tuple(pair.weight for pair in projection.pairs[: len(projection.pairs) // projection.tensor.E or 1])
            for name, projection in checkpoint.projections.items()
        }
        return cls(checkpoint.convention.name, tensors, experts)


def save_packed_model(
    model: Any, directory: str | Path, max_shard_size: int | str = "5GB", convention: str | None = None
) -> None:
    """Save a packed model as a checkpoint that `load_packed_model` reads; adapters are left out.

    Experts that were loaded are saved unchanged, and so is all else that was loaded in its own dtype. With gpt-oss
    names transformers reads a gpt-oss model. Tokenizer files and generation settings are copied.

    Experts in another layout (see `PackedStacks`) are rearranged in place and back: no other thread may run the model
    meanwhile, and backward through an earlier graph raises.

    Args:
        model: of transformers, with packed experts; of one with PEFT adapters, give `model.unload()`, and save
            those with `save_pretrained`.
        directory: made if need be.
        max_shard_size: bytes, or a string such as "5GB".
        convention: gpt-oss, DeepSeek-V4 or compressed-tensors. By default the one that the model was loaded from, if it
            is one of these; else gpt-oss for gpt-oss models and those that transformers stores stacked,
            compressed-tensors for others.

    Raises:
        ValueError: `model` has no packed experts, PEFT's adapters are on it, or the convention is another or cannot
            name the model's experts.
    """
    experts = {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}
    if not experts:
        raise ValueError(f"{type(model).__name__} has no PackedExperts; save it with its own save_pretrained")
    with checkpoint_layout(model):
        state = model.state_dict()
        if name := next((name for name in state if ".base_layer." in name), None):
            raise ValueError(f"{name} is wrapped by PEFT; save its adapters with save_pretrained, and model.unload()")
        origin = getattr(model, "stored_as", Origin())
        chosen = _chosen(convention, model, origin, experts)
        tensors = _others(chosen, model, origin, state, experts)
        for name, module in experts.items():
            for projection in PROJECTIONS:
                weights = _weight_names(chosen, model, origin, f"{name}.{projection}")
                tensors |= _expert_tensors(chosen, module, projection, weights)

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        _write_settings(model, directory, chosen)
        _write_shards(tensors, directory, max_shard_size)


def _chosen(convention: str | None, model: Any, origin: Origin, experts: Mapping[str, PackedExperts]) -> Convention:
    written = {c.name: c for c in CONVENTIONS if c.store is not None}
    if convention is not None:
        if convention not in written:
            raise ValueError(f"convention is {convention!r}; expected one of {', '.join(written)}")
        return written[convention]
    if origin.convention in written:
        return written[origin.convention]
    apart = _apart(stored_expert_names(model, f"{next(iter(experts))}.{PROJECTIONS[0]}"))
    return written["compressed-tensors" if apart else gpt_oss.CONVENTION.name]


def _apart(weights: Sequence[str]) -> bool:
    """Whether these are names of one expert's matrices, not of a stack."""
    return all(".experts.0." in weight for weight in weights)


def _weight_names(chosen: Convention, model: Any, origin: Origin, projection: str) -> Sequence[str]:
    """A projection's stored names: the stack's, or those of expert 0's matrices."""
    if chosen is gpt_oss.CONVENTION:
        return [projection]
    known = origin.experts.get(projection, ())
    weights = known if known and _apart(known) else stored_expert_names(model, projection)
    if not _apart(weights):
        raise ValueError(
            f"{projection} has no names for separate experts, which {chosen.name} needs: transformers stores "
            f"{type(model).__name__} stacked; save it with convention='{gpt_oss.CONVENTION.name}'"
        )
    return weights


def _others(
    chosen: Convention, model: Any, origin: Origin, state: Mapping[str, Tensor], experts: Mapping[str, PackedExperts]
) -> dict[str, Tensor]:
    """Everything but the experts, without second names of tied weights."""
    tied = getattr(model, "all_tied_weights_keys", {})
    own = {
        name: tensor
        for name, tensor in state.items()
        if name.rpartition(".")[0] not in experts
        and not (name in tied and tensor.data_ptr() == state[tied[name]].data_ptr())
    }
    if chosen is gpt_oss.CONVENTION:
        return own
    known = {} if origin.convention == gpt_oss.CONVENTION.name else origin.tensors
    unknown = {name: tensor for name, tensor in own.items() if name not in known}
    return {known[name]: own[name] for name in own if name in known} | stored_tensors(model, unknown)


def _expert_tensors(
    chosen: Convention, module: PackedExperts, projection: str, weights: Sequence[str]
) -> dict[str, Tensor]:
    """The tensors of one projection, windows on the module's memory."""
    stack, bias = module.packed_weights(projection), getattr(module, f"{projection}_bias")
    tensors: dict[str, Tensor] = {}

    def store(weight: str, packed: Tensor, scales: Tensor) -> None:
        assert chosen.store is not None
        stem = weight.removesuffix(chosen.weight)
        tensors[stem + chosen.codes], tensors[stem + chosen.scales[0]] = chosen.store(packed, scales)

    if chosen is gpt_oss.CONVENTION:
        store(weights[0], stack.packed, stack.scales)
        return tensors if bias is None else tensors | {weights[0] + gpt_oss.BIAS: bias}
    if bias is not None:
        raise ValueError(f"{chosen.name} has no names for the experts' biases; save with convention='gpt-oss'")
    rows = stack.N // len(weights)
    for e in range(stack.E):
        for i, weight in enumerate(weights):
            part = slice(i * rows, (i + 1) * rows)
            store(weight.replace(".experts.0.", f".experts.{e}."), stack.packed[e, part], stack.scales[e, part])
    return tensors


def _write_settings(model: Any, directory: Path, chosen: Convention) -> None:
    """The configuration, generation settings, and tokenizer files."""
    config = copy.deepcopy(model.config)
    written = dict(chosen.quantization or {})
    said = getattr(config, "quantization_config", None)
    if not isinstance(said, dict) or said.get("quant_method") != written["quant_method"]:
        config.quantization_config = copy.deepcopy(written)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    if hasattr(config, ADAPTERS_KEY):
        delattr(config, ADAPTERS_KEY)
    config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)
    try:
        source = resolve(model.config.name_or_path)
    except FileNotFoundError:
        return
    for pattern in _BESIDE if source.is_dir() and source.resolve() != directory.resolve() else ():
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)


def _write_shards(tensors: Mapping[str, Tensor], directory: Path, max_shard_size: int | str) -> None:
    """One shard in memory at a time; an earlier checkpoint's shards are deleted."""
    sizes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: _alone(tensors[name]) for name in names}, directory / file, metadata={"format": "pt"})
    stale = {*directory.glob("model*.safetensors"), directory / INDEX_NAME}
    stale -= {directory / file for file in plan.filename_to_tensors}
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        stale.discard(directory / INDEX_NAME)
    for old in stale:
        old.unlink(missing_ok=True)


def _alone(tensor: Tensor) -> Tensor:
    """A tensor alone in its memory, for safetensors."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
