"""Memory that is watched: it keeps what belongs in it, and whatever is read or written outside is seen."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from mxref.verification.candidates.asking import reversed_programs
from mxref.verification.candidates.memory import FreshRedZones, RedZone, between_red_zones, uninitialised_memory
from mxref.verification.candidates.own.interpreted import INDEX_LIMIT, checked_indices, checked_memory
from mxref.verification.cases.case import Case
from mxref.verification.cases.draw import draw

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted on this machine")


def behind(x: Tensor) -> Tensor:
    """The element behind a tensor's last one, in the same memory."""
    return x.detach().as_strided((1,), (1,), x.storage_offset() + x.numel())


def test_operands_lie_between_red_zones() -> None:
    sample = draw(Case("everything", 3, 64, 32, 9, 2, 4, bias=True, gate_slots=2, routing="sentinels"))
    inside, zones = between_red_zones(sample)
    for name, operand in sample.problem.arguments().items():
        if isinstance(operand, Tensor):
            other = getattr(inside.problem, name)
            assert torch.equal(other, operand)
            assert other.is_contiguous()
            assert other.storage_offset() * other.element_size() % 256 == 0
    assert {"packed", "scales", "grad_out"} <= zones.keys()
    assert bool(torch.isnan(behind(inside.problem.inputs)).all())
    assert int(behind(inside.problem.expert_weights.packed)) == 0xFF
    assert int(behind(inside.problem.sorted_scattered_idxs)) == sample.problem.P


def test_bytes_inside_an_operand_and_around_it_are_told_apart() -> None:
    zone = RedZone(torch.arange(6.0), float("nan"))
    assert (zone.written("x").inside, zone.written("x").outside) == (0, 0)
    zone.inside[2] = -2.0  # one byte of 2.0, its sign
    assert (zone.written("x").inside, zone.written("x").outside) == (1, 0)
    behind(zone.inside).zero_()
    assert (zone.written("x").inside, zone.written("x").outside) == (1, 2)


def test_fresh_memory_is_nan_and_copies_keep_their_values() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    with FreshRedZones() as fresh:
        empty, copied, zeros = torch.empty(4, dtype=torch.bfloat16), x.clone(), torch.zeros(3, dtype=torch.int32)
    assert empty.isnan().all()
    assert torch.equal(copied, x)
    assert torch.equal(zeros, torch.zeros(3, dtype=torch.int32))
    assert not fresh.written().outside


@pytest.mark.parametrize("place", [-1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_one_element_outside_fresh_memory_is_seen(dtype: torch.dtype, place: int) -> None:
    with FreshRedZones() as fresh:
        x = torch.empty(4, dtype=dtype)
    x.as_strided((1,), (1,), x.storage_offset() + place).zero_()
    written = fresh.written()
    assert written.outside == dtype.itemsize
    assert written.note == f"a {dtype} tensor of 4"


def test_even_a_nan_that_is_written_outside_fresh_memory_is_seen() -> None:
    with FreshRedZones() as fresh:
        x = torch.empty(4, dtype=torch.bfloat16)
    behind(x).fill_(float("nan"))
    assert fresh.written().outside


def test_uninitialised_memory_is_restored() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with uninitialised_memory(poisoned=True):
        assert bool(torch.isnan(torch.empty(5)).all())
        assert bool(torch.isnan(torch.zeros(1).new_empty(5)).all())
    assert torch.are_deterministic_algorithms_enabled() == before
    assert torch.utils.deterministic.fill_uninitialized_memory


@triton.jit
def _copy(source, target, reads, writes, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i, i < reads, 0.0), i < writes)


@triton.jit
def _last_program(target):
    tl.store(target, tl.program_id(0))


@triton.jit
def _product(target, rows, columns):
    tl.store(target, rows * columns)


@interpreted
@pytest.mark.parametrize(("reads", "writes", "what"), [(6, 6, ""), (7, 6, "reads 1"), (6, 7, "writes 1")])
def test_a_mask_that_is_one_too_wide_raises(reads: int, writes: int, what: str) -> None:
    """In memory that is there, so that nothing else could tell."""
    source, target = torch.arange(8.0), torch.zeros(8)

    def launch() -> int:
        with checked_memory() as touched:
            _copy[(1,)](source[:6], target[:6], reads, writes, BLOCK=8)
        return touched.count

    if not what:
        assert launch() == 12
        return
    with pytest.raises(InterpreterError, match=f"{what} of 7 elements outside"):
        launch()
    _copy[(1,)](source, target, 8, 8, BLOCK=8)  # unwatched again
    assert torch.equal(target, source)


@interpreted
def test_an_address_that_no_gpu_takes_raises() -> None:
    apart = torch.zeros(33, dtype=torch.uint8)[1:]
    source = apart.numpy().view("float32")
    with (
        pytest.raises(InterpreterError, match="reads 8 of 8 elements at no multiple of their 4 bytes"),
        checked_memory(),
    ):
        _copy[(1,)](torch.from_numpy(source), torch.zeros(8), 8, 8, BLOCK=8)


@interpreted
def test_two_programs_that_write_the_same_element_raise() -> None:
    target = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(IndexError, match="write 1 elements that another one writes too"), checked_memory():
        _last_program[(2,)](target)
    with checked_memory():
        _last_program[(1,)](target)


@interpreted
def test_a_product_beyond_32_bits_raises() -> None:
    target = torch.zeros(1, dtype=torch.int32)
    with checked_indices():
        _product[(1,)](target, INDEX_LIMIT, 1)
        with pytest.raises(InterpreterError, match=f"32-bit multiply reaches {2 * INDEX_LIMIT}"):
            _product[(1,)](target, INDEX_LIMIT, 2)
    _product[(1,)](target, INDEX_LIMIT, 2)
    assert int(target) == 2 * INDEX_LIMIT


@interpreted
def test_programs_run_in_reverse_and_then_in_order_again() -> None:
    def last() -> int:
        target = torch.full((1,), -1, dtype=torch.int32)
        _last_program[(4,)](target)
        return int(target)

    assert last() == 3
    with reversed_programs():
        assert last() == 0
    assert last() == 3
    with pytest.raises(RuntimeError, match="a candidate"), reversed_programs():
        raise RuntimeError("a candidate's own")
    assert last() == 3
