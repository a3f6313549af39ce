"""The weights outside the experts, read one at a time as dense tensors, FP8 and MXFP4 matrices as bf16.

That is exact within bf16's range where the scales are powers of two; with FP32 scales the products are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxref.checkpoints.convention import Convention
from mxref.checkpoints.files import Files
from mxref.subnormals import warn_if_flushed
from mxref.weights import MXWeights, decode_mxfp4

_FP8_SCALES = (".scale", ".weight_scale_inv", ".weight_scale")
_FP8, _BLOCK = "F8_E4M3", 128


@dataclass(frozen=True)
class Matrix:
    """A weight outside the experts: names of its tensor and, if quantised, its scales."""

    tensor: str
    scales: str | None = None

    def read(self, files: Files) -> Tensor:
        """The weight in memory of its own: as stored, or bf16 where it is quantised.

        Raises:
            ValueError: an FP8 matrix has no scales, or scales that fit no blocks.
        """
        entry = files.tensors[self.tensor]
        if self.scales is None:
            if entry.dtype.startswith("F8"):
                raise ValueError(f"{files.where(self.tensor)} is {entry.dtype} without scales; its values are unknown")
            return next(files.read([self.tensor])).clone()
        codes, scales = files.read([self.tensor, self.scales])
        if entry.dtype == _FP8:
            warn_if_flushed(codes.device)
            return _dequantised(codes, scales, _block(files, self.tensor, tuple(scales.shape)))
        codes, scales = codes.view(torch.uint8), scales.view(torch.uint8)
        return decode_mxfp4(MXWeights(codes, scales, 2 * codes.shape[-1], codes.shape[-2]), torch.bfloat16)[0]


def matrices_of(files: Files, convention: Convention, owned: set[str]) -> dict[str, Matrix]:
    """Every weight, by name, whose tensors are not `owned` by the experts.

    Raises:
        ValueError: an MXFP4 matrix's scales have a wrong dtype or shape.
    """
    found: dict[str, Matrix] = {}
    taken = set(owned)
    for pair in convention.matrices(files):
        convention.sizes(files, pair, 2)
        found[pair.weight] = Matrix(pair.codes, pair.scales)
        taken |= {pair.codes, pair.scales}
    for name, entry in files.tensors.items():
        stem = name.removesuffix(".weight")
        scales = next((stem + suffix for suffix in _FP8_SCALES if stem + suffix in files.tensors), None)
        if entry.dtype == _FP8 and scales is not None:
            found[name] = Matrix(name, scales)
            taken |= {name, scales}
    return found | {name: Matrix(name) for name in files.tensors if name not in taken}


def _block(files: Files, name: str, scales: tuple[int, ...]) -> tuple[int, ...]:
    """The rows and columns of an FP8 matrix that share a scale."""
    shape = files.tensors[name].shape
    if scales in ((), (1,)):
        return shape
    stated = files.quantization.get("weight_block_size")
    sizes = stated if isinstance(stated, list) and len(stated) == len(shape) else [_BLOCK] * len(shape)
    if len(scales) == len(shape):
        each = zip(shape, scales, sizes, strict=True)
        block = tuple(n if parts == 1 else 1 if parts == n else size for n, parts, size in each)
        if tuple(-(-n // b) for n, b in zip(shape, block, strict=True)) == scales:
            return block
    raise ValueError(f"{files.where(name)} has shape {shape} and scales {scales}; expected blocks of {sizes}")


def _dequantised(codes: Tensor, scales: Tensor, block: tuple[int, ...]) -> Tensor:
    factors = scales.float().reshape([-(-n // b) for n, b in zip(codes.shape, block, strict=True)])
    for axis, (n, b) in enumerate(zip(codes.shape, block, strict=True)):
        factors = factors.repeat_interleave(b, axis).narrow(axis, 0, n)
    return (codes.float() * factors).to(torch.bfloat16)
