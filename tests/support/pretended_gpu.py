"""The layer on a GPU that is not there: kernels compile for sm_90 and never run, so that what the host does shows.

Tensors lie on the CPU and their values mean nothing. TRITON_INTERPRET must not be set. As a command it times eager
steps in processor time: python tests/support/pretended_gpu.py.
"""

from __future__ import annotations

import re
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from mxref.kernels import parallel_linear_lora
from mxref.kernels.compiled import threads
from mxref.kernels.device import dequant
from mxref.kernels.layer import activation, operands, plan
from mxref.weights import MXLayout, MXWeights

STARTED: list[str] = []
"""Names of the kernels that were started, each with the number of its code: "combine_kernel 3"."""


class _Utilities:
    _loaded = 0

    def load_binary(self, name: str, *_: Any) -> tuple[str, str, int, int, int]:
        self._loaded += 1
        return name, f"{name} {self._loaded}", 0, 0, 1024

    def get_device_properties(self, _: Any) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}


class _Launcher:
    """In the place of Triton's launcher of one compiled kernel."""

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, *arguments: Any) -> None:
        STARTED.append(arguments[4])
        metadata, enter, _ = arguments[6:9]
        if enter is not None:
            enter(metadata)


class Driver:
    """Triton's driver of the pretended GPU. The current device is None, the index of the CPU's tensors."""

    utils = _Utilities()
    launcher_cls = _Launcher

    def get_current_device(self) -> None:
        return None

    def get_current_stream(self, _: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def pretend() -> None:
    """From here on Triton and the layer find the GPU, and kernels are compiled `without_code`."""
    without_code()
    triton.runtime.driver.set_active(Driver())
    for module in (activation, operands, plan, dequant, threads):
        module.architecture = lambda _: "sm_90"  # type: ignore[attr-defined]


def without_code() -> None:
    """From here on kernels are compiled as far as Triton's own IR: who runs none needs no code of theirs."""

    def instead(*given: Any) -> tuple[str, str] | None:
        if not given:  # asked what makes a kernel in the cache another one
            return "without code", "without code"
        stages = given[1]
        stages["llir"], stages["ptx"] = _described, lambda llir, _: llir
        stages["cubin"] = lambda ptx, _: ptx.encode()
        return None

    triton.knobs.runtime.add_stages_inspection_hook = instead


def _described(module: Any, metadata: dict[str, Any]) -> str:
    """What code generation would note of a kernel."""
    [metadata["name"]] = re.findall(r"tt.func public @(\w+)", str(module))
    metadata |= {"shared": 0, "tmem_size": 0, "global_scratch_size": 0, "global_scratch_align": 1}
    metadata |= {"profile_scratch_size": 0, "profile_scratch_align": 1}
    return str(metadata["name"])


def started(call: Any) -> list[str]:
    """Names of the kernels that a call starts."""
    STARTED.clear()
    call()
    return [name.split()[0] for name in STARTED]


@dataclass
class Step:
    """One eager training step, forward and backward, whose gradients were None before it."""

    E: int = 256
    K: int = 2048
    N: int = 1024
    M: int = 256
    k: int = 8
    r: int = 16
    gates: bool = False
    layout: MXLayout = MXLayout.FWD

    def __post_init__(self) -> None:
        E, K, N, M, k, r, bf16 = self.E, self.K, self.N, self.M, self.k, self.r, torch.bfloat16
        codes, scales = (torch.empty(E, N, K // d, dtype=torch.uint8) for d in (2, 32))
        self.weights = MXWeights(codes, scales, K, N, self.layout)
        self.routing = [torch.empty(n, dtype=torch.int64) for n in (M * k, M * k, E)]
        shapes = [(M, K), (E * r, K), (N, E * r), (M, k)][: 4 if self.gates else 3]
        self.leaves = [torch.empty(shape, dtype=bf16).requires_grad_() for shape in shapes]
        self.grad_out = torch.empty(M if self.gates else M * k, N, dtype=bf16)

    def __call__(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        x, A, B, *gates = self.leaves
        y = parallel_linear_lora(x, self.weights, self.k, *self.routing, A, B, 2.0, None, *gates)
        y.backward(self.grad_out)


def _main() -> None:
    pretend()
    torch.set_num_threads(1)
    step, times = Step(), []
    print(", ".join(started(step)))
    for _ in range(20):
        begin = time.thread_time()
        for _ in range(50):
            step()
        times.append((time.thread_time() - begin) / 50 * 1e6)
    print(f"{min(times):.0f} µs of processor time a step at least, {statistics.median(times):.0f} in the median")


if __name__ == "__main__":
    _main()
