"""Memory before a guard page: what was taken is given back, also where the driver refuses the next step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mxref.verification.candidates.own import guard_pages

STEPS = ["cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess"]
UNDONE = {"cuMemAddressReserve": "cuMemAddressFree", "cuMemCreate": "cuMemRelease", "cuMemMap": "cuMemUnmap"}


@pytest.mark.parametrize("refused", [*STEPS, ""])
def test_what_was_taken_is_given_back(refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a pretended driver."""
    called: list[str] = []

    def driver(function: str, *arguments: Any) -> None:
        if function == refused:
            raise torch.OutOfMemoryError
        if function == "cuMemGetAllocationGranularity":
            arguments[0]._obj.value = 1 << 21
            return
        called.append(function)

    monkeypatch.setattr(guard_pages, "call_driver", driver)
    done = STEPS[: STEPS.index(refused)] if refused else STEPS
    if refused:
        with pytest.raises(torch.OutOfMemoryError):
            guard_pages._Mapped(1, torch.device("cuda"))
    else:
        piece = guard_pages._Mapped(1, torch.device("cuda"))
        assert called == done
        piece.release()
    assert called == [*done, *(UNDONE[step] for step in reversed(done) if step in UNDONE)]
