"""What lies in a checkpoint's files, and whether two sets of tensors are the same."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a directory's safetensors files."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def assert_same_tensors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Names, dtypes and bits."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name
