"""How a callable is found, and what it declares."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mxref.verification.arithmetic.accumulation import ACCUMULATIONS
from mxref.verification.candidates.loading import declare, load


@pytest.fixture
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("own_path")
class TestLoad:
    SOURCE = """
from mxref import parallel_linear_lora
def layer(**operands):
    return parallel_linear_lora(**operands)
layer.mxref_points = ("z-unrounded",)
layer.mxref_accumulation = "fp32-blocks-32"
layer.mxref_covers = "forward, gates=none"
class holder:
    layer = staticmethod(layer)
number = 3
def odd(): ...
odd.mxref_points = "rounded-twice"
def part(): ...
part.mxref_covers = "gates=purple"
"""

    def test_declarations_come_from_the_callable_or_the_caller(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.py"
        file.write_text(self.SOURCE)
        own = load(f"{file}:layer")
        assert own.declared_points == ("z-unrounded",)
        assert own.accumulation == ACCUMULATIONS["fp32-blocks-32"]
        assert str(own.covers) == "forward, gates=none"
        assert own.points(torch.bfloat16).z is False
        told = declare(load(f"{file}:holder.layer"), [], "undeclared")
        assert told.declared_points == ()
        assert str(declare(load(f"{file}:layer"), None, None, "rank>=16").covers) == "rank>=16"
        assert told.accumulation == ACCUMULATIONS["undeclared"]

    def test_modules_of_the_current_folder_come_after_installed_ones(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("")
        (tmp_path / "only_here_layer.py").write_text(self.SOURCE)
        monkeypatch.chdir(tmp_path)
        before = list(sys.path)
        assert load("only_here_layer:layer").name == "only_here_layer:layer"
        assert sys.path == [*before, str(tmp_path)]

    @pytest.mark.parametrize(
        ("attribute", "message"),
        [
            ("absent", "has no 'absent'"),
            ("number", "expected a callable"),
            ("odd", "'rounded-twice' is unknown"),
            ("part", "'purple' is no class of gates"),
        ],
    )
    def test_errors_say_what_is_wrong(self, tmp_path: Path, attribute: str, message: str) -> None:
        file = tmp_path / "mine.py"
        file.write_text(self.SOURCE)
        with pytest.raises(ValueError, match=message):
            load(f"{file}:{attribute}")

    @pytest.mark.parametrize("source", ["import nothing_of_that_name", "def (", "import sys; sys.exit(0)"])
    def test_a_file_that_does_not_import(self, tmp_path: Path, source: str) -> None:
        file = tmp_path / "broken.py"
        file.write_text(source)
        with pytest.raises(ValueError, match="does not import"):
            load(f"{file}:layer")
