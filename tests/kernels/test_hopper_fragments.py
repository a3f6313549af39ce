"""The Hopper kernel for the layout FRAGMENTS: its own source on NumPy, and what the host hands to it."""

from __future__ import annotations

import json
from typing import Any

import gluon_on_numpy as on_numpy
import numpy as np
import pytest
import torch
from uninterpreted import run_python

from mxref.kernels import Config, parallel_linear_lora
from mxref.kernels.device.hopper_fragments import FRAGMENT_HEIGHTS, fragments_matmul_kernel, half_left
from mxref.kernels.device.hopper_unpack import unpack_tile
from mxref.routing import flatten_sort_count
from mxref.weights import MXLayout, MXWeights, decode_mxfp4


def stack(E: int, N: int, K: int, largest: int, least: int = 0, seed: int = 0) -> MXWeights:
    """Random codes, and scale bytes from `least` to `largest`."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (E, N, K // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(least, largest + 1, (E, N, K // 32), generator=generator).to(torch.uint8)
    return MXWeights(packed, scales, K, N)


@pytest.mark.parametrize("transposed", [False, True], ids=["Y", "D"])
@pytest.mark.parametrize("largest", [128, 255])
def test_every_code_with_every_scale_is_decoded_to_the_bit(largest: int, transposed: bool) -> None:
    """One tile a warp: 4 warps hold 128 rows of one 32-block, or 128 columns of one group of 32 rows."""
    rows, columns = (32, 128) if transposed else (128, 32)
    for seed in range(8):
        weights = stack(1, rows, columns, largest, seed=seed)
        weights.scales.view(-1)[:] = torch.arange(seed * 128, seed * 128 + 128) % (largest + 1)
        fragments = weights.repack(MXLayout.FRAGMENTS)
        assert fragments.scales_to_128 == (int(weights.scales.max()) <= 128)
        codes, scales = (x.numpy().reshape(-1).view(np.uint32) for x in (fragments.packed, fragments.scales))
        found = on_numpy.function(unpack_tile)(
            on_numpy.Shared(codes.reshape(1, 4, 128)), on_numpy.Shared(scales.reshape(1, 4, 8)), None, transposed,
            largest == 128, 1,
        )  # fmt: skip
        m = np.arange(128)
        f, warp, h, g = m // 64, m // 16 % 4, m // 8 % 2, m % 8
        column = 32 * warp + 16 * (g // 4) + 8 * f + 2 * (g % 4) + h
        W = decode_mxfp4(weights, torch.bfloat16)[0].float().numpy()
        expected = (W.T if transposed else W)[column]
        nan = np.isnan(expected)
        assert (np.isnan(found) == nan).all()
        assert (found.view(np.uint32) == expected.view(np.uint32))[~nan].all()


def product(
    weights: MXWeights,
    transposed: bool,
    BLOCK_M: int,
    WARPS: int,
    gathered: bool,
    lora: bool,
    boxes: bool = False,
    STAGES: int = 3,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's result, and the exact one, of rows of small integers; the last rows are a sentinel's."""
    E, N, K = weights.E, weights.N, weights.K
    C, J = (N, K) if transposed else (K, N)
    generator = torch.Generator().manual_seed(1)
    counts = [BLOCK_M + 3, 0, 17][:E]
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = torch.cat([ids, torch.full((2,), E)])
    if gathered:
        ids = ids[torch.randperm(ids.numel(), generator=generator)]
    _, positions, offsets = flatten_sort_count(ids[:, None], E)
    P, fan = ids.numel(), 1 if gathered else None
    x = torch.randint(-1, 2, (P, C), generator=generator).to(torch.bfloat16)
    x[:, torch.randperm(C, generator=generator)[8:]] = 0
    ends = [*offsets.tolist(), P]
    groups = enumerate(zip([0, *ends[:-1]], ends, strict=True))
    tiles = [(e, b, min(b + BLOCK_M, end)) for e, (begin, end) in groups for b in range(begin, end, BLOCK_M)]
    tiles.append((0, 0, 0))
    low = torch.randint(-1, 2, (P, 4), generator=generator).to(torch.bfloat16) if lora else None
    factor = torch.randint(-1, 2, (E, 4, J), generator=generator).to(torch.bfloat16) if lora else None
    bias = torch.randint(-4, 5, (E, J), generator=generator).to(torch.bfloat16) if lora else None
    out = torch.full((P, J), torch.nan)
    fragments = weights.repack(MXLayout.FRAGMENTS)
    on_numpy.run(
        fragments_matmul_kernel, len(tiles) * -(-J // (32 * WARPS)), out=out, rows_in=x,
        rows_box=on_numpy.Box(x, (BLOCK_M, 64)) if boxes else None,
        packed=fragments.packed, scales=fragments.scales, low=low, factor=factor, bias=bias, positions=positions,
        tiles=torch.tensor(tiles, dtype=torch.int32), P=P, E=E, C=C, J=J, RANK=4, s=0.5, fan_in=fan, fan_out=fan,
        stride_fe=4 * J, stride_fr=J, stride_fj=1, TRANSPOSED=transposed, EVEN=C % 128 == 0,
        ONE_MULTIPLY=fragments.scales_to_128,
        HALF_LEFT=half_left(J, Config(BLOCK_M, 32 * WARPS, 128, WARPS, STAGES, fragments=True)),
        HEIGHTS=FRAGMENT_HEIGHTS[BLOCK_M], BLOCK_R=16, STAGES=STAGES, WARPS=WARPS,
    )  # fmt: skip
    W = decode_mxfp4(weights, torch.bfloat16).double()
    expected = torch.zeros(P, J, dtype=torch.float64)
    for e, begin, end in tiles:
        if e == E:
            continue
        rows = torch.arange(begin, end)
        at = positions[rows] if gathered else rows
        y = x[at].double() @ (W[e] if transposed else W[e].T)
        if lora:
            assert low is not None
            assert factor is not None
            assert bias is not None
            y += 0.5 * low[rows].double() @ factor[e].double() + bias[e].double()
        expected[at] = y
    return out, expected.to(torch.bfloat16).float()


CASES: dict[str, dict[str, Any]] = {
    "thin Y": {"transposed": False, "BLOCK_M": 16, "WARPS": 4, "gathered": True, "lora": True, "STAGES": 4},
    "thin D": {"transposed": True, "BLOCK_M": 16, "WARPS": 4, "gathered": True, "lora": True, "STAGES": 4},
    "medium Y": {"transposed": False, "BLOCK_M": 64, "WARPS": 8, "gathered": False, "lora": False},
    "medium D": {"transposed": True, "BLOCK_M": 64, "WARPS": 8, "gathered": False, "lora": False},
    "thick Y": {"transposed": False, "BLOCK_M": 128, "WARPS": 8, "gathered": True, "lora": True},
    "thick D": {"transposed": True, "BLOCK_M": 128, "WARPS": 8, "gathered": True, "lora": False},
    "boxes Y": {"transposed": False, "BLOCK_M": 128, "WARPS": 8, "gathered": False, "lora": False, "boxes": True},
    "boxes D": {"transposed": True, "BLOCK_M": 128, "WARPS": 8, "gathered": False, "lora": True, "boxes": True},
}


@pytest.mark.parametrize("sizes", [(160, 96), (128, 512), (288, 288)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_products_are_exact(case: str, sizes: tuple[int, int]) -> None:
    """Fewer tiles than an iteration takes, whole iterations through the ring more than once, and a last one in part."""
    N, K = sizes
    found, expected = product(stack(3, N, K, 129, 126), **CASES[case])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("gated", [True, False])
def test_the_portable_kernel_reads_the_layout_to_the_bit(gated: bool) -> None:
    """Forward, and dX whether or not its decoding may be a kernel of its own."""
    E, M, k, N, K, r = 3, 7, 2, 96, 160, 4
    weights = stack(E, N, K, 135, 110)
    generator = torch.Generator().manual_seed(2)
    routing = flatten_sort_count(torch.randint(0, E, (M, k), generator=generator), E)
    A, B, gates = (torch.randn(*shape, generator=generator) for shape in ((E * r, K), (N, E * r), (M, k)))
    results = []
    for w in (weights, weights.repack(MXLayout.FRAGMENTS)):
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(3)).requires_grad_()
        y = parallel_linear_lora(x, w, k, *routing, A, B, 0.5, None, gates if gated else None, use_fused_dX=gated)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_tiling_for_the_other_layout_is_refused() -> None:
    weights = stack(1, 32, 32, 128)
    routing, x = flatten_sort_count(torch.zeros(2, 1, dtype=torch.int64), 1), torch.ones(2, 32)
    for w, config in (
        (weights, Config(16, 128, 128, num_warps=4, fragments=True)),
        (weights.repack(MXLayout.FRAGMENTS), Config(16, 128, 128, num_warps=8, hopper=True)),
    ):
        with pytest.raises(
            ValueError, match=r"is for weights in the layout (FRAGMENTS; these have FWD|FWD; these have FR)"
        ):
            parallel_linear_lora(x, w, 1, *routing, config=config)


STEPS = """
import json, sys, torch
from mxref import MXLayout, MXWeights
from mxref.kernels import parallel_linear_lora
from mxref.kernels.device.launch import recording


def products(rows, ordered, small, N=192, E=2, K=96):
    k = 1 if ordered else 2
    codes, scales = (torch.empty(E, N, K // d, dtype=torch.uint8, device="meta") for d in (2, 32))
    x = torch.empty(rows // k, K, dtype=torch.bfloat16, device="meta", requires_grad=True)
    ids, offsets = (torch.empty(n, dtype=torch.int64, device="meta") for n in (rows, E))
    with recording("sm_90") as recorder:
        weights = MXWeights(codes, scales, K, N, MXLayout.FRAGMENTS, scales_to_128=small)
        y = parallel_linear_lora(x, weights, k, ids, ids, offsets, grouped_in=ordered, grouped_out=ordered)
        y.backward(torch.empty_like(y))
    for launch in recorder.launches:
        given, name = launch.arguments, launch.kernel.fn.__name__
        if name == "fragments_matmul_kernel":
            box, limit = given["rows_box"] and given["rows_box"].block_shape, launch.options.get("maxnreg")
            yield (
                given["TRANSPOSED"], given["ONE_MULTIPLY"], given["HALF_LEFT"], given["WARPS"], given["HEIGHTS"][0],
                box, limit,
            )  # fmt: skip
        elif name == "grouped_matmul_kernel":
            yield name


print(json.dumps([list(products(*case)) for case in json.loads(sys.argv[1])]))
"""


def test_what_the_host_hands_over() -> None:
    """Of Y and dX of two experts on a recorded sm_90, in one process, where plans and launches are kept."""
    cases = [(600, True, True), (600, True, False), (16, False, False), (64, False, True)]
    done = run_python("-c", STEPS, json.dumps(cases))
    assert done.returncode == 0, done.stderr[-2000:]
    box = [128, 64]
    assert json.loads(done.stdout) == [
        [[False, True, False, 8, 128, box, None], [True, True, True, 8, 128, box, None]],
        [[False, False, False, 8, 128, box, None], [True, False, True, 8, 128, box, None]],
        [[False, False, False, 4, 16, None, None], [True, False, False, 4, 16, None, None]],
        [[False, True, False, 8, 64, None, 128], [True, True, False, 8, 64, None, 128]],
    ]


def test_stacks_of_partial_tiles_are_refused() -> None:
    weights = stack(1, 40, 32, 128).repack(MXLayout.FRAGMENTS)
    routing = flatten_sort_count(torch.zeros(2, 1, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"N = 40 in the layout FRAGMENTS, .* call repack\(MXLayout.FWD\)"):
        parallel_linear_lora(torch.ones(2, 32), weights, 1, *routing)
