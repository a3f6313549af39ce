"""Every MoE family of the installed transformers, tried; docs/models.md says what came of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import families
import pytest
import torch
import transformers
from torch import Tensor

from mxref.kernels.models.experts import PackedExperts

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def documented() -> tuple[str, dict[str, tuple[str, ...]]]:
    """The version of transformers that the table was made with, and its rows by family."""
    version, _, header, _, *rows = (
        DOCS.read_text().partition(families.BEGIN)[2].partition(families.END)[0].split("\n")[1:-1]
    )
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in (header, *rows)]
    assert cells[0] == families.HEADER
    return version.removeprefix("transformers "), {row[0]: row for row in cells[1:]}


@pytest.mark.parametrize("family", families.families())
def test_what_the_documentation_says_of_a_family(family: str) -> None:
    """A row is made by comparing; what is called covered and computes other values raises, in every version."""
    version, rows = documented()
    row = families.row(family)
    if transformers.__version__ == version:
        assert row == rows[family]


def test_the_documentation_has_every_family_and_most_are_covered() -> None:
    version, rows = documented()
    if transformers.__version__ == version:
        assert list(rows) == families.families()
    covered = [sum(row[column] == "yes" for row in rows.values()) for column in (3, 4, 5)]
    assert covered[0] >= 60
    assert covered[1] >= 55
    assert covered[2] >= 44


def test_another_activation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison behind the table can fail: packed experts with the halves of gate and up exchanged."""
    honest = families.pack_experts

    def exchanged(model: torch.nn.Module, **options: int) -> torch.nn.Module:
        packed = honest(model, **options)
        for module in packed.modules():
            if isinstance(module, PackedExperts):
                module._activation = partial(swapped, module._activation)
        return packed

    def swapped(gate: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
        return gate(gate_up.roll(gate_up.shape[-1] // 2, -1))

    monkeypatch.setattr(families, "pack_experts", exchanged)
    with pytest.raises(AssertionError):
        families.row("qwen3_moe")
