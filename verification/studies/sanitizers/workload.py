"""What the tools watch, one program each: the kernels on the smallest cases, or one planted mistake.

python -m mxref.verification.studies.sanitizers.workload kernels
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import triton

from mxref.kernels.compiled.units import units_of
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.processes import cores
from mxref.verification.candidates.shipped import shipped
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw
from mxref.verification.cases.own import small
from mxref.verification.gate.own.ahead import launches_of, this_gpu, warm_cache
from mxref.verification.gate.plan import plan_cases
from mxref.verification.studies.sanitizers.tools import DONE, UNWATCHED

KERNELS = "kernels"
_COLUMNS = 4096
"""Wider cases are left out: watched, every access costs a hundred."""
_ROWS = 32
"""More rows are left out where the compiler instruments: ptxas needs minutes and 15 GB for their taller tiles."""

_RACE = """
extern "C" __global__ void planted_race(int* y) {
    __shared__ int shared[128];
    shared[threadIdx.x] = threadIdx.x;
    y[threadIdx.x] = shared[(threadIdx.x + 64) % 128];  // of another warp, without a barrier
}
"""
_BEYOND = """
extern "C" __global__ void planted_read(const float* x, float* y) {
    y[threadIdx.x] = x[threadIdx.x + (1 << 20)];  // x has 128 elements
}
"""


def _kernels() -> None:
    """Both passes on every small integer fixture, and on ordinary numbers in each dtype."""
    device = torch.device("cuda")
    candidate, instrumented = shipped(device), bool(triton.knobs.compilation.instrumentation_mode)
    cases = [case for case in _cases() if case.rows <= _ROWS or not instrumented]
    if instrumented:
        _compile(candidate, cases, this_gpu())
    for case in cases:
        print(f"case {case.name}, {case.dtype}", flush=True)
        try:
            candidate.run(draw(case, device))
        except RuntimeError as error:
            if not (instrumented and "PassManager" in str(error)):
                raise
            print(f"{UNWATCHED}{case.name}", flush=True)  # the compiler's pass does not know all products
        torch.cuda.synchronize()


def _compile(candidate: Candidate, cases: Sequence[Case], architecture: str) -> None:
    """Compile what the cases start, side by side: instrumented, a product on tensor cores takes most of a minute."""
    items = plan_cases(cases, torch.device("cuda"), seed=0)
    launches = [("", launch) for item in items for launch in launches_of(candidate, item, architecture)]
    units = units_of(architecture, launches)
    with ProcessPoolExecutor(cores(), get_context("fork")) as pool:
        for _ in pool.map(warm_cache, units):
            print("compiled", flush=True)


def _cases() -> list[Case]:
    cases = [*small.integer_cases("cuda"), *small.drawn_cases("cuda")]
    return [case for case in cases if case.N <= _COLUMNS]


def _race() -> None:
    torch.cuda._compile_kernel(_RACE, "planted_race")(
        (1, 1, 1), (128, 1, 1), (torch.empty(128, dtype=torch.int32, device="cuda"),)
    )


def _beyond() -> None:
    x, y = torch.zeros(128, device="cuda"), torch.empty(128, device="cuda")
    torch.cuda._compile_kernel(_BEYOND, "planted_read")((1, 1, 1), (128, 1, 1), (x, y))


def _uninitialised() -> None:
    torch.empty(128, device="cuda").add_(1)


def _unfinished_copy() -> None:
    from mxref.verification.studies.sanitizers.planted import unfinished_copy

    unfinished_copy(torch.zeros(512, device="cuda"))


WORK: dict[str, Callable[[], None]] = {
    KERNELS: _kernels,
    "race": _race,
    "out of bounds": _beyond,
    "uninitialised": _uninitialised,
    "unfinished copy": _unfinished_copy,
}
"""By name: the kernels, and the mistakes that the tools must find."""


def main(name: str) -> None:
    """Do one of WORK on the GPU."""
    # ConSan keeps its state in memory that it asks for here. The allocator belongs to this thread, so autograd must not
    # use one of its own.
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    with torch.autograd.set_multithreading_enabled(False):
        WORK[name]()
    torch.cuda.synchronize()
    print(DONE, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
