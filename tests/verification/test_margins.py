"""Memory with margins: what a candidate allocates keeps its contents, and whatever is stored outside is seen."""

from __future__ import annotations

import pytest
import torch

from mxref.verification.candidates.memory.margins import Margins


def test_fresh_memory_is_nan_and_copies_keep_their_values() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    with Margins() as margins:
        fresh, copied, zeros = torch.empty(4, dtype=torch.bfloat16), x.clone(), torch.zeros(3, dtype=torch.int32)
    assert fresh.isnan().all()
    assert torch.equal(copied, x)
    assert torch.equal(zeros, torch.zeros(3, dtype=torch.int32))
    assert not margins.damage()


@pytest.mark.parametrize("place", [-1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_one_element_outside_is_damage(dtype: torch.dtype, place: int) -> None:
    with Margins() as margins:
        fresh = torch.empty(4, dtype=dtype)
    fresh.as_strided((1,), (1,), fresh.storage_offset() + place).zero_()
    assert margins.damage() == f"1 elements written outside a {dtype} tensor of 4"


def test_even_a_nan_that_is_stored_outside_is_damage() -> None:
    with Margins() as margins:
        fresh = torch.empty(4, dtype=torch.bfloat16)
    fresh.as_strided((1,), (1,), fresh.storage_offset() + 4).fill_(float("nan"))
    assert margins.damage()
