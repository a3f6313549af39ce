"""A planted mistake that Triton's concurrency sanitizer must find, in Gluon, which leaves waiting to its author."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy


@gluon.jit
def planted_copy(x, y):
    """Copies 512 elements through shared memory and reads them before they have arrived."""
    rows: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    places = gl.arange(0, 512, layout=rows)
    shared = gl.allocate_shared_memory(gl.float32, [512], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    async_copy.async_copy_global_to_shared(shared, x + places)
    async_copy.commit_group()
    gl.store(y + places, shared.load(rows))
    async_copy.wait_group(0)


def unfinished_copy(x: Tensor) -> Tensor:
    """Runs it on 512 fp32 elements on a GPU."""
    y = torch.empty_like(x)
    planted_copy[(1,)](x, y, num_warps=4)
    return y
