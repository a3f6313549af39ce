"""MXWeights: an expert stack's packed MXFP4 weights, validated once, read by the golden model and the kernels alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from mxref.formats import MX_BLOCK_SIZE, MXFP4, Format, decode_blocks, encode_blocks, pack_codes, unpack_codes
from mxref.fragments import from_fragments, to_fragments
from mxref.subnormals import warn_if_flushed

__all__ = ["MXLayout", "MXWeights", "decode_mxfp4", "encode_mxfp4", "stored_as"]

_ELEMENTS_AT_ONCE = 2**19
_ONE_PRODUCT = 128  # the largest byte b whose 2^(b − 1) is a bf16
_ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class MXLayout(IntEnum):
    """How codes and scales are arranged in memory; every layout is a bit-exact permutation of FWD.

    FWD: `packed` [E, N, K/2] and `scales` [E, N, K/32], K contiguous, even k in the low nibble: a checkpoint's.
    FRAGMENTS: the same shapes, whose bytes lie as tensor cores take them, see `mxref.fragments`.
    """

    FWD = 0
    FRAGMENTS = 1


@dataclass(frozen=True, eq=False)
class MXWeights:
    """E expert matrices in MXFP4. Expert e's logical matrix is [K, N]; blocks of 32 run along K.

    Attributes:
        packed: contiguous uint8 [E, N, K/2], two E2M1 codes a byte; [N, K/2] is taken as one expert.
        scales: contiguous uint8 or torch.float8_e8m0fnu [E, N, K/32], E8M0 bytes in plain row order, kept as uint8.
        K: contraction size, a multiple of 32.
        N: output size.
        layout: the memory arrangement, see `MXLayout` and `repack`.
        block_size: 32, the only block size of MXFP4.
        num_experts: E; taken from `packed` when None.
        orig_dtype: the floating-point type that the weights were quantised from (information only).
        scales_to_128: every scale byte is at most 128, so that one exact product decodes a weight in place of two:
            noted by `repack`, and no longer true once a larger byte is written into `scales`.
        format: MXFP4.

    Raises:
        TypeError: a buffer has a dtype other than the above.
        ValueError: a buffer's shape does not fit K, N, E and the block size, a buffer is not contiguous, buffers lie on
            different devices, or the scales are swizzled (padded and tiled for a hardware scaled matrix product).
    """

    format: ClassVar[Format] = MXFP4

    packed: Tensor
    scales: Tensor
    K: int
    N: int
    layout: MXLayout = MXLayout.FWD
    block_size: int = MX_BLOCK_SIZE
    num_experts: int | None = None
    orig_dtype: torch.dtype = torch.bfloat16
    scales_to_128: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", _known_layout(self.layout))
        _check_sizes(self.K, self.N, self.block_size, self.orig_dtype)
        packed, scales = _byte_buffers(self.packed, self.scales)
        E = packed.shape[0] if self.num_experts is None else self.num_experts
        expected = self.format.scales_shape(E, self.N, self.K)
        _check_shape("packed", packed, self.format.packed_shape(E, self.N, self.K), "[E, N, K/2]")
        if scales.shape != expected and _looks_swizzled(scales, E, self.K, self.N):
            raise ValueError(
                f"scales has shape {tuple(scales.shape)}, the size of swizzled (128x4-tiled, padded) scales; MXWeights "
                f"needs plain row order [E, N, K/32] = {expected}: undo the swizzle first"
            )
        _check_shape("scales", scales, expected, "[E, N, K/32]")
        object.__setattr__(self, "packed", packed)
        object.__setattr__(self, "scales", scales)
        object.__setattr__(self, "num_experts", E)

    @property
    def E(self) -> int:
        """Number of experts."""
        return int(self.packed.shape[0])

    @property
    def device(self) -> torch.device:
        """Where both buffers lie."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together: 17/32 byte an element."""
        return self.packed.numel() + self.scales.numel()

    @property
    def stored(self) -> Tensor:
        """How the bytes lie: `layout` and `scales_to_128`, int64 [2] on the CPU, for autograd to save beside them.

        A checkpointed region that is computed again may find other buffers than before, in another layout.
        """
        return stored_as(self.layout, self.scales_to_128)

    @property
    def rebuild(self) -> Callable[[Tensor, Tensor, Tensor], MXWeights]:
        """How to make these weights again from `packed`, `scales` and `stored`: it holds none, so that autograd can."""
        return partial(_rebuilt, self.K, self.N, self.orig_dtype)

    def require_layout(self, layout: MXLayout, reader: str) -> None:
        """Raise a ValueError that names both if the buffers are not arranged as `reader` reads them."""
        if self.layout != layout:
            raise ValueError(
                f"the weights have layout {getattr(self.layout, 'name', self.layout)}; {reader} reads {layout.name}: "
                f"call repack(MXLayout.{layout.name}) first"
            )

    def require_known_layout(self, reader: str) -> None:
        """Raise a ValueError if the buffers are arranged as neither `MXLayout` says."""
        if self.layout != MXLayout.FRAGMENTS:
            self.require_layout(MXLayout.FWD, reader)

    def codes(self) -> Tensor:
        """The E2M1 codes, one a byte: uint8 [E, N, K], whatever the layout."""
        return unpack_codes(self.repack(MXLayout.FWD).packed)

    def repack(self, layout: MXLayout) -> MXWeights:
        """The same weights in another layout, as a copy; themselves if they have it already.

        Every bit of both buffers finds its place, so that going there and back gives the bytes of before. On a GPU this
        waits for it: whether all scale bytes are at most 128 is read once, here.
        """
        if layout == self.layout:
            return self
        self.require_known_layout("repacking")
        packed, scales = torch.empty_like(self.packed), torch.empty_like(self.scales)
        move = to_fragments if layout == MXLayout.FRAGMENTS else from_fragments
        for e in range(self.E):
            packed[e], scales[e] = move(self.packed[e], self.scales[e])
        small = layout == MXLayout.FRAGMENTS and bool((scales <= _ONE_PRODUCT).all())
        return replace(self, packed=packed, scales=scales, layout=layout, scales_to_128=small)

    def select(self, experts: Tensor) -> MXWeights:
        """The given experts' weights, in the given order, as a copy.

        Args:
            experts: integer [a], ids in 0..E−1.

        Raises:
            TypeError: `experts` is no integer tensor.
            ValueError: `experts` is not one-dimensional or, on CPU, an id is out of range.
        """
        if not isinstance(experts, Tensor) or experts.is_floating_point() or experts.dtype == torch.bool:
            kind = experts.dtype if isinstance(experts, Tensor) else type(experts).__name__
            raise TypeError(f"experts is {kind}; expected an integer tensor of expert ids")
        if experts.ndim != 1:
            raise ValueError(f"experts has shape {tuple(experts.shape)}; expected [a], a list of expert ids")
        ids = experts.to(self.device, torch.int64)
        if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.E:
            raise ValueError(f"experts holds ids {int(ids.min())}..{int(ids.max())}; this stack has 0..{self.E - 1}")
        return replace(self, packed=self.packed[ids], scales=self.scales[ids], num_experts=ids.numel())

    def to(self, device: torch.device | str) -> MXWeights:
        """The same weights on another device."""
        return replace(self, packed=self.packed.to(device), scales=self.scales.to(device))

    @classmethod
    def from_gpt_oss(cls, blocks: Tensor, scales: Tensor) -> MXWeights:
        """From a gpt-oss checkpoint's pair: `*_blocks` uint8 [E, N, K/32, 16] and `*_scales` uint8 [E, N, K/32].

        Raises:
            TypeError: a tensor is not uint8.
            ValueError: the shapes are not of this form or do not fit each other.
        """
        if blocks.ndim != 4 or blocks.shape[-1] != MX_BLOCK_SIZE // 2:
            raise ValueError(f"blocks has shape {tuple(blocks.shape)}; expected [E, N, K/32, {MX_BLOCK_SIZE // 2}]")
        E, N, blocks_per_row, _ = blocks.shape
        return cls(blocks.flatten(-2), scales, blocks_per_row * MX_BLOCK_SIZE, N, num_experts=E)

    def to_gpt_oss(self) -> tuple[Tensor, Tensor]:
        """The gpt-oss checkpoint's pair (`*_blocks` [E, N, K/32, 16], `*_scales` [E, N, K/32]), without a copy."""
        self.require_layout(MXLayout.FWD, "a gpt-oss checkpoint")
        return self.packed.view(*self.scales.shape, -1), self.scales

    @classmethod
    def from_torchao(cls, mx: Any) -> MXWeights:
        """From a torchao `MXTensor` [E, N, K] or [N, K] with FP4 elements, sharing its buffers.

        Raises:
            TypeError: `mx` is no MXTensor, or its elements are not torch.float4_e2m1fn_x2.
            ValueError: another block size, swizzled scales, a transposed tensor, or another rank.
        """
        needed = ("qdata", "scale", "elem_dtype", "block_size", "orig_dtype", "is_swizzled_scales")
        if not all(hasattr(mx, attribute) for attribute in needed):
            raise TypeError(f"mx is {type(mx).__name__}; expected a torchao MXTensor")
        if mx.elem_dtype != torch.float4_e2m1fn_x2:
            raise TypeError(f"mx has elements of {mx.elem_dtype}; expected torch.float4_e2m1fn_x2")
        if mx.is_swizzled_scales:
            raise ValueError("mx has swizzled scales (is_swizzled_scales=True); expected plain row order")
        if mx.qdata.ndim not in (2, 3) or not mx.qdata.is_contiguous():
            raise ValueError(
                f"mx has qdata of shape {tuple(mx.qdata.shape)} and strides {mx.qdata.stride()}; expected a contiguous "
                "[E, N, K/2] or [N, K/2]: undo the transposition first"
            )
        N, K = mx.qdata.shape[-2], 2 * mx.qdata.shape[-1]
        return cls(mx.qdata, mx.scale, K, N, block_size=mx.block_size, orig_dtype=mx.orig_dtype)

    def to_torchao(self) -> Any:
        """A torchao `MXTensor` [E, N, K] over the same buffers, with plain scales and emulated arithmetic.

        Raises:
            ModuleNotFoundError: torchao is not installed.
        """
        self.require_layout(MXLayout.FWD, "torchao")
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
        from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

        return MXTensor(
            self.packed,
            self.scales.view(torch.float8_e8m0fnu),
            elem_dtype=torch.float4_e2m1fn_x2,
            block_size=self.block_size,
            orig_dtype=self.orig_dtype,
            kernel_preference=KernelPreference.EMULATED,
            act_quant_kwargs=None,
            is_swizzled_scales=False,
        )


def stored_as(layout: MXLayout, scales_to_128: bool) -> Tensor:
    """`MXWeights.stored` of weights that are stored so; not to be written to."""
    return _STORED[layout, scales_to_128]


_STORED = {
    (layout, small): torch.tensor([layout, small], dtype=torch.int64, device="cpu")
    for layout in MXLayout
    for small in (False, True)
}


def _rebuilt(K: int, N: int, orig_dtype: torch.dtype, packed: Tensor, scales: Tensor, stored: Tensor) -> MXWeights:
    layout, small = stored.tolist()
    return MXWeights(packed, scales, K, N, layout, orig_dtype=orig_dtype, scales_to_128=bool(small))


def decode_mxfp4(weights: MXWeights, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Decode every expert: [E, N, K] of `dtype` (fp64, fp32, bf16, fp16), one rounding, see `decode_blocks`.

    Beside the result, memory holds the temporaries of some rows: about 60 bytes an element, 32 MB in all.

    Raises:
        TypeError: `dtype` is not one of the four.
    """
    warn_if_flushed(weights.device)
    plain = weights.repack(MXLayout.FWD)
    values = torch.empty(plain.E, plain.N, plain.K, dtype=dtype, device=plain.device)
    rows = (torch.split(x.flatten(0, 1), _rows_at_once(plain.K)) for x in (plain.packed, plain.scales, values))
    for packed, scales, decoded in zip(*rows, strict=True):
        decoded.copy_(decode_blocks(unpack_codes(packed), scales, dtype))
    return values


def encode_mxfp4(w: Tensor, scale_mode: str = "floor") -> MXWeights:
    """Quantise an expert stack, some rows of one expert at a time, see `encode_blocks` for the four scale modes.

    Beside the result, memory holds the temporaries of these rows: about 65 bytes an element, 34 MB in all.

    Args:
        w: floating point [E, N, K], or [N, K] for one expert; K a multiple of 32.
        scale_mode: floor, rceil, ceil or even.

    Raises:
        TypeError: `w` is not floating point.
        ValueError: `w` has another rank, or K is no multiple of 32, or `scale_mode` is unknown.
    """
    if w.ndim not in (2, 3):
        raise ValueError(f"w has shape {tuple(w.shape)}; expected [E, N, K] or [N, K]")
    warn_if_flushed(w.device)
    stack = w if w.ndim == 3 else w[None]
    E, N, K = stack.shape
    packed = torch.empty(E, N, K // 2, dtype=torch.uint8, device=w.device)
    scales = torch.empty(E, N, K // MX_BLOCK_SIZE, dtype=torch.uint8, device=w.device)
    count = _rows_at_once(K)
    for e, first in product(range(E), range(0, N, count)):
        some = e, slice(first, first + count)
        codes, scales[some] = encode_blocks(stack[some], scale_mode)
        packed[some] = pack_codes(codes)
    known = w.dtype if w.dtype in _ACTIVATION_DTYPES else torch.bfloat16
    return MXWeights(packed, scales, K, N, orig_dtype=known)


def _rows_at_once(K: int) -> int:
    return max(1, _ELEMENTS_AT_ONCE // max(K, 1))


def _known_layout(layout: MXLayout | int) -> MXLayout:
    try:
        return MXLayout(layout)
    except ValueError:
        names = ", ".join(f"{member.name} = {member.value}" for member in MXLayout)
        raise ValueError(f"layout is {layout!r}; expected one of {names}") from None


def _check_sizes(K: int, N: int, block_size: int, orig_dtype: torch.dtype) -> None:
    for name, size in (("K", K), ("N", N), ("block_size", block_size)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} is {size!r}; expected an integer")
    if block_size != MX_BLOCK_SIZE:
        raise ValueError(f"block_size is {block_size}; {MXFP4.name} has blocks of {MX_BLOCK_SIZE} (16 would be NVFP4)")
    if K < MX_BLOCK_SIZE or K % MX_BLOCK_SIZE:
        raise ValueError(f"K is {K}; expected a positive multiple of the block size {MX_BLOCK_SIZE}")
    if N < 1:
        raise ValueError(f"N is {N}; expected at least 1")
    if orig_dtype not in _ACTIVATION_DTYPES:
        raise TypeError(f"orig_dtype is {orig_dtype}; expected a floating-point dtype: bf16, fp16, fp32 or fp64")


def _byte_buffers(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Both buffers as contiguous uint8 with an expert axis; dtypes whose bytes mean something else are refused."""
    if packed.dtype == getattr(torch, "float4_e2m1fn_x2", None):
        packed = packed.view(torch.uint8)
    if scales.dtype == getattr(torch, "float8_e8m0fnu", None):
        scales = scales.view(torch.uint8)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed is {packed.dtype}; expected torch.uint8, two {MXFP4.element.name} codes a byte")
    if scales.dtype != torch.uint8:
        scale = MXFP4.scale.name
        raise TypeError(f"scales is {scales.dtype}; expected {scale} bytes: torch.uint8 or torch.float8_e8m0fnu")
    if packed.device != scales.device:
        raise ValueError(f"packed lies on {packed.device} and scales on {scales.device}; expected one device")
    if packed.ndim == 2 and scales.ndim == 2:
        packed, scales = packed[None], scales[None]
    for name, x in (("packed", packed), ("scales", scales)):
        if not x.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and strides {x.stride()}; expected contiguous bytes: call "
                f"{name}.contiguous() once, when the weights are made"
            )
    return packed, scales


def _check_shape(name: str, x: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {meaning} = {expected}")


def _looks_swizzled(scales: Tensor, E: int, K: int, N: int) -> bool:
    """Whether the size is that of scales padded to 128 rows × 4 blocks, per expert or over the whole stack."""
    columns = -(-K // (4 * MX_BLOCK_SIZE)) * 4
    rows_each, rows_all = -(-N // 128) * 128 * E, -(-E * N // 128) * 128
    return scales.numel() in (rows_each * columns, rows_all * columns)
