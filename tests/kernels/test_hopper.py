"""What the host hands to the kernel for Hopper, seen in recorded launches; the kernel itself is judged on a GPU."""

from __future__ import annotations

import json

import pytest
from uninterpreted import run_python

STEP = """
import json, sys, torch
from mxref import MXWeights
from mxref.kernels import parallel_linear_lora
from mxref.verification.studies.compiled import ahead_of_time as aot
from mxref.kernels.device.launch import recording


def products(rows, ordered, N=192, compiles=False):
    E, K, k = 2, 96, 1 if ordered else 2
    codes, scales = (torch.empty(E, N, K // d, dtype=torch.uint8, device="meta") for d in (2, 32))
    x = torch.empty(rows // k, K, dtype=torch.bfloat16, device="meta", requires_grad=True)
    ids, offsets = (torch.empty(n, dtype=torch.int64, device="meta") for n in (rows, E))
    with recording("sm_90") as recorder:
        weights = MXWeights(codes, scales, K, N)
        y = parallel_linear_lora(x, weights, k, ids, ids, offsets, grouped_in=ordered, grouped_out=ordered)
        y.backward(torch.empty_like(y))
    for launch in recorder.launches:
        if compiles:
            aot.compile_unit(aot.Unit.of("sm_90", "", launch))
        if "rows_box" in launch.arguments:
            box, rows_in = launch.arguments["rows_box"], launch.arguments["rows_in"]
            seen = box and [list(box.shape), list(box.strides), box.block_shape, box.base is rows_in]
            yield "hopper", seen
        elif launch.kernel.fn.__name__ == "grouped_matmul_kernel":
            yield "portable", None


print(json.dumps([list(products(*case)) for case in json.loads(sys.argv[1])]))
"""

Given = tuple[int, bool, int, bool]
"""Rows, whether they are in expert order, N, and whether all launches are to be compiled."""
TALL, GATHERED, FEW, NONE, ODD = CASES = [
    (600, True, 192, False), (600, False, 192, False), (64, True, 192, False), (0, True, 192, False),
    (600, True, 162, True),
]  # fmt: skip


@pytest.fixture(scope="module")
def products() -> dict[Given, list[list[object]]]:
    """The forward product and dX of two experts: which kernel, and the box's shape, strides, block and whether it is of
    the rows."""
    done = run_python("-c", STEP, json.dumps(CASES))
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


def test_tall_tiles_of_ordered_rows_are_fetched_as_boxes(products: dict[Given, list[list[object]]]) -> None:
    assert products[TALL] == [
        ["hopper", [[600, 96], [96, 1], [256, 64], True]],
        ["hopper", [[600, 192], [192, 1], [256, 64], True]],
    ]


@pytest.mark.parametrize(("case", "count"), [(GATHERED, 2), (FEW, 2), (NONE, 0)])
def test_gathered_rows_few_rows_and_no_rows_are_not(
    products: dict[Given, list[list[object]]], case: Given, count: int
) -> None:
    assert products[case] == [["hopper", None]] * count


def test_rows_of_no_multiple_of_sixteen_bytes_take_the_portable_kernel(
    products: dict[Given, list[list[object]]],
) -> None:
    """In dX, whose rows are N long; and both compile."""
    (forward, dx) = products[ODD]
    assert (forward[0], dx[0]) == ("hopper", "portable")
