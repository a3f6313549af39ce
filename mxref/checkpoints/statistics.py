"""A packed checkpoint's blocks: scale bytes, and those that are zero, saturated or NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxref.weights import MXWeights

_NAN_BYTE = 255


@dataclass(frozen=True)
class BlockStatistics:
    """One projection's blocks, counted.

    Attributes:
        name: the projection.
        E, N, K: its sizes.
        scale_bytes: how often each byte 0..255 scales a block.
        blocks: E·N·K/32.
        zero: blocks whose 32 codes are all ±0.
        saturated: blocks that hold ±6, the largest code; clipped elements are only there.
        nan: blocks whose scale byte is 255.
    """

    name: str
    E: int
    N: int
    K: int
    scale_bytes: tuple[int, ...]
    blocks: int
    zero: int
    saturated: int
    nan: int

    @classmethod
    def of(cls, name: str, weights: MXWeights) -> BlockStatistics:
        """Count, one expert at a time."""
        scale_bytes = torch.zeros(256, dtype=torch.int64)
        zero = saturated = 0
        for packed, scales in zip(weights.packed, weights.scales, strict=True):
            scale_bytes += torch.bincount(scales.flatten().long(), minlength=256)
            pairs = packed.unflatten(-1, (-1, 16))  # a block's 32 codes in 16 bytes
            zero += int((pairs & 0x77 == 0).all(-1).sum())
            saturated += int(_largest(pairs).any(-1).sum())
        counts = tuple(int(count) for count in scale_bytes)
        return cls(name, weights.E, weights.N, weights.K, counts, sum(counts), zero, saturated, counts[_NAN_BYTE])

    @property
    def byte_range(self) -> tuple[int, int]:
        """The smallest and the largest scale byte in use."""
        used = [byte for byte, count in enumerate(self.scale_bytes) if count]
        return used[0], used[-1]


def _largest(pairs: Tensor) -> Tensor:
    return (pairs & 0x07 == 0x07) | (pairs & 0x70 == 0x70)
