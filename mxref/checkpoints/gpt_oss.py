"""gpt-oss checkpoints: expert weights from safetensors straight into packed buffers, and back.

A gpt-oss checkpoint stores each expert projection as a pair of uint8 tensors, `{name}_blocks` [E, N, K/32, 16] and
`{name}_scales` [E, N, K/32], with an optional `{name}_bias` [E, N] beside it; `{name}` ends in `gate_up_proj` or
`down_proj`. The blocks' bytes are `MXWeights.packed` already, so reading is a view: nothing is decoded, and no bf16
copy of a weight exists at any time. Source: the openai/gpt-oss checkpoints and transformers' `integrations/mxfp4.py`.

A `path` is a safetensors file, or a directory that holds one such file or `model.safetensors.index.json` with its
shards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mxref.formats import MX_BLOCK_SIZE
from mxref.weights import MXWeights

__all__ = [
    "ExpertTensor",
    "list_expert_tensors",
    "list_other_tensors",
    "read_expert_biases",
    "read_expert_weights",
    "read_other_tensors",
    "write_expert_weights",
]

INDEX_NAME = "model.safetensors.index.json"
_BLOCKS, _SCALES, _BIAS = "_blocks", "_scales", "_bias"


@dataclass(frozen=True)
class ExpertTensor:
    """One expert projection of a checkpoint: its name without suffix, and its logical sizes."""

    name: str
    E: int
    N: int
    K: int


def list_expert_tensors(path: str | Path) -> list[ExpertTensor]:
    """The MXFP4 expert projections of a checkpoint, layer by layer, from the files' headers alone.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: a file is empty, truncated, a pickle or otherwise not safetensors; a shard or a tensor that the
            index names is missing; blocks lack their scales or scales their blocks; a tensor has another dtype or
            shape; the checkpoint holds no MXFP4 expert tensors.
    """
    return _list(_Files.of(Path(path)))


def read_expert_weights(path: str | Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, MXWeights]]:
    """Expert weights by name, one projection in memory at a time.

    The checkpoint is checked in full when this function is called; tensors are read as the iterator advances.

    Args:
        path: file or directory, see the module's description.
        names: the projections wanted, in this order; all of them, layer by layer, when None.

    Raises:
        FileNotFoundError, ValueError: as `list_expert_tensors`; also for a name that the checkpoint does not hold.
    """
    files = _Files.of(Path(path))
    wanted = _wanted(names, [entry.name for entry in _list(files)], files)
    return ((name, _read_pair(files, name)) for name in wanted)


def read_expert_biases(path: str | Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Expert biases [E, N] in the checkpoint's dtype, by the projection's name; by default all those present.

    Raises:
        FileNotFoundError, ValueError: as `read_expert_weights`; also for a bias whose shape is not its projection's
            [E, N].
    """
    files = _Files.of(Path(path))
    entries = {entry.name: entry for entry in _list(files)}
    present = [name for name in entries if name + _BIAS in files.of_tensor]
    for name in present:
        shape, expected = files.header(name + _BIAS)[1], (entries[name].E, entries[name].N)
        if shape != expected:
            raise ValueError(f"{files.where(name + _BIAS)} has shape {shape}; expected [E, N] = {expected}")
    wanted = _wanted(names, present, files)
    return ((name, files.read(name + _BIAS)) for name in wanted)


def list_other_tensors(path: str | Path) -> list[str]:
    """Names of the tensors that belong to no expert projection: attention, router, norms, embeddings.

    Raises:
        FileNotFoundError, ValueError: as `list_expert_tensors`.
    """
    files = _Files.of(Path(path))
    owned = {entry.name + suffix for entry in _list(files) for suffix in (_BLOCKS, _SCALES, _BIAS)}
    return sorted((name for name in files.of_tensor if name not in owned), key=_natural)


def read_other_tensors(path: str | Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `list_other_tensors` names, by name, one in memory at a time; as stored.

    Raises:
        FileNotFoundError, ValueError: as `read_expert_weights`.
    """
    files = _Files.of(Path(path))
    wanted = _wanted(names, list_other_tensors(path), files)
    return ((name, files.read(name)) for name in wanted)


def write_expert_weights(
    file: str | Path, weights: Mapping[str, MXWeights], biases: Mapping[str, Tensor] | None = None
) -> None:
    """Save projections under their gpt-oss names in one safetensors file; what was read is written back bit for bit.

    Raises:
        ValueError: `weights` is empty, or a bias's shape is not its projection's [E, N].
    """
    if not weights:
        raise ValueError("weights is empty; expected at least one projection")
    tensors: dict[str, Tensor] = {}
    for name, stack in weights.items():
        tensors[name + _BLOCKS], tensors[name + _SCALES] = stack.to_gpt_oss()
    for name, bias in (biases or {}).items():
        if name not in weights or tuple(bias.shape) != (weights[name].E, weights[name].N):
            expected = (weights[name].E, weights[name].N) if name in weights else "no projection of that name"
            raise ValueError(f"biases[{name!r}] has shape {tuple(bias.shape)}; weights has {expected}")
        tensors[name + _BIAS] = bias.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def _list(files: _Files) -> list[ExpertTensor]:
    pairs = {name.removesuffix(s) for name in files.of_tensor for s in (_BLOCKS, _SCALES) if name.endswith(s)}
    if not pairs:
        raise ValueError(
            f"{files.root} holds no MXFP4 expert tensors: none of its {len(files.of_tensor)} tensors is named "
            f"*{_BLOCKS} or *{_SCALES}; a bf16 checkpoint has to be quantised first (mxref.encode_mxfp4)"
        )
    return [_entry(files, name) for name in sorted(pairs, key=_natural)]


def _entry(files: _Files, name: str) -> ExpertTensor:
    for suffix in (_BLOCKS, _SCALES):
        if name + suffix not in files.of_tensor:
            partner = name + (_SCALES if suffix == _BLOCKS else _BLOCKS)
            raise ValueError(f"{files.where(partner)} has no partner {name + suffix}; MXFP4 needs both")
    shapes = {}
    for suffix in (_BLOCKS, _SCALES):
        dtype, shapes[suffix] = files.header(name + suffix)
        if dtype != "U8":
            raise ValueError(f"{files.where(name + suffix)} has dtype {dtype}; expected U8, raw MXFP4 bytes")
    blocks, scales = shapes[_BLOCKS], shapes[_SCALES]
    if len(blocks) != 4 or blocks[-1] != MX_BLOCK_SIZE // 2 or 0 in blocks:
        raise ValueError(f"{files.where(name + _BLOCKS)} has shape {blocks}; expected [E, N, K/32, 16]")
    if scales != blocks[:-1]:
        raise ValueError(f"{files.where(name + _SCALES)} has shape {scales}; its blocks need {blocks[:-1]}")
    return ExpertTensor(name, blocks[0], blocks[1], blocks[2] * MX_BLOCK_SIZE)


def _read_pair(files: _Files, name: str) -> MXWeights:
    return MXWeights.from_gpt_oss(files.read(name + _BLOCKS), files.read(name + _SCALES))


def _wanted(names: Iterable[str] | None, present: list[str], files: _Files) -> list[str]:
    if names is None:
        return present
    wanted = list(names)
    if unknown := [name for name in wanted if name not in present]:
        raise ValueError(f"names holds {unknown}; {files.root} has {present}")
    return wanted


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class _Files:
    """Where each tensor of a checkpoint lies."""

    root: Path
    of_tensor: dict[str, Path]

    @classmethod
    def of(cls, path: Path) -> _Files:
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint at {path}")
        if path.is_file():
            return cls(path, dict.fromkeys(_tensor_names(path), path))
        if (path / INDEX_NAME).is_file():
            return cls(path, _from_index(path / INDEX_NAME))
        candidates = sorted(path.glob("*.safetensors"))
        if len(candidates) != 1:
            found = f"{len(candidates)} .safetensors files" if candidates else "no .safetensors file"
            raise ValueError(f"{path} holds {found} and no {INDEX_NAME}; expected one file, or shards with an index")
        return cls(path, dict.fromkeys(_tensor_names(candidates[0]), candidates[0]))

    def where(self, tensor: str) -> str:
        return f"{tensor} in {self.of_tensor[tensor]}"

    def header(self, tensor: str) -> tuple[str, tuple[int, ...]]:
        """(safetensors dtype name, shape), without reading the data."""
        with _opened(self.of_tensor[tensor]) as file:
            entry = file.get_slice(tensor)
            return entry.get_dtype(), tuple(entry.get_shape())

    def read(self, tensor: str) -> Tensor:
        with _opened(self.of_tensor[tensor]) as file:
            data: Tensor = file.get_tensor(tensor)
            return data


def _tensor_names(file: Path) -> list[str]:
    with _opened(file) as opened:
        return list(opened.keys())


def _from_index(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shard_of = {str(tensor): str(shard) for tensor, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a safetensors index, weight_map: {{tensor: shard}} ({error!r})") from None
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index} names the shard {shard!r}; expected the name of a file beside the index")
        if not (index.parent / shard).is_file():
            raise ValueError(f"{index} names the shard {shard}, which is missing; the download is incomplete")
        held = set(_tensor_names(index.parent / shard))
        if absent := sorted(tensor for tensor, owner in shard_of.items() if owner == shard and tensor not in held):
            raise ValueError(f"{index} places {absent[0]} in {shard}, which does not hold it")
    return {tensor: index.parent / shard for tensor, shard in shard_of.items()}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The safetensors file, or a ValueError that says what the file is instead."""
    try:
        opened = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} {_diagnosis(file)} ({error})") from None
    with opened as handle:
        yield handle


def _diagnosis(file: Path) -> str:
    with file.open("rb") as stream:
        start = stream.read(2)
    if not start:
        return "is empty; expected a safetensors file"
    if start == b"PK" or (start[0] == 0x80 and start[-1] <= 5):
        return "is a pickle (torch.save), which runs code when loaded; expected a safetensors file"
    return "is truncated or no safetensors file; fetch it again"
