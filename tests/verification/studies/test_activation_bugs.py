"""Every bug that is planted in the activation is rejected by its check; the sources themselves are not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mxref.kernels.device import activation as device
from mxref.kernels.layer import activation as layer
from mxref.verification.candidates.candidate import Candidate
from mxref.verification.cases.scope import Scope
from mxref.verification.checks.registry import CHECKS
from mxref.verification.gate.plan import plan
from mxref.verification.gate.run import judge
from mxref.verification.studies.mutation.bug import Bug, plant
from mxref.verification.studies.mutation.bugs_activation import ACTIVATION_BUGS
from mxref.verification.studies.mutation.mutant import Mutant
from mxref.verification.studies.mutation.sources import Place, read_sources

SOURCES = read_sources()
ITEMS = plan(Scope("small", "cpu"), own=True, checks=[check for check in CHECKS if check.name == "activation"])
BUGS = [(place, bug) for place, bug in ACTIVATION_BUGS if not bug.gpu_only]


def built(mutant: Mutant, folder: Path) -> ModuleType:
    """The mutated file as a module of its own: Triton reads a function's source from its file."""
    path = folder / "mutated.py"
    path.write_text(mutant.apply(SOURCES[mutant.place.file].text), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rejects(gated: Any) -> bool:
    operators: Any = SimpleNamespace(layer=SimpleNamespace(activation=SimpleNamespace(gated=gated)))
    candidate = Candidate("mutant", gated, operators=operators)
    how: Any = None  # of fp32 sums, which there are none of
    return any(not finding.ok for item in ITEMS for finding in judge(item, candidate, how))


def test_the_sources_pass() -> None:
    assert not rejects(layer.gated)


@pytest.mark.parametrize(("place", "bug"), BUGS, ids=[bug.name for _, bug in BUGS])
def test_a_bug_is_rejected(place: Place, bug: Bug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutated = built(plant(place, bug, SOURCES), tmp_path)
    if place.file == "layer/activation.py":
        monkeypatch.setattr(layer, "_forward", mutated._forward)
        monkeypatch.setattr(layer, "_backward", mutated._backward)
    else:
        monkeypatch.setattr(layer, "activate", mutated.activate)
        monkeypatch.setattr(layer, "activate_backward", mutated.activate_backward)
    assert rejects(layer.gated), f"{device.__name__}: {bug.why}"
    assert torch.get_default_dtype() == torch.float32
