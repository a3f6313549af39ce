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

rows, ordered, N, compiles = json.loads(sys.argv[1])
E, K, k = 2, 96, 1 if ordered else 2
codes, scales = (torch.empty(E, N, K // d, dtype=torch.uint8, device="meta") for d in (2, 32))
x = torch.empty(rows // k, K, dtype=torch.bfloat16, device="meta", requires_grad=True)
ids, offsets = (torch.empty(n, dtype=torch.int64, device="meta") for n in (rows, E))
with recording("sm_90") as recorder:
    weights = MXWeights(codes, scales, K, N)
    y = parallel_linear_lora(x, weights, k, ids, ids, offsets, grouped_in=ordered, grouped_out=ordered)
    y.backward(torch.empty_like(y))
products = []
for launch in recorder.launches:
    if "rows_box" in launch.arguments:
        box = launch.arguments["rows_box"]
        seen = box and [list(box.shape), list(box.strides), box.block_shape, box.base is launch.arguments["rows_in"]]
        products.append(["hopper", seen])
    elif launch.kernel.fn.__name__ == "grouped_matmul_kernel":
        products.append(["portable", None])
    if compiles:
        aot.compile_unit(aot.Unit.of("sm_90", "", launch))
print(json.dumps(products))
"""


def products(rows: int, ordered: bool, N: int = 192, compiles: bool = False) -> list[list[object]]:
    """The forward product and dX of two experts: which kernel, and the box's shape, strides, block and whether it is of
    the rows."""
    done = run_python("-c", STEP, json.dumps([rows, ordered, N, compiles]))
    assert done.returncode == 0, done.stderr[-2000:]
    return [list(product) for product in json.loads(done.stdout)]


def test_tall_tiles_of_ordered_rows_are_fetched_as_boxes() -> None:
    assert products(600, ordered=True) == [
        ["hopper", [[600, 96], [96, 1], [256, 64], True]],
        ["hopper", [[600, 192], [192, 1], [256, 64], True]],
    ]


@pytest.mark.parametrize(("rows", "ordered", "count"), [(600, False, 2), (64, True, 2), (0, True, 0)])
def test_gathered_rows_few_rows_and_no_rows_are_not(rows: int, ordered: bool, count: int) -> None:
    assert products(rows, ordered) == [["hopper", None]] * count


def test_rows_of_no_multiple_of_sixteen_bytes_take_the_portable_kernel() -> None:
    """In dX, whose rows are N long; and both compile."""
    (forward, dx) = products(600, ordered=True, N=162, compiles=True)
    assert (forward[0], dx[0]) == ("hopper", "portable")
