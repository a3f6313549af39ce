"""The files of a checkpoint: each tensor's place, dtype and shape, and the tensors, few at a time.

A path is a safetensors file, a directory with one such file or with `model.safetensors.index.json` and its shards
(symbolic links are followed), or the id of a model in the local Hugging Face cache. Nothing is downloaded. Headers are
read once, data on demand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._guards import detect_fake_mode

INDEX_NAME = "model.safetensors.index.json"
_EXPERT_COUNTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")


@dataclass(frozen=True)
class Entry:
    """One tensor: file, dtype by safetensors' name (U8, BF16, F8_E8M0, …), and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Files:
    """A checkpoint's tensors by name, and the files beside them.

    Attributes:
        root: the file or directory.
        tensors: all, or those that the index of shards lists.
        metadata: the safetensors headers' free text.
        config: config.json, empty without one.
        quantization: config.json's `quantization_config`, or hf_quant_config.json.
    """

    root: Path
    tensors: dict[str, Entry]
    metadata: dict[str, str]
    config: dict[str, Any]
    quantization: dict[str, Any]

    @classmethod
    def of(cls, path: str | Path) -> Files:
        """Read every header.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: a file is missing, truncated or not safetensors, or the index or a configuration is no JSON
                object.
        """
        root = resolve(path)
        directory = root if root.is_dir() else root.parent
        tensors, metadata = _from_file(root) if root.is_file() else _from_directory(root)
        config = _optional_json(directory / "config.json")
        quantization = config.get("quantization_config") or _optional_json(directory / "hf_quant_config.json")
        return cls(root, tensors, metadata, config, quantization if isinstance(quantization, dict) else {})

    @property
    def quant_method(self) -> str:
        """The configuration's name of the quantisation, "" without: mxfp4, compressed-tensors, quark, …"""
        producer = self.quantization.get("producer")
        name = producer.get("name") if isinstance(producer, dict) else None
        return str(self.quantization.get("quant_method") or name or "")

    @property
    def num_experts(self) -> int:
        """Experts of a layer by config.json, 0 if it does not say."""
        text = self.config.get("text_config")
        for config in (self.config, text if isinstance(text, dict) else {}):
            for key in _EXPERT_COUNTS:
                if isinstance(config.get(key), int):
                    return int(config[key])
        return 0

    def where(self, tensor: str) -> str:
        """A tensor and its file, for messages."""
        return f"{tensor} in {self.tensors[tensor].file}"

    def read(self, names: Iterable[str]) -> Iterator[Tensor]:
        """The tensors of these names, in order, as windows on their files, each opened once.

        Windows close with the iterator: copy what has to last.

        Raises:
            ValueError: a file has changed since the checkpoint was opened.
            RuntimeError: under FakeTensorMode, where tensors have no data.
        """
        if detect_fake_mode() is not None:
            raise RuntimeError(f"FakeTensorMode is active, where tensors have no data; read {self.root} outside of it")
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for name in names:
                file = self.tensors[name].file
                if file not in opened:
                    opened[file] = stack.enter_context(_opened(file))
                yield opened[file].get_tensor(name)


def resolve(path: str | Path) -> Path:
    """The file or directory at `path`, or the cached snapshot of a model id such as openai/gpt-oss-20b.

    Raises:
        FileNotFoundError: there is neither.
    """
    found = Path(path).expanduser()
    if found.exists():
        return found
    name = str(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FileNotFoundError(f"no checkpoint at {path}")
    cached = _cached_snapshot(name)
    if cached is None:
        raise FileNotFoundError(
            f"no checkpoint at {path}, neither as a path nor as a model id in the local Hugging Face cache; to fetch "
            f"it, run: hf download {name}"
        )
    return cached


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply to be read; expected a JSON object") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds a {type(data).__name__}; expected a JSON object")
    return data


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _cached_snapshot(name: str) -> Path | None:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return None
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no model id
        return None


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _from_file(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, no dictionary
        tensors = {name: Entry(file, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        return tensors, dict(opened.metadata() or {})


def _from_directory(directory: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    if (directory / INDEX_NAME).is_file():
        return _from_index(directory / INDEX_NAME)
    files = sorted(directory.glob("*.safetensors"))
    if len(files) != 1:
        found = f"{len(files)} .safetensors files" if files else f"no .safetensors file{_others(directory)}"
        raise ValueError(f"{directory} holds {found} and no {INDEX_NAME}; expected one file, or shards with an index")
    return _from_file(files[0])


def _others(directory: Path) -> str:
    """Weights in formats that are not read."""
    found = sorted(path.name for ending in ("bin", "pt", "pth", "gguf") for path in directory.glob(f"*.{ending}"))
    return f" (but {found[0]}, which is not read)" if found else ""


def _from_index(index: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} is not a safetensors index, weight_map: {{tensor: shard}}")
    shards: dict[str, dict[str, Entry]] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index} names the shard {shard!r}; expected the name of a file beside the index")
        if not (index.parent / shard).is_file():
            raise ValueError(f"{index} names the shard {shard}, which is missing; the download is incomplete")
        shards[shard], found = _from_file(index.parent / shard)
        metadata |= found
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            raise ValueError(f"{index} places {tensor} in {shard}, which does not hold it")
    return {tensor: shards[shard][tensor] for tensor, shard in weight_map.items()}, metadata


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The safetensors file, or a ValueError that says what it is instead."""
    try:
        opened = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} {_diagnosis(file)} ({error})") from None
    with opened as handle:
        yield handle


def _diagnosis(file: Path) -> str:
    if not file.exists():
        return "is a link to nowhere; the download is incomplete"
    if file.is_dir():
        return "is a directory; expected a safetensors file"
    with file.open("rb") as stream:
        start = stream.read(64)
    if not start:
        return "is empty; expected a safetensors file"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; fetch it with git lfs pull"
    if start[:2] == b"PK" or (start[0] == 0x80 and start[1] <= 5):
        return "is a pickle (torch.save), which runs code when loaded; expected a safetensors file"
    return "is truncated or no safetensors file; fetch it again"
