"""Where modules of earlier versions went: importing one of them says what replaced it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _renamed(homes: Mapping[str, str]) -> dict[str, str]:
    """Old name -> `home.new`, of names by their home, as `old=new` if renamed."""
    pairs = ((home, *name.partition("=")) for home, names in homes.items() for name in names.split())
    return {old: f"{home}.{new or old}" for home, old, _, new in pairs}


def _into(package: str, **folders: str) -> dict[str, str]:
    return {f"{package}.{old}": f"{package}.{new}" for old, new in _renamed(folders).items()}


MOVED = {
    "mxref.checkpoint": "mxref.checkpoints",
    "mxref.deepseek_checkpoint": "mxref.checkpoints",
    "mxref.verification.inspection": "mxref.checkpoints.statistics",
    "mxref.verification.accumulation": "mxref.verification.arithmetic",
    "mxref.verification.drift": "mxref.verification.checks",
    **_into("mxref.verification", arithmetic="bounds metrics thresholds"),
    **_into(
        "mxref.kernels",
        device="configs decode dequant grouped_matmul grouped_outer hopper hopper_decode launch schedule slots",
        layer="autograd library operands scatter2scatter",
        models="experts interop=torchao layers=moe_block loading merging packing peft_adapters=peft "
        "transformers_experts=transformers",
    ),
}
"""Old module -> the module, or the package of modules, that holds its contents; those that others may know."""

SPLIT = {
    "mxref.verification.candidates": {
        "arithmetic.accumulation": "POINTS default_accumulation describe=Accumulation",
        "candidates.candidate": "Candidate",
        "candidates.loading": "declare load",
        "candidates.shipped": "golden torch_composite",
    },
    "mxref.verification.cases": {
        "cases.case": "Case Sample with_dense_weights=Case",
        "cases.draw": "sample_for_weights=draw_for_weights",
        "cases.small": "FULL_OF_COLUMNS usual_dtype",
        "cases.suites": "full_cases=drawn_cases integer_cases quick_cases=drawn_cases",
    },
    "mxref.verification.gate": {
        "checks.registry": "GUARDS=CHECKS",
        "gate.plan": "Step=Item suite_steps=plan",
        "gate.result": "GateResult",
        "gate.run": "run_gate",
    },
}
"""Old module whose name a package has now -> modules, and which of the old names each took, as `old=new` if renamed."""


class _Finder(MetaPathFinder):
    """Asked after all others, so only about modules that do not exist."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in MOVED:  # without `name=`, so that `from package import module` does not swallow it
            raise ModuleNotFoundError(f"{fullname} has moved: use {MOVED[fullname]} (see MOVED in mxref.moved)")
        return None


def install() -> None:
    """Explain missing modules from now on; calling it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def names_of(package: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package in SPLIT: an ImportError for the names that the old module had."""
    moved = moved_names(package)

    def missing(name: str) -> Any:
        if name in moved:  # an AttributeError's text would be lost in `from package import name`
            raise ImportError(f"{package}.{name} has moved: see {moved[name]} (and SPLIT in mxref.moved)")
        raise AttributeError(f"module {package} has no attribute {name}")

    return missing


def moved_names(package: str) -> dict[str, str]:
    """Old name -> where it is now, for a package in SPLIT."""
    return {old: f"mxref.verification.{new}" for old, new in _renamed(SPLIT[package]).items()}
