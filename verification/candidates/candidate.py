"""What the gate can judge: the golden model, the shipped kernels, a plain PyTorch composite, anybody's callable.

A candidate is a differentiable callable with the signature of `parallel_linear_lora`, together with what it declares
about its arithmetic. A callable declares by optional attributes (or the command line does the first two for it):

    callable.mxref_points = ("z-unrounded",)        # from POINTS; absent: the contract's own rounding points
    callable.mxref_accumulation = "fp32-blocks-32"  # from ACCUMULATIONS, or an Accumulation; absent: the device's
                                                    # default, and an order-free second chance that counts as weak
    callable.mxref_decode = my_decode               # (MXWeights, dtype) -> [E, N, K], if it decodes outside the product
    callable.mxref_configs = my_configs             # dtype -> every value of its keyword `config` that it may choose
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import mxref
from mxref.problem import Problem
from mxref.scattermoe import RoundingPoints
from mxref.verification.arithmetic.accumulation import ACCUMULATIONS, Accumulation
from mxref.verification.candidates.composite import composite
from mxref.weights import MXWeights, decode_mxfp4

if TYPE_CHECKING:
    from mxref.verification.cases.case import Sample

__all__ = [
    "POINTS",
    "Candidate",
    "declare",
    "default_accumulation",
    "describe",
    "golden",
    "load",
    "shipped",
    "torch_composite",
]

POINTS: dict[str, dict[str, Any]] = {
    "z-unrounded": {"z": False},
    "lora-after-output": {"lora_after_output": True},
    "gates-before-output": {"gates_before_output": True},
    "scaling-in-B": {"scaling_in_B": True},
}
"""The closed list of rounding points that may differ from the contract's, by declared name."""

_GRADIENTS = {"dX": "inputs", "dA": "lora_A", "dB": "lora_B", "dbias": "expert_biases", "dgates": "gates"}


@dataclass(frozen=True)
class Candidate:
    """One implementation under judgement.

    Attributes:
        name: what reports call it.
        call: a callable with the signature of `parallel_linear_lora`; keywords it lacks count as not covered.
        declared_points: names from POINTS; empty for the contract's own rounding points.
        accumulation: how its fp32 sums run, or None when undeclared.
        decode: its own MXFP4 decode, (MXWeights, dtype) -> [E, N, K], judged bit by bit; None when it has none.
        complete: it claims every case, so that what it declines is a failure.
        configs: every configuration that its dispatch can reach for one activation dtype; the keyword `config` pins
            `call` to one. None when it has none, or offers no pin.
        operators: a module with this project's public operators, which is then held to this project's further promises
            too: see `steps.promise_steps`. None for all others.
    """

    name: str
    call: Callable[..., Any]
    declared_points: tuple[str, ...] = ()
    accumulation: Accumulation | None = None
    decode: Callable[[MXWeights, torch.dtype], Tensor] | None = None
    complete: bool = False
    configs: Callable[[torch.dtype], Sequence[Any]] | None = None
    operators: ModuleType | None = None

    def points(self, dtype: torch.dtype) -> RoundingPoints:
        """The declared rounding points for one activation dtype."""
        points = RoundingPoints.contract(dtype)
        for name in self.declared_points:
            points = replace(points, **POINTS[name])
        return points

    def pinned(self, config: object) -> Candidate:
        """This candidate held to one of its `configs`, whatever the batch."""
        return replace(self, call=partial(self.call, config=config))

    def run(self, sample: Sample) -> dict[str, Tensor | None]:
        """One forward and one backward pass on copies of the sample's operands.

        Returns:
            "Y" and, of "dX", "dA", "dB", "dbias", "dgates", those whose operand is there; None for a gradient that
            autograd does not reach. "Y" alone from a candidate that builds no graph, or whose backward raises
            NotImplementedError.

        Raises:
            NotImplementedError: the candidate does not cover this call.
            TypeError: the candidate returned something else than a tensor.
            Exception: whatever else the candidate raises.
        """
        y, leaves = self.trace(sample)
        return {"Y": y.detach(), **self.gradients(sample, y, leaves)}

    def trace(self, sample: Sample, copy: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """The forward pass alone: the output, and the leaves of its graph by the name of their gradient.

        `copy=False` hands the operands over where they lie, without a copy of any. Raises what `run` does.
        """
        problem = sample.problem
        operands = {
            tensor: getattr(problem, operand).detach()
            for tensor, operand in _GRADIENTS.items()
            if getattr(problem, operand) is not None
        }
        leaves = {tensor: (x.clone() if copy else x).requires_grad_() for tensor, x in operands.items()}
        replaced = {_GRADIENTS[tensor]: leaf for tensor, leaf in leaves.items()}
        y = self.call(**self._accepted(replace(problem, **replaced).arguments(), sample.case.flags()))
        if not isinstance(y, Tensor):
            raise TypeError(f"{self.name} returned {type(y).__name__}; expected one tensor")
        return y, leaves

    def gradients(
        self, sample: Sample, y: Tensor, leaves: dict[str, Tensor], retain_graph: bool = False
    ) -> dict[str, Tensor | None]:
        """The backward pass of `trace`; empty where there is none, or where it cannot be asked for."""
        if not y.requires_grad or y.shape != sample.grad_out.shape:
            return {}
        incoming = sample.grad_out.to(y.dtype)
        try:
            gradients = torch.autograd.grad(
                y, list(leaves.values()), incoming, retain_graph=retain_graph, allow_unused=True
            )
        except NotImplementedError:
            return {}
        return dict(zip(leaves, gradients, strict=True))

    def _accepted(self, arguments: dict[str, Any], flags: dict[str, bool]) -> dict[str, Any]:
        """The call's keywords. Those that the callable lacks are left out, where that leaves the meaning alone."""
        try:
            parameters = inspect.signature(self.call).parameters.values()
        except (TypeError, ValueError):  # builtins and some extension types have no signature
            return arguments
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            return arguments | flags
        known = {p.name for p in parameters}
        defaults = {field.name: field.default for field in fields(Problem)}
        for name in [name for name in arguments if name not in known]:
            value = arguments.pop(name)
            if isinstance(value, Tensor) or value != defaults[name]:
                raise NotImplementedError(f"{self.name} takes no argument {name!r}")
        return arguments | {name: value for name, value in flags.items() if name in known}


def default_accumulation(device: torch.device) -> str:
    """Name of the accumulation that a candidate without a declaration is judged by first."""
    if device.type == "cpu":
        return "fp32-blocks-64"
    return "tensor-core-sm90" if torch.cuda.get_device_capability(device) >= (9, 0) else "tensor-core-sm80"


def describe(how: Accumulation) -> str:
    """An accumulation in words."""
    name = next((name for name, known in ACCUMULATIONS.items() if known == how), None)
    if name is not None:
        return name
    kind = {
        "tensor_core": f"tensor core, steps of {how.step}, {how.fraction_bits} fraction bits",
        "fp32_blocks": f"fp32 in blocks of {how.step}",
        "undeclared": "any order",
    }[how.kind]
    parts = [kind, f"LoRA product {how.lora}", "bias first" if how.bias_inside else "bias last"]
    parts += [f"{product} in its own order" for product in how.orders]
    return ", ".join(parts)


def golden() -> Candidate:
    """The golden model judged by itself: a check of the gate, not of anything shipped."""
    return Candidate("golden", mxref.parallel_linear_lora, decode=decode_mxfp4, complete=True)


def shipped(device: torch.device) -> Candidate:
    """The production kernels. On a CPU, TRITON_INTERPRET=1 must be set before this first imports them.

    One fp32 accumulator: the LoRA product, times s, then the base product with k ascending, the bias last. Tensor cores
    or, interpreted, blocks of 64: the device's default is what they declare.
    """
    from mxref import kernels
    from mxref.kernels.device.launch import architecture

    def decode(weights: MXWeights, dtype: torch.dtype) -> Tensor:
        return kernels.dequantize_experts(weights, torch.arange(weights.E, device=weights.device), dtype)

    def configs(dtype: torch.dtype) -> list[kernels.Config]:
        return kernels.reachable_configs(architecture(device), dtype)

    how = ACCUMULATIONS[default_accumulation(device)]
    call = kernels.parallel_linear_lora
    return Candidate("mxref.kernels", call, (), how, decode, complete=True, configs=configs, operators=kernels)


def torch_composite() -> Candidate:
    """Plain PyTorch: decode, then one fp32 matrix product an expert, differentiated by autograd."""
    return Candidate("torch composite", composite, complete=True)


def load(spec: str, points: Sequence[str] | None = None, accumulation: str | None = None) -> Candidate:
    """A candidate from `module:callable` or `path/to/file.py:callable`.

    Modules in the current directory are found too, after the installed ones: a folder there must not replace a package.

    Args:
        spec: where the callable is; dots after the colon walk attributes.
        points: declared rounding points, instead of the callable's own `mxref_points`.
        accumulation: name of the declared accumulation, instead of the callable's own `mxref_accumulation`.

    Raises:
        ValueError: the module, file or callable cannot be found or imported, or its declaration is not understood.
    """
    source, _, attribute = spec.rpartition(":")
    if not source or not attribute:
        raise ValueError(
            f"--kernel is {spec!r}; expected shipped, golden, composite, module:callable or path/to/file.py:callable"
        )
    target: Any = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise ValueError(f"--kernel {spec}: {source} has no {attribute!r}")
        target = getattr(target, name)
    if not callable(target):
        raise ValueError(f"--kernel {spec}: {attribute} is {type(target).__name__}; expected a callable")
    known_points, known_accumulation = getattr(target, "mxref_points", ()), getattr(target, "mxref_accumulation", None)
    return declare(
        Candidate(
            spec, target, decode=getattr(target, "mxref_decode", None), configs=getattr(target, "mxref_configs", None)
        ),
        known_points if points is None else points,
        known_accumulation if accumulation is None else accumulation,
    )


def declare(
    candidate: Candidate, points: Sequence[str] | str | None, accumulation: Accumulation | str | None
) -> Candidate:
    """The candidate with another declaration; None leaves what it has.

    Raises:
        ValueError: a rounding point or an accumulation is not in its list.
    """
    if isinstance(points, str):
        points = points.replace(" ", "").split(",")
    if points is not None:
        unknown = [name for name in points if name not in POINTS]
        if unknown:
            raise ValueError(f"rounding point {unknown[0]!r} is unknown; choose from {', '.join(POINTS)}")
        candidate = replace(candidate, declared_points=tuple(points))
    if isinstance(accumulation, str):
        if accumulation not in ACCUMULATIONS:
            raise ValueError(f"accumulation {accumulation!r} is unknown; choose from {', '.join(ACCUMULATIONS)}")
        accumulation = ACCUMULATIONS[accumulation]
    if accumulation is not None and not isinstance(accumulation, Accumulation):
        raise ValueError(f"mxref_accumulation is {type(accumulation).__name__}; expected a name or an Accumulation")
    return candidate if accumulation is None else replace(candidate, accumulation=accumulation)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"--kernel: no file {path}")
    sys.path.append(str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"_mxref_candidate_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--kernel: {path} does not import: {type(error).__name__}: {error}") from error
    return module


def _load_module(name: str) -> ModuleType:
    sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--kernel: module {name} does not import: {type(error).__name__}: {error}") from error
