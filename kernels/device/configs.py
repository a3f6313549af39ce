"""Tile shapes: a committed table by architecture and shape class, never tuned at run time.

The choice reads only what the host knows without a synchronisation: the architecture, the activation dtype, and the
mean rows per expert P/E. A caller who needs the same bits at every batch size pins one `Config`; `mxref tune` says what
that costs.

On sm_90 the products of bf16 rows with packed weights have a kernel of their own, `hopper`. It is bound by what crosses
from L2 to a multiprocessor and by the instructions that decode: both fall with the height of a row tile, so the tile is
as tall as the registers allow, and short tiles are only for few rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
import triton

from mxref.fragments import TILE
from mxref.weights import MXLayout

__all__ = ["SHARED_MEMORY", "TABLE", "Config", "config_for", "layout_for", "padded_rank", "reachable_configs"]

HOPPER_HEIGHTS = (16, 64, 256)
FRAGMENT_HEIGHTS = (16, 64, 128)

SHARED_MEMORY = {"interpreter": 1 << 40, "sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
"""Bytes of shared memory that one program may use."""


GLUON_HAS_FRAGMENTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
"""Whether this Triton compiles `hopper_fragments`; an older one reads its layout by the portable kernel."""


@dataclass(frozen=True)
class Config:
    """One tiling of a grouped product.

    Attributes:
        BLOCK_M: routed rows of one expert that a program owns, a power of two, at least 16.
        BLOCK_N: output columns that a program owns, a power of two, at least 32.
        BLOCK_K: elements of the contraction a step takes, a power of two, at least 32; steps run in ascending
            order.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
        hopper: on packed weights use the kernel of `hopper`, for bf16 on sm_90: BLOCK_N 128, BLOCK_K 128, 8 warps, and
            BLOCK_M one of HOPPER_HEIGHTS.
        fragments: on weights in the layout FRAGMENTS use the kernel of `hopper_fragments`, for bf16 on sm_90: BLOCK_N
            32 a warp, BLOCK_K 128, 4 or 8 warps, and BLOCK_M one of FRAGMENT_HEIGHTS.
        max_registers: how many a thread may have at most; None leaves it to the compiler.

    Raises:
        ValueError: a field is not a power of two or below its minimum, or not what `hopper` or `fragments` needs.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3
    hopper: bool = False
    fragments: bool = False
    max_registers: int | None = None

    def __post_init__(self) -> None:
        for name, minimum in (("BLOCK_M", 16), ("BLOCK_N", 32), ("BLOCK_K", 32), ("num_warps", 1)):
            value = getattr(self, name)
            if value < minimum or value & (value - 1):
                raise ValueError(f"config.{name} is {value}; expected a power of two, at least {minimum}")
        if self.num_stages < 1:
            raise ValueError(f"config.num_stages is {self.num_stages}; expected at least 1")
        if self.hopper:
            shape = (self.BLOCK_N, self.BLOCK_K, self.num_warps)
            if shape != (128, 128, 8) or self.BLOCK_M not in HOPPER_HEIGHTS or self.num_stages < 2:
                raise ValueError(
                    f"config {self} is for hopper, which has BLOCK_N 128, BLOCK_K 128, 8 warps, at least 2 stages, and "
                    f"BLOCK_M one of {', '.join(map(str, HOPPER_HEIGHTS))}"
                )
        if self.fragments:
            shape = (self.BLOCK_N, self.BLOCK_K, self.hopper)
            fits = self.BLOCK_M in FRAGMENT_HEIGHTS and self.num_warps in (4, 8) and self.num_stages > 2
            if shape != (32 * self.num_warps, 128, False) or not fits:
                raise ValueError(
                    f"config {self} is for fragments, which has BLOCK_N 32 a warp, BLOCK_K 128, 4 or 8 warps, at least "
                    f"3 stages, and BLOCK_M one of {', '.join(map(str, FRAGMENT_HEIGHTS))}"
                )

    @property
    def layout(self) -> MXLayout | None:
        """The layout of packed weights that it is for; None reads any."""
        return MXLayout.FWD if self.hopper else MXLayout.FRAGMENTS if self.fragments else None

    @cached_property
    def fused(self) -> bool:
        """Whether packed weights are decoded, and rows gathered, in the products alone."""
        return self.hopper or self.fragments

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Made once, since every launch is looked up by its tiling. None would hash otherwise in another process."""
        shape = self.BLOCK_M, self.BLOCK_N, self.BLOCK_K, self.num_warps, self.num_stages
        return hash((*shape, self.hopper, self.fragments, self.max_registers or 0))

    def dense(self) -> Config:
        """The tiling of products with dense matrices beside this one: itself, unless it is for packed weights only."""
        return _dense(self) if self.fused else self

    def projection(self, rank: int) -> Config:
        """The tiling of Z and V beside this one's Y and D: the same row tiles and steps, one block of columns."""
        return _projection(self.dense(), rank)

    def outer(self) -> Config:
        """The tiling of dA and dB beside this one's Y and D; BLOCK_M gives way to the padded rank."""
        tiling = self.dense()
        return replace(tiling, BLOCK_N=min(tiling.BLOCK_N, 64), num_warps=4)

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of shared memory for the operand tiles of every pipeline stage: the account of a dense product.

        `hopper` holds packed bytes in the weights' place, an iteration's scales, an adapter's rows of rank 16, and a
        barrier a stage; `fragments` the scales of every stage.
        """
        if self.fragments:
            tiles = self.BLOCK_N * self.BLOCK_K * 17 // 32
            ring = self.num_stages * (self.BLOCK_M * dtype.itemsize * self.BLOCK_K + tiles)
            return ring + self.BLOCK_M * 16 * dtype.itemsize + self.num_stages * 8
        if self.hopper:
            ring = self.num_stages * (self.BLOCK_M * dtype.itemsize + self.BLOCK_N // 2) * self.BLOCK_K
            return ring + 2048 + self.BLOCK_M * 16 * dtype.itemsize + self.num_stages * 8
        return self.num_stages * (self.BLOCK_M + self.BLOCK_N) * self.BLOCK_K * dtype.itemsize

    def check_fits(self, architecture: str, dtype: torch.dtype) -> None:
        """Raise a ValueError if the account exceeds what `architecture` has, or the kernel is for another chip."""
        if self.fused and (architecture, dtype) != ("sm_90", torch.bfloat16):
            raise ValueError(f"config {self} is for bf16 on sm_90; these operands are {dtype} on {architecture}")
        needed, available = self.shared_bytes(dtype), SHARED_MEMORY[architecture]
        if needed > available:
            raise ValueError(
                f"config {self} needs {needed} bytes of shared memory for {dtype}, {architecture} has {available}; "
                "use smaller blocks or fewer stages"
            )


_INTERPRETER = Config(32, 128, 64, num_stages=1)

TABLE: dict[str, dict[str, Config]] = {
    "interpreter": dict.fromkeys(("thin", "medium", "thick", "fp32"), _INTERPRETER),
    "sm_80": {
        "thin": Config(16, 64, 64, num_warps=4, num_stages=4),
        "medium": Config(64, 64, 64, num_warps=4, num_stages=3),
        "thick": Config(128, 64, 64, num_warps=8, num_stages=3),
        "fp32": Config(32, 32, 32, num_warps=4, num_stages=1),
    },
    "sm_90": {
        "thin": Config(16, 128, 128, num_warps=8, num_stages=3, hopper=True),
        "medium": Config(64, 128, 128, num_warps=8, num_stages=3, hopper=True),
        "thick": Config(256, 128, 128, num_warps=8, num_stages=3, hopper=True),
        "fragments thin": Config(16, 128, 128, num_warps=4, num_stages=4, fragments=True),
        "fragments medium": Config(64, 256, 128, num_warps=8, num_stages=3, fragments=True, max_registers=128),
        "fragments thick": Config(128, 256, 128, num_warps=8, num_stages=3, fragments=True),
        "fp16 thin": Config(16, 64, 64, num_warps=4, num_stages=4),
        "fp16 medium": Config(64, 128, 64, num_warps=4, num_stages=3),
        "fp16 thick": Config(128, 128, 64, num_warps=8, num_stages=3),
        "fp32": Config(32, 32, 32, num_warps=4, num_stages=1),
    },
    "sm_100": {
        "thin": Config(16, 64, 64, num_warps=4, num_stages=4),
        "medium": Config(64, 128, 64, num_warps=4, num_stages=3),
        "thick": Config(128, 128, 64, num_warps=8, num_stages=3),
        "fp32": Config(32, 32, 32, num_warps=4, num_stages=1),
    },
}
"""architecture -> shape class -> tiling. Classes: mean rows per expert up to 16, up to 96, above; fp32 apart, and fp16
and weights in the layout FRAGMENTS where they need another kernel than bf16 and FWD."""


def shape_class(rows: int, experts: int, dtype: torch.dtype) -> str:
    """The class of P routed rows over E experts, see TABLE."""
    if dtype == torch.float32:
        return "fp32"
    if rows <= 16 * experts:
        return "thin"
    return "medium" if rows <= 96 * experts else "thick"


def config_for(
    architecture: str, rows: int, experts: int, dtype: torch.dtype, layout: MXLayout = MXLayout.FWD
) -> Config:
    """The committed tiling for P routed rows over E experts with activations of `dtype` and weights in `layout`."""
    return _row(architecture, shape_class(rows, experts, dtype), dtype, layout)


def reachable_configs(
    architecture: str, dtype: torch.dtype = torch.bfloat16, layout: MXLayout = MXLayout.FWD
) -> list[Config]:
    """Every tiling that `config_for` can return, without repetition: what a gate has to run."""
    classes = ("fp32",) if dtype == torch.float32 else ("thin", "medium", "thick")
    return list(dict.fromkeys(_row(architecture, name, dtype, layout) for name in classes))


def layout_for(architecture: str, dtype: torch.dtype, N: int) -> MXLayout:
    """The layout in which `MXWeights.repack` should bring weights of N rows, for activations of `dtype`."""
    own_kernel = architecture == "sm_90" and dtype == torch.bfloat16 and N % TILE == 0
    return MXLayout.FRAGMENTS if own_kernel and GLUON_HAS_FRAGMENTS else MXLayout.FWD


def _row(architecture: str, name: str, dtype: torch.dtype, layout: MXLayout) -> Config:
    table, prefix = TABLE[architecture], ""
    if dtype == torch.float16:
        prefix = "fp16 "
    elif layout == MXLayout.FRAGMENTS and GLUON_HAS_FRAGMENTS:
        prefix = "fragments "
    config = table.get(prefix + name, table[name])
    return config if config.layout in (None, layout) else config.dense()


@cache
def _dense(config: Config) -> Config:
    return Config(min(config.BLOCK_M, 128), 128, 64, num_warps=8 if config.BLOCK_M > 64 else 4)


@cache
def _projection(tiling: Config, rank: int) -> Config:
    return replace(tiling, BLOCK_N=max(32, padded_rank(rank)))


def padded_rank(rank: int) -> int:
    """The block that holds a LoRA rank: a power of two, at least 16, tensor cores' smallest contraction."""
    return max(16, int(triton.next_power_of_2(rank)))
