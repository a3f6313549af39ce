"""Who can be judged by name, and what each one comes from. Nothing is imported before it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch

from mxref.verification.candidates.candidate import Candidate
from mxref.verification.candidates.loading import load
from mxref.verification.candidates.shipped import golden, shipped, torch_composite
from mxref.verification.clone import of_a_clone


@dataclass(frozen=True)
class Implementation:
    """One implementation.

    Attributes:
        about: what it is, for the table.
        make: the candidate on a device; raises ImportError where it cannot be had.
        package: the distribution that it comes from; empty for a file of the user's.
        devices: where it can run.
    """

    about: str
    make: Callable[[torch.device], Candidate]
    package: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")

    def version(self) -> str:
        """The package's version; empty when that is not known."""
        return version_of(self.package) if self.package else ""

    @property
    def installed(self) -> bool:
        """Whether the package is there; this one is, also in a checkout that nobody installed."""
        return self.package in ("", "mxref") or bool(self.version())


def version_of(package: str) -> str:
    """The version of an installed distribution; empty when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _elsewhere(name: str) -> Callable[[torch.device], Candidate]:
    """Makes an implementation from elsewhere."""

    def make(device: torch.device) -> Candidate:
        made: Candidate = getattr(of_a_clone("candidates.elsewhere.making", f"the implementation {name}"), name)(device)
        return made

    return make


OWN = "mxref.kernels"
"""The name of this project's kernels."""

IMPLEMENTATIONS: dict[str, Implementation] = {
    OWN: Implementation("this project's Triton kernels", shipped, "mxref"),
    "axolotl": Implementation("ScatterMoELoRA on MXWeights, Triton", _elsewhere("axolotl"), "axolotl", ("cuda",)),
    "unsloth": Implementation("its packed product, Triton", _elsewhere("unsloth"), "unsloth_zoo", ("cuda",)),
    "humming": Implementation("its packed product, CUDA, forward", _elsewhere("humming"), "humming-kernels", ("cuda",)),
    "peft": Implementation("LoRA in a dense expert parameter", _elsewhere("peft"), "peft"),
    "grouped_mm": Implementation("torchao dequantize + torch._grouped_mm", _elsewhere("grouped_mm"), "torchao"),
    "composite": Implementation("plain PyTorch, fp32 products", lambda _: torch_composite(), "torch"),
    "golden": Implementation("the golden model, fp64", lambda _: golden(), "mxref"),
}
"""By the name that `--kernel` and `--candidates` take, in the scoreboard's order."""


def is_own(name: str) -> bool:
    """Whether this project's kernels are meant."""
    return name in ("shipped", OWN)


def implementation(name: str) -> Implementation:
    """One by name, "shipped" for this project's kernels; or a user's own, `module:callable` or `file.py:callable`.

    Raises:
        ValueError: the name is neither.
    """
    name = OWN if is_own(name) else name
    if name in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[name]
    if ":" not in name:
        known = f"shipped, {', '.join(IMPLEMENTATIONS)}, module:callable or path/to/file.py:callable"
        raise ValueError(f"{name!r} is unknown; expected {known}")
    return Implementation("", lambda _: load(name))
