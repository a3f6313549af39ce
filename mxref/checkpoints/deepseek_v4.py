"""DeepSeek-V4 checkpoints: separate MXFP4 experts from safetensors, stacked into `MXWeights`.

What is assumed, as far as transformers documents it (`conversion_mapping.py`, "deepseek_v4", and
`integrations/finegrained_fp8.py`, `expert_dtype = "fp4"`):

- one tensor an expert and projection, `{layer}.experts.{e}.{w1|w2|w3}.weight`, I8 (or U8) [N, K/2], two E2M1 codes a
  byte with even k in the low nibble; w1 is gate, w3 up, w2 down;
- its scales beside it under `.scale` or `.weight_scale_inv`, E8M0 (or U8) [N, K/32], plain row order; in spite of the
  second name they multiply;
- gate_up is w1's rows, then w3's.

Layers are named as in transformers' model: `layers.0.ffn` becomes `model.layers.0.mlp`. FP8 experts are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mxref.checkpoints.gpt_oss import ExpertTensor, _Files, _natural, _wanted
from mxref.formats import MX_BLOCK_SIZE
from mxref.weights import MXWeights

__all__ = ["is_deepseek_checkpoint", "list_deepseek_expert_tensors", "read_deepseek_expert_weights"]

_EXPERT = re.compile(r"(?P<layer>.+)\.experts\.(?P<expert>\d+)\.(?P<part>w[123])\.weight")
_PARTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
_SCALES = (".scale", ".weight_scale_inv")
_WEIGHT_DTYPES, _SCALE_DTYPES = ("I8", "U8"), ("F8_E8M0", "U8")


def is_deepseek_checkpoint(path: str | Path) -> bool:
    """Whether a checkpoint names its experts as DeepSeek-V4 does.

    Raises:
        FileNotFoundError, ValueError: the checkpoint cannot be read, see `mxref.checkpoint`.
    """
    return any(_EXPERT.fullmatch(name) for name in _Files.of(Path(path)).of_tensor)


def list_deepseek_expert_tensors(path: str | Path) -> list[ExpertTensor]:
    """The expert projections, each a stack of all experts of its layer, from the files' headers alone.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: there are no such experts, an expert or its scales are missing, or a dtype or shape is another.
    """
    return [_entry(stack) for stack in _stacks(_Files.of(Path(path)))]


def read_deepseek_expert_weights(
    path: str | Path, names: Iterable[str] | None = None
) -> Iterator[tuple[str, MXWeights]]:
    """Expert weights by name, one projection in memory at a time; checked in full when this function is called.

    Raises:
        FileNotFoundError, ValueError: as `list_deepseek_expert_tensors`; also for a name that is not there.
    """
    files = _Files.of(Path(path))
    stacks = {_entry(stack).name: stack for stack in _stacks(files)}
    wanted = _wanted(names, list(stacks), files)
    return ((name, _read(stacks[name])) for name in wanted)


@dataclass(frozen=True)
class _Stack:
    """One projection: (weight, scale) tensor names by expert, and within an expert by part."""

    files: _Files
    name: str
    experts: list[list[tuple[str, str]]]


def _stacks(files: _Files) -> list[_Stack]:
    found: dict[str, dict[int, set[str]]] = {}
    for name in files.of_tensor:
        if match := _EXPERT.fullmatch(name):
            found.setdefault(match["layer"], {}).setdefault(int(match["expert"]), set()).add(match["part"])
    if not found:
        raise ValueError(f"{files.root} holds no tensor named like layers.0.ffn.experts.0.w1.weight")
    stacks = []
    for layer in sorted(found, key=_natural):
        held = found[layer]
        for projection, parts in _PARTS.items():
            experts = []
            for e in range(max(held) + 1):
                if missing := [part for part in parts if part not in held.get(e, ())]:
                    raise ValueError(f"{layer}.experts.{e}.{missing[0]}.weight is missing in {files.root}")
                experts.append([_pair(files, f"{layer}.experts.{e}.{part}") for part in parts])
            stacks.append(_Stack(files, f"{_transformers_name(layer)}.experts.{projection}", experts))
    return stacks


def _pair(files: _Files, stem: str) -> tuple[str, str]:
    scale = next((stem + suffix for suffix in _SCALES if stem + suffix in files.of_tensor), None)
    if scale is None:
        raise ValueError(f"{files.where(stem + '.weight')} has no scales {' or '.join(stem + s for s in _SCALES)}")
    return stem + ".weight", scale


def _entry(stack: _Stack) -> ExpertTensor:
    """Sizes from the headers, every expert's checked against the first's."""
    shapes = set()
    for parts in stack.experts:
        rows, columns = 0, set()
        for weight, scale in parts:
            (weight_dtype, shape), (scale_dtype, scale_shape) = stack.files.header(weight), stack.files.header(scale)
            if weight_dtype not in _WEIGHT_DTYPES:
                raise ValueError(f"{stack.files.where(weight)} has dtype {weight_dtype}; expected I8, packed FP4")
            if scale_dtype not in _SCALE_DTYPES:
                raise ValueError(f"{stack.files.where(scale)} has dtype {scale_dtype}; expected F8_E8M0")
            if len(shape) != 2 or scale_shape != (shape[0], 2 * shape[1] // MX_BLOCK_SIZE) or shape[1] % 16:
                raise ValueError(
                    f"{stack.files.where(weight)} has shape {shape} and scales {scale_shape}; expected [N, K/2] and "
                    "[N, K/32]"
                )
            rows += shape[0]
            columns.add(2 * shape[1])
        shapes.add((rows, *columns))
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"{stack.name} has experts of different sizes: {sorted(shapes)}")
    N, K = shapes.pop()
    return ExpertTensor(stack.name, len(stack.experts), N, K)


def _read(stack: _Stack) -> MXWeights:
    def bytes_of(name: str) -> Tensor:
        return stack.files.read(name).view(torch.uint8)

    packed = torch.stack([torch.cat([bytes_of(weight) for weight, _ in parts]) for parts in stack.experts])
    scales = torch.stack([torch.cat([bytes_of(scale) for _, scale in parts]) for parts in stack.experts])
    return MXWeights(packed, scales, 2 * packed.shape[2], packed.shape[1])


def _transformers_name(layer: str) -> str:
    name = re.sub(r"\.ffn$", ".mlp", layer)
    return name if name.startswith("model.") else f"model.{name}"
