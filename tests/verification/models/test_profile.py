"""Kernels by kind: told by their names, by the part that launched them, and by the part whose gradient they compute."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch._C._autograd import DeviceType

import mxref.kernels.device
from mxref.verification.models.profile import ELSE, KINDS, shares

KERNELS = Path(mxref.kernels.device.__file__).resolve().parents[1]
NODE = "autograd::engine::evaluate_function: MulBackward0"


@dataclass
class Kernel:
    name: str
    duration: float


@dataclass
class Range:
    start: float
    elapsed: float = 0.0

    def elapsed_us(self) -> float:
        return self.elapsed


@dataclass
class Event:
    """What is read of torch's FunctionEvent."""

    name: str
    start: float
    cpu_parent: Event | None = None
    kernels: list[Kernel] = field(default_factory=list)
    sequence_nr: int = -1
    thread: int = 1
    fwd_thread: int = 0
    scope: int = 0
    device_type: Any = DeviceType.CPU
    elapsed: float = 0.0

    @property
    def time_range(self) -> Range:
        return Range(self.start, self.elapsed)

    @property
    def is_user_annotation(self) -> bool:
        return self.name.startswith(("mxref: ", "Optimizer."))


def on_device(name: str, microseconds: float) -> Event:
    return Event(name, 0.0, device_type=DeviceType.CUDA, elapsed=microseconds)


def test_a_kernel_belongs_to_the_part_that_launched_it() -> None:
    attention, optimiser = Event("mxref: attention", 0), Event("Optimizer.step#AdamW.step", 9)
    block = Event("mxref: block", 2)
    experts = Event("mxref: experts", 3, block)
    found = shares(
        [
            attention, block, experts, optimiser,
            Event("aten::softmax", 1, attention, [Kernel("softmax_warp_forward", 1e6)]),
            Event("aten::mul", 4, experts, [Kernel("vectorized_elementwise_kernel", 2e6)]),
            Event("aten::_grouped_mm", 5, experts, [Kernel("void cutlass::device_kernel<Gemm>", 3e6)]),
            Event("mxref::linear", 6, experts, [Kernel("packed_matmul_kernel", 4e6), Kernel("tables_kernel", 5e6)]),
            Event("aten::topk", 7, block, [Kernel("gatherTopK", 6e6)]),
            Event("aten::_fused_adamw_", 10, optimiser, [Kernel("multi_tensor_apply_kernel", 7e6)]),
            Event("aten::mm", 11, None, [Kernel("nvjet_tst_128x256", 8e6)]),
        ],
        on_device=True,
    )  # fmt: skip
    assert found == {
        "total": 36.0,
        "our products": 4.0,
        "our other kernels": 5.0,
        "others' products of the experts": 3.0,
        "self-attention": 1.0,
        "elementwise of the block": 8.0,
        "optimiser": 7.0,
        ELSE: 8.0,
    }


def test_a_gradient_s_kernel_belongs_to_the_part_that_made_the_node() -> None:
    attention = Event("mxref: attention", 0)
    forward = [
        attention,
        Event("aten::view", 1, None, sequence_nr=7),  # makes no node: the next one's number
        Event("aten::mul", 2, attention, sequence_nr=7),
        Event("aten::add", 3, None, sequence_nr=8),
    ]
    of_attention = Event(NODE, 10, None, sequence_nr=7, thread=2, fwd_thread=1)
    of_nothing = Event(NODE, 12, None, sequence_nr=8, thread=2, fwd_thread=1)
    again = Event("mxref: experts", 13, of_nothing, thread=2)
    backward = [
        of_attention,
        of_nothing,
        again,
        Event("MulBackward0", 10, of_attention, [Kernel("a", 1e6)], 7, 2, 1, scope=1),
        Event("AddBackward0", 12, of_nothing, [Kernel("b", 2e6)], 8, 2, 1, scope=1),
        Event("aten::mul", 14, again, [Kernel("c", 4e6)], 7, thread=2),  # recomputed, with a number of its own thread
    ]
    found = shares([*forward, *backward], on_device=True)
    assert (found["self-attention"], found[ELSE], found["elementwise of the block"]) == (1.0, 2.0, 4.0)


def test_what_the_profiler_saw_on_the_device_alone_counts_too() -> None:
    optimiser = Event("Optimizer.step#AdamW.step", 0)
    launched = Event("aten::mm", 1, None, [Kernel("nvjet", 1e6)])
    device = [
        on_device("nvjet", 1.5e6),
        on_device("packed_matmul_kernel", 2e6),
        on_device("Optimizer.step#AdamW.step", 9e6),  # a span, which holds kernels that are counted already
    ]
    found = shares([optimiser, launched, *device], on_device=True)
    assert (found["total"], found[ELSE], found["our products"]) == (3.5, 1.5, 2.0)


def test_every_kernel_of_this_project_is_known_as_ours() -> None:
    code = "\n".join(path.read_text() for path in KERNELS.rglob("*.py"))
    names = set(re.findall(r"^def (\w+_kernel)\(", code, re.MULTILINE))
    assert len(names) >= 9
    ours = [kind for kind in KINDS if kind.name.startswith("our")]
    assert {name for name in names if any(kind.holds(name, "experts") for kind in ours)} == names


@pytest.mark.parametrize("name", ["void at::native::vectorized_elementwise_kernel", "my_packed_matmul_kernel_2"])
def test_a_kernel_of_others_is_not_ours(name: str) -> None:
    assert not any(kind.holds(name, "") for kind in KINDS)
